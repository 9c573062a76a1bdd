"""Chat to text, with the model's template or the request's, as transformers renders it for vLLM."""

from __future__ import annotations

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Final

from jinja2 import Template
from jinja2.exceptions import TemplateError as JinjaTemplateError

from kvatlas.scorer.tokenization import content_format, messages
from kvatlas.scorer.tokenization.arguments import UNKNOWN, EngineArguments
from kvatlas.scorer.tokenization.errors import (
    NoTemplateError,
    PromptLimitError,
    TemplateError,
    TemplateLimitError,
    TokenizeInputError,
)
from kvatlas.scorer.tokenization.limits import TOKENIZER_LIMITS, TokenizerLimits
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.records import ChatInput
from kvatlas.scorer.tokenization.sandbox import LimitReached, TemplateEnvironment, parse_plain

_COMPILED: Final = 128
#: Put at the end of the message to continue and looked for in the text; its blank shows whether templates trim.
_MARK: Final = "KVATLAS_CONTINUE_HERE "
#: What a rendering is about, which no further argument may replace.
_RESERVED: Final = frozenset({"messages", "chat_template"})
#: Arguments of the rendering itself, which no template sees.
_NOT_FOR_TEMPLATES: Final = frozenset({"tokenize"})
#: What vLLM gives every template.
_ALWAYS: Final = {"cohere_format": "cmd4"}


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: Template
    source: str
    form: content_format.Format
    knows_developer: bool


class ChatRenderer:
    """Renders chats of all models; safe to use from many threads."""

    def __init__(
        self,
        settings: TokenizerSettings,
        now: Callable[[], datetime] = datetime.now,
        beside: Callable[[bytes], bytes] | None = None,
        *,
        limits: TokenizerLimits = TOKENIZER_LIMITS,
    ) -> None:
        """Take settings and limits.

        Args:
            settings: of tokenization.
            now: the wall clock, for templates that print a date.
            beside: renders what :func:`render_job` gives in a process of its own, for templates of requests; None
                renders them here.
            limits: bounds on chats, templates and texts.
        """
        self._settings, self._limits = settings, limits
        self._beside = beside
        self._environment = TemplateEnvironment(now)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()

    def render(
        self,
        chat: ChatInput,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
        arguments: EngineArguments = UNKNOWN,
    ) -> str:
        """Render one chat.

        Args:
            chat: messages and how to render them.
            templates: the model's templates by name.
            special_tokens: template variable -> token text.
            arguments: what the model's engine was started with.

        Raises:
            NoTemplateError: there is no template to use.
            TemplateError: the template is broken or refuses the messages.
            TemplateLimitError: rendering took too long or too much.
            PromptLimitError: there are too many messages, or the request's template is too long.
            TokenizeInputError: the messages make no sense, or the engine refuses such requests.
        """
        if len(chat.messages) > self._limits.messages:
            raise PromptLimitError(f"{len(chat.messages)} messages; the limit is {self._limits.messages}")
        if not chat.messages:
            raise TokenizeInputError("messages: must not be empty")
        if reserved := _RESERVED & chat.kwargs.keys():
            raise TokenizeInputError(f"template arguments {sorted(reserved)} are not for requests to set")
        if chat.add_generation_prompt and chat.continue_final_message:
            raise TokenizeInputError("add_generation_prompt and continue_final_message exclude each other")
        arguments.check_tools(chat)
        tools = None if arguments.hides_tools(chat) else chat.tools
        source, foreign = self._choose(chat, templates, with_tools=tools is not None)
        if foreign and self._beside is not None:
            return self._beside(render_job(chat, special_tokens, arguments, self._limits)).decode(
                errors="surrogatepass"
            )
        compiled = self._compile(source)
        conversation = self._conversation(chat, compiled, arguments)
        final = _mark_final(conversation, compiled.source) if chat.continue_final_message else None
        variables = {**special_tokens, **template_variables(chat, tools, arguments), "messages": conversation}
        text = self._run(compiled.template, variables)
        return text if final is None else _cut_at_mark(text, final)

    def _conversation(self, chat: ChatInput, compiled: _Compiled, arguments: EngineArguments) -> list[dict[str, Any]]:
        given = arguments.content_format or "auto"
        conversation = messages.prepare(chat.messages, compiled.form if given == "auto" else given)
        if not compiled.knows_developer:
            conversation = messages.developer_as_system(conversation)
        inline = any(message["role"] == "system" for message in conversation[1:])
        if chat.systems_first and inline and not self._takes_later_systems(compiled):
            conversation = messages.systems_in_front(conversation)
        return conversation

    def _takes_later_systems(self, compiled: _Compiled) -> bool:
        """Whether a template takes system messages behind others, tried out as vLLM does."""
        roles = ("system", "user", "system", "user")
        probe = {"messages": [{"role": role, "content": "t"} for role in roles], "add_generation_prompt": False}
        try:
            self._run(compiled.template, {"tools": None, "documents": None, **probe})
        except TemplateError:
            return False
        return True

    def _choose(self, chat: ChatInput, templates: Mapping[str, str], *, with_tools: bool) -> tuple[str, bool]:
        """Return the template's text, and whether it is the request's own."""
        wanted = chat.chat_template
        if wanted is None:
            if with_tools and "tool_use" in templates:
                return templates["tool_use"], False
            if "default" in templates:
                return templates["default"], False
            names = f"only templates named {sorted(templates)}" if templates else "no chat template"
            raise NoTemplateError(f"the model has {names}: name one, or send a template with the request")
        if wanted in templates:
            return templates[wanted], False
        if wanted in templates.values():
            return wanted, False
        if not self._settings.request_templates:
            raise TokenizeInputError("chat templates of requests are turned off (setting request_templates)")
        if len(wanted) > self._limits.template_bytes:
            raise PromptLimitError(
                f"chat template of {len(wanted)} characters; the limit is {self._limits.template_bytes}"
            )
        return wanted, True

    def _compile(self, source: str) -> _Compiled:
        with self._lock:
            if source in self._compiled:
                self._compiled.move_to_end(source)
                return self._compiled[source]
        try:
            template = self._environment.compile_template(source)
            form = content_format.detect(parse_plain(self._environment, source))
        except JinjaTemplateError as error:
            line = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
            raise TemplateError(f"the chat template does not compile: {error}{line}") from error
        except (RecursionError, OverflowError, MemoryError, SyntaxError, ValueError) as error:
            # The last two come from Python's own compiler, for what Jinja lets through.
            raise TemplateError(f"the chat template does not compile: {type(error).__name__}") from error
        developer = "developer" in source
        compiled = _Compiled(template, source, form, developer)
        with self._lock:
            self._compiled[source] = compiled
            while len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def _run(self, template: Template, variables: Mapping[str, Any]) -> str:
        budget = self._environment.budget
        limit = self._limits.prompt_bytes
        budget.max_chars = limit
        budget.ends_at = budget.clock() + self._limits.template_seconds
        chunks, size = [], 0
        try:
            for chunk in template.generate(variables):
                size += len(chunk)
                budget.check()
                budget.check_size(size)
                chunks.append(chunk)
        except LimitReached as error:
            raise TemplateLimitError(
                f"rendering the chat template {error} (at most {self._limits.template_seconds} s and {limit} bytes)"
            ) from error
        except JinjaTemplateError as error:
            raise TemplateError(f"the chat template refuses the request: {error}") from error
        except Exception as error:
            # Anything can come out of a template: a missing field, a type that does not fit, too deep a recursion.
            raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
        finally:
            budget.ends_at = float("inf")
        return "".join(chunks)


def render_job(
    chat: ChatInput, special_tokens: Mapping[str, str], arguments: EngineArguments, limits: TokenizerLimits
) -> bytes:
    """Return a chat with a template of its own as a process beside this one takes it."""
    given = {
        "chat": {field.name: getattr(chat, field.name) for field in fields(chat) if field.name != "places"},
        "special_tokens": dict(special_tokens),
        "arguments": asdict(arguments),
        "limits": limits._asdict(),
    }
    return json.dumps(given).encode()


def template_variables(
    chat: ChatInput, tools: Sequence[Mapping[str, Any]] | None, arguments: EngineArguments
) -> dict[str, Any]:
    """Return what a template may read beside the messages: the engine's defaults, then the request's arguments.

    Null and the text ``auto`` count as absent on every level.
    """
    effort = arguments.effort_of(chat.reasoning_effort)
    own: dict[str, Any] = {
        "add_generation_prompt": chat.add_generation_prompt,
        "continue_final_message": chat.continue_final_message,
        "documents": chat.documents,
        "reasoning_effort": effort,
    }
    if effort is not None and "enable_thinking" not in chat.kwargs:
        own["enable_thinking"] = effort != "none"
    found: dict[str, Any] = {"documents": None, "tools": None, **_ALWAYS}
    for level in (arguments.template_kwargs, chat.kwargs, own):
        found.update({name: value for name, value in level.items() if _is_set(value)})
    if tools is not None:
        found["tools"] = messages.normal_tools(tools)
    return {name: value for name, value in found.items() if name not in _NOT_FOR_TEMPLATES}


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and value == "auto")


def _mark_final(conversation: list[dict[str, Any]], source: str) -> str:
    """Put the mark at the end of the last message's text, and return that text."""
    if not conversation or "content" not in source:
        raise TokenizeInputError("continue_final_message: there is no message, or the template uses no content")
    message = conversation[-1] = copy.deepcopy(conversation[-1])
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _MARK
        return content
    for part in reversed(content):
        if "text" in part:
            text = str(part["text"])
            part["text"] = text + _MARK
            return text
    raise TokenizeInputError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    bare = _MARK.strip()
    place = text.rfind(bare)
    if place < 0 or final.strip() not in text:
        raise TemplateError("continue_final_message: the template does not show the last message as it is")
    before = text[:place]
    # A template that trims messages took the mark's blank; then blanks before it would have gone too.
    return before if text.startswith(_MARK, place) else before.rstrip()
