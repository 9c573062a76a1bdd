"""The Jinja environment of chat templates: what transformers offers them, and bounds on what they may cost.

Offered: immutable sandbox, ``trim_blocks`` and ``lstrip_blocks``, loop controls, ``tojson`` as plain ``json.dumps``,
``raise_exception``, ``strftime_now`` and ``{% generation %}``. Templates come with models and with requests, so a
rendering is bounded in time (looked at in every loop turn and call) and in the size of every text it builds.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import TemplateError as JinjaTemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: Widest padding, indentation, batch or slice: real templates use single digits.
_MAX_WIDTH: Final = 10_000
#: Longest result of a power, bits.
_MAX_BITS: Final = 65_536
_WIDTH_FILTERS: Final = ("center", "indent", "batch", "slice", "wordwrap")
_WIDTH_METHODS: Final = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_TICK: Final = "kvatlas_tick"
_JOIN: Final = "kvatlas_join"


class LimitReached(Exception):  # noqa: N818  # a signal, translated where the rendering was started
    """A rendering went over its time or size."""


class Budget(threading.local):
    """Time and size left to the rendering on this thread."""

    ends_at: float = float("inf")
    clock: Callable[[], float] = staticmethod(time.monotonic)
    max_chars: int = 1 << 62

    def check(self) -> str:
        """Raise when the time is over.

        Raises:
            LimitReached: it is.
        """
        if self.clock() > self.ends_at:
            raise LimitReached("took too long")
        return ""

    def check_size(self, chars: int) -> None:
        """Raise when a text would be too long.

        Raises:
            LimitReached: it would.
        """
        if chars > self.max_chars:
            raise LimitReached("built too long a text")


class _Generation(Extension):
    """``{% generation %}``: marks what an assistant wrote, for training; renders as its body."""

    tags = {"generation"}  # noqa: RUF012  # declared by the base class as it is

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; one per pool, used from many threads."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.budget = Budget()
        self.filters["tojson"] = _to_json
        for name in _WIDTH_FILTERS:
            self.filters[name] = _narrow(self.filters[name])
        # Filler text without a bound on its length.
        self.globals.pop("lipsum", None)
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: now().strftime(form)
        self.globals[_TICK] = self.budget.check
        self.globals[_JOIN] = self._join

    def compile_template(self, source: str) -> Template:
        """Compile a template.

        Raises:
            jinja2.TemplateError: it is not one.
        """
        return self.from_string(source)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        _replace_joins(tree)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call on behalf of a template; the odd names keep template keywords free, as in the base class."""
        __self.budget.check()
        if isinstance(owner := getattr(__obj, "__self__", None), str):
            __self._check_text_method(owner, __obj.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute on behalf of a template, unless the result would be too long."""
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.budget.check_size(len(left) + len(right))
        elif operator == "*":
            self._check_repeat(left, right)
            self._check_repeat(right, left)
        elif (
            operator == "**"
            and isinstance(left, int)
            and isinstance(right, int)
            and _power_bits(left, right) > _MAX_BITS
        ):
            raise LimitReached("raised a number to too high a power")
        elif operator == "%" and isinstance(left, str) and len(left) > 0:
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def _check_repeat(self, what: Any, times: Any) -> None:
        if isinstance(what, str | list | tuple) and isinstance(times, int):
            self.budget.check_size(len(what) * times)

    def _check_text_method(self, text: str, method: str, args: tuple[Any, ...]) -> None:
        if method in _WIDTH_METHODS and any(isinstance(arg, int) and arg > _MAX_WIDTH for arg in args):
            raise LimitReached(f"called {method} with too large a width")
        if method == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            self.budget.check_size(len(text) + text.count(args[0]) * len(args[1]))
        if method in {"format", "format_map"}:
            _check_widths(text)
        if method == "join" and args and isinstance(args[0], list | tuple | str):
            self.budget.check_size(len(text) * len(args[0]))

    def _join(self, *parts: Any) -> str:
        texts = [str(part) for part in parts]
        self.budget.check_size(sum(map(len, texts)))
        return "".join(texts)


def parse_plain(environment: Environment, source: str) -> nodes.Template:
    """Return a template's tree as its author wrote it, without the bounds woven in."""
    return Environment._parse(environment, source, None, None)  # the hook this module overrides


def _replace_joins(tree: nodes.Node) -> None:
    """Turn every ``a ~ b`` into a call that looks at the length first."""
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for name, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _joined(value))
            elif isinstance(value, list):
                value[:] = [_joined(item) if isinstance(item, nodes.Concat) else item for item in value]


def _joined(node: nodes.Concat) -> nodes.Call:
    call = nodes.Call(nodes.Name(_JOIN, "load"), node.nodes, [], None, None)
    call.set_lineno(node.lineno)
    return call


def _power_bits(base: int, exponent: int) -> int:
    return abs(base).bit_length() * max(0, exponent)


def _narrow(wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse widths that only serve to fill the memory."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, int) and value > _MAX_WIDTH for value in (*args, *kwargs.values())):
            raise LimitReached("asked a filter for too large a width")
        return wrapped(*args, **kwargs)

    checked.__dict__.update(wrapped.__dict__)  # what Jinja passes to it, such as the environment
    return checked


def _check_widths(form: str) -> None:
    digits = "".join(character if character.isdigit() else " " for character in form)
    if any(len(number) > 4 for number in digits.split()) or ("*" in form and "%" in form):
        raise LimitReached("used a text format with too large a width")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Iterable[str] | None = None,
    sort_keys: bool = False,
) -> str:
    if isinstance(indent, int) and indent > _MAX_WIDTH:
        raise LimitReached("asked for JSON with too large an indentation")
    pair = None if separators is None else tuple(separators)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=pair,  # type: ignore[arg-type]  # two texts, or json says so
        sort_keys=sort_keys,
    )


def _raise(message: str) -> str:
    raise JinjaTemplateError(message)
