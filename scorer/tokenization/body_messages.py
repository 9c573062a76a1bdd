"""Bodies of the Anthropic API (``/v1/messages``), turned into chats as vLLM turns them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from kvatlas.scorer.tokenization import body_fields as fields
from kvatlas.scorer.tokenization.body_chat import messages_of
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.messages import BILLING_LINE
from kvatlas.scorer.tokenization.records import ChatInput

_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none", "tool": "named"}
_ROLES: Final = frozenset({"user", "assistant", "system"})


def chat_of_messages(body: Mapping[str, Any]) -> ChatInput:
    """Return the chat of a body.

    Raises:
        TokenizeInputError: it is no such body; names the field.
    """
    found: list[dict[str, Any]] = []
    if system := _system(body.get("system"), "system"):
        found.append({"role": "system", "content": system})
    for number, message in enumerate(messages_of(body)):
        _append(message, f"messages[{number}]", found)
    tools = _tools(body)
    choice = fields.take(body, "tool_choice", dict)
    return ChatInput(
        messages=found,
        tools=tools,
        kwargs=fields.take(body, "chat_template_kwargs", dict) or {},
        reasoning_effort=_effort(body),
        tool_choice=_tool_choice(choice) if choice is not None else "auto" if tools else "",
        systems_first=True,
    )


def _system(value: Any, where: str) -> str:
    """Return a system text; parts follow each other without a separator, and the client's billing line goes."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise TokenizeInputError(f"{where}: must be text or an array of blocks, not {fields.shown(value)}")
    texts = []
    for number, block in enumerate(fields.objects(value, where)):
        if block.get("type") == "text":
            text = fields.take(block, "text", str, f"{where}[{number}].") or ""
            if not text.startswith(BILLING_LINE):
                texts.append(text)
    return "".join(texts)


def _append(message: Mapping[str, Any], where: str, found: list[dict[str, Any]]) -> None:
    role = message["role"]
    if role not in _ROLES:
        raise TokenizeInputError(f"{where}.role: {role[:40]!r} is none of {', '.join(sorted(_ROLES))}")
    content = message.get("content")
    if role == "system":
        text = _system(content, f"{where}.content")
        if text and not (isinstance(content, str) and text.startswith(BILLING_LINE)):
            found.append({"role": "system", "content": text})
        return
    made: dict[str, Any] = {"role": role}
    if isinstance(content, str):
        made["content"] = content
    elif isinstance(content, list):
        _Blocks(where, role, found).fill(content, made)
    else:
        raise TokenizeInputError(f"{where}.content: must be text or an array of blocks, not {fields.shown(content)}")
    if role != "user" or "content" in made:
        found.append(made)


class _Blocks:
    """The content blocks of one message."""

    def __init__(self, where: str, role: str, found: list[dict[str, Any]]) -> None:
        self._where = where
        self._role = role
        self._found = found
        self._parts: list[dict[str, Any]] = []
        self._calls: list[dict[str, Any]] = []
        self._thoughts: list[str] = []

    def fill(self, blocks: list[Any], made: dict[str, Any]) -> None:
        """Put the blocks into a message; tool results become messages of their own in front of it."""
        for number, block in enumerate(fields.objects(blocks, f"{self._where}.content")):
            self._take(block, f"{self._where}.content[{number}].")
        if self._thoughts:
            made["reasoning"] = "".join(self._thoughts)
        if self._calls:
            made["tool_calls"] = self._calls
        if len(self._parts) == 1 and self._parts[0]["type"] == "text":
            made["content"] = self._parts[0]["text"]
        elif self._parts:
            made["content"] = self._parts

    def _take(self, block: Mapping[str, Any], where: str) -> None:
        kind = fields.need(block, "type", str, where)
        if kind == "text":
            if text := fields.take(block, "text", str, where):
                self._parts.append({"type": "text", "text": text})
        elif kind == "image":
            self._parts.append({"type": "image_url", "image_url": {"url": ""}, **_uuid(block)})
        elif kind == "thinking":
            self._thoughts.append(fields.take(block, "thinking", str, where) or "")
        elif kind == "tool_use":
            self._calls.append(_call(block, where))
        elif kind == "tool_result":
            self._result(block, where)
        elif kind in ("tool_addition", "tool_removal"):
            raise TokenizeInputError(f"{where[:-1]}: changes of tools inside a conversation are not supported")
        # Redacted thinking and references to tools leave no text behind.

    def _result(self, block: Mapping[str, Any], where: str) -> None:
        content = block.get("content")
        if self._role != "user":
            self._parts.append({"type": "text", "text": f"Tool result: {content or ''}"})
            return
        identifier = fields.take(block, "tool_use_id", str, where) or ""
        items = fields.objects(content, f"{where}content") if isinstance(content, list) else []
        texts = [str(item.get("text", "")) for item in items if item.get("type") == "text"]
        text = content if isinstance(content, str) else "\n".join(texts)
        self._found.append({"role": "tool", "tool_call_id": identifier, "content": text})
        pictures = [
            {"type": "image_url", "image_url": {"url": ""}, **_uuid(item)}
            for item in items
            if item.get("type") == "image"
        ]
        if pictures:
            self._found.append({"role": "user", "content": pictures})
        references = [
            {"type": "tool_reference", "name": name}
            for item in items
            if item.get("type") == "tool_reference" and (name := item.get("tool_name") or item.get("name"))
        ]
        if references:
            self._found.append({"role": "tool", "tool_call_id": identifier, "content": references})


def _uuid(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"uuid": block["uuid"]} if isinstance(block.get("uuid"), str) else {}


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = json.dumps(fields.take(block, "input", dict, where) or {})
    function = {"name": fields.take(block, "name", str, where) or "", "arguments": arguments}
    return {"id": fields.take(block, "id", str, where) or "", "type": "function", "function": function}


def _tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    tools = fields.take(body, "tools", list)
    if tools is None:
        return None
    found: list[Mapping[str, Any]] = []
    for number, tool in enumerate(fields.objects(tools, "tools")):
        where = f"tools[{number}]."
        function = {
            "name": fields.need(tool, "name", str, where),
            "description": fields.take(tool, "description", str, where),
            "parameters": fields.take(tool, "input_schema", dict, where),
            "strict": fields.take(tool, "strict", bool, where),
            "defer_loading": fields.take(tool, "defer_loading", bool, where),
        }
        found.append({"type": "function", "function": function})
    return found


def _tool_choice(choice: Mapping[str, Any]) -> str:
    kind = fields.need(choice, "type", str, "tool_choice.")
    if kind not in _CHOICES:
        raise TokenizeInputError(f"tool_choice.type: {kind[:40]!r} is none of {', '.join(sorted(_CHOICES))}")
    return _CHOICES[kind]


def _effort(body: Mapping[str, Any]) -> str | None:
    """Return the effort: thinking that is turned off counts as none."""
    config = fields.take(body, "output_config", dict) or {}
    effort = fields.choice(config, "effort", fields.EFFORTS)
    thinking = fields.take(body, "thinking", dict) or {}
    return "none" if thinking.get("type") == "disabled" else effort
