"""Bodies of the Responses API (``/v1/responses``), turned into chats as vLLM turns them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from kvatlas.scorer.tokenization import body_fields as fields
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import ChatInput

#: Between the name of a namespace of tools and the name of one of them.
_NAMESPACE: Final = "__"
_UNFINISHED: Final = frozenset({"in_progress", "incomplete"})
#: How vLLM shows a tool that takes bare text: as a function of one text.
_CUSTOM_INPUT: Final = "input"
_CUSTOM_PARAMETERS: Final = {
    "type": "object",
    "properties": {_CUSTOM_INPUT: {"type": "string", "description": "The freeform text payload for this tool."}},
    "required": [_CUSTOM_INPUT],
    "additionalProperties": False,
}


def chat_of_responses(body: Mapping[str, Any]) -> ChatInput:
    """Return the chat of a body.

    Raises:
        TokenizeInputError: it is no such body, or it goes on from an answer that only the engine has.
    """
    if body.get("previous_response_id") is not None:
        raise TokenizeInputError("previous_response_id: the conversation so far is known to the engine alone")
    messages: list[dict[str, Any]] = []
    if instructions := fields.take(body, "instructions", str):
        messages.append({"role": "system", "content": instructions})
    given = body.get("input")
    continues = False
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list) and given:
        for number, item in enumerate(fields.objects(given, "input")):
            _add(item, f"input[{number}]", messages)
        continues = given[-1].get("type", "message") in ("message", "reasoning") and (
            given[-1].get("status") in _UNFINISHED
        )
    else:
        raise TokenizeInputError("input: a text or a list of items is wanted, and the list may not be empty")
    reasoning = fields.take(body, "reasoning", dict) or {}
    tools = _tools(body)
    choice = body.get("tool_choice")
    return ChatInput(
        messages=messages,
        tools=tools,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        kwargs=fields.take(body, "chat_template_kwargs", dict) or {},
        reasoning_effort=fields.choice(reasoning, "effort", fields.EFFORTS),
        add_special_tokens=True,
        tool_choice=choice if isinstance(choice, str) else "",
        responses=True,
    )


def _add(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    """Add an item: what belongs to an assistant's turn goes into the message before, where it has room for it."""
    kind = item.get("type", "message")
    before = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind in ("function_call", "custom_tool_call"):
        call = _call(item, kind, where)
        if before is not None:
            before.setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "tool_calls": [call]})
    elif kind == "reasoning":
        _fill(messages, before, "reasoning", _reasoning(item, where))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        identifier = fields.take(item, "call_id", str, f"{where}.")
        messages.append({"role": "tool", "content": item.get("output"), "tool_call_id": identifier})
    elif "role" not in item or kind != "message":
        raise TokenizeInputError(f"{where}: items of type {str(kind)[:40]!r} are not supported")
    elif item["role"] == "assistant" and (text := _first_text(item.get("content"))) is not None:
        _fill(messages, before, "content", text)
    else:
        fields.need(item, "role", str, f"{where}.")
        messages.append(dict(item))


def _fill(messages: list[dict[str, Any]], before: dict[str, Any] | None, field: str, value: str) -> None:
    if before is not None and before.get(field) is None:
        before[field] = value
    else:
        messages.append({"role": "assistant", field: value})


def _first_text(content: Any) -> str | None:
    if isinstance(content, list):
        content = content[0].get("text") if content and isinstance(content[0], Mapping) else None
    return content if isinstance(content, str) else None


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    if item.get("encrypted_content"):
        raise TokenizeInputError(f"{where}.encrypted_content: only the engine that made it can read it")
    for field in ("content", "summary"):
        entries = fields.take(item, field, list, f"{where}.")
        if entries:
            text = fields.need(fields.objects(entries, f"{where}.{field}")[0], "text", str, f"{where}.{field}[0].")
            return str(text)
    return ""


def _call(item: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    name = fields.need(item, "name", str, f"{where}.")
    if kind == "custom_tool_call":
        given = fields.take(item, "input", str, f"{where}.") or ""
        arguments = json.dumps({_CUSTOM_INPUT: given}, ensure_ascii=False)
    else:
        arguments = fields.need(item, "arguments", str, f"{where}.")
        if namespace := fields.take(item, "namespace", str, f"{where}."):
            name = f"{namespace}{_NAMESPACE}{name}"
    function = {"name": name, "arguments": arguments}
    return {"id": fields.need(item, "call_id", str, f"{where}."), "type": "function", "function": function}


def _tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return the functions the model is shown; tools of other types are never rendered."""
    tools = fields.take(body, "tools", list)
    if not tools:
        return None
    found: list[Mapping[str, Any]] = []
    for number, tool in enumerate(fields.objects(tools, "tools")):
        where = f"tools[{number}]."
        if tool.get("type") == "function":
            found.append(_function(tool, where))
        elif tool.get("type") == "namespace":
            name = fields.need(tool, "name", str, where)
            inside = fields.objects(fields.take(tool, "tools", list, where) or [], f"{where}tools")
            prefix = f"{name}{_NAMESPACE}"
            found.extend(_function(inner, where, prefix) for inner in inside if inner.get("type") == "function")
        elif tool.get("type") == "custom":
            found.append(_function({**tool, "parameters": _CUSTOM_PARAMETERS}, where))
    return found


def _function(tool: Mapping[str, Any], where: str, prefix: str = "") -> Mapping[str, Any]:
    function = {
        "name": prefix + fields.need(tool, "name", str, where),
        "description": fields.take(tool, "description", str, where),
        "parameters": fields.take(tool, "parameters", dict, where),
        "strict": fields.take(tool, "strict", bool, where),
        "defer_loading": fields.take(tool, "defer_loading", bool, where),
    }
    return {"type": "function", "function": function}
