"""Which kind of message content a template expects, found as vLLM finds it: by looking whether it walks over parts.

A template that has a loop over a message's content is given lists of parts (``openai``); any other gets text
(``string``). What counts as such a loop: over ``message.content`` where ``message`` is the variable of a loop over the
messages, under any name they were assigned to; over a macro's argument that is given such a content; or over a variable
called ``content`` outside macros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from jinja2 import nodes

Format = Literal["string", "openai"]


def detect(tree: nodes.Template) -> Format:
    """Return the content format of a parsed template."""
    try:
        return "openai" if any(_content_loops(tree)) else "string"
    except _UnknownShapeError:
        # Loops with several variables over messages: vLLM gives up on such templates and takes text.
        return "string"


class _UnknownShapeError(Exception):
    """A loop over messages that does not name one variable."""


def _content_loops(tree: nodes.Template) -> Iterator[nodes.For]:
    messages = set(_message_variables(tree))
    inside_macros: set[int] = set()
    for macro in tree.find_all(nodes.Macro):
        parameters = _content_parameters(tree, macro, messages)
        for loop in macro.find_all(nodes.For):
            inside_macros.add(id(loop))
            if isinstance(loop.iter, nodes.Name) and loop.iter.name in parameters:
                yield loop
    for loop in tree.find_all(nodes.For):
        plain = isinstance(loop.iter, nodes.Name) and loop.iter.name == "content" and id(loop) not in inside_macros
        if plain or any(_refers(loop.iter, name, "content") for name in messages):
            yield loop


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, messages: set[str]) -> set[str]:
    """Return the parameters of a macro that are given the content of a message somewhere."""
    names = [argument.name for argument in macro.args]
    found = set()
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        given = [*zip(names, call.args, strict=False), *((pair.key, pair.value) for pair in call.kwargs)]
        for name, value in given:
            if name in names and any(_refers(value, message, "content") for message in messages):
                found.add(name)
    return found


def _message_variables(tree: nodes.Template) -> Iterator[str]:
    """Yield the names that loops give to single messages."""
    sources = _aliases(tree, "messages")
    for loop in tree.find_all(nodes.For):
        if any(_refers(loop.iter, source) for source in sources):
            if not isinstance(loop.target, nodes.Name):
                raise _UnknownShapeError
            yield loop.target.name


def _aliases(tree: nodes.Template, name: str) -> set[str]:
    """Return a variable and everything it is assigned to, also in namespaces (as ``ns.field``)."""
    found = {name}
    while True:
        more = {
            target
            for assign in tree.find_all(nodes.Assign)
            for target, value in _assigned(assign)
            if target not in found and any(_refers(value, known) for known in found)
        }
        if not more:
            return found
        found |= more


def _assigned(assign: nodes.Assign) -> Iterator[tuple[str, nodes.Node]]:
    target, value = assign.target, assign.node
    if isinstance(target, nodes.NSRef):
        yield f"{target.name}.{target.attr}", value
    elif isinstance(target, nodes.Name):
        yield target.name, value
        if isinstance(value, nodes.Call) and isinstance(value.node, nodes.Name) and value.node.name == "namespace":
            for pair in value.kwargs:
                yield f"{target.name}.{pair.key}", pair.value


def _refers(node: nodes.Node | None, name: str, field: str = "") -> bool:
    """Whether an expression is a variable, or a field of it, perhaps filtered, tested or sliced."""
    while True:
        if isinstance(node, nodes.Filter | nodes.Test) or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            node = node.node
        elif field and isinstance(node, nodes.Getattr) and node.attr == field:
            node, field = node.node, ""
            return _is_variable(node, name)
        elif field and isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            return node.arg.value == field and _is_variable(node.node, name)
        else:
            return not field and _is_variable(node, name)


def _is_variable(node: nodes.Node | None, name: str) -> bool:
    base, dot, attribute = name.rpartition(".")
    if dot and isinstance(node, nodes.Getattr):
        return node.attr == attribute and _is_variable(node.node, base)
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
