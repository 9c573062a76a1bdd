"""Chat bodies of the OpenAI API, checked as vLLM checks them (``/v1/chat/completions``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvatlas.scorer.tokenization import body_fields as fields
from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import ChatInput

#: Part type -> the field with its text; the types that carry text in requests.
_TEXT_PARTS: Final = {"text": "text", "refusal": "refusal", "thinking": "thinking"}
_MEDIA_PARTS: Final = frozenset(
    {
        "image_url",
        "image_embeds",
        "image_pil",
        "input_audio",
        "audio_url",
        "audio_embeds",
        "video_url",
        "video_embeds",
        "file",
    }
)


def chat_of(body: Mapping[str, Any]) -> ChatInput:
    """Return the chat of a body.

    Raises:
        TokenizeInputError: vLLM refuses it as well; names the field.
    """
    messages = [checked_message(message, number) for number, message in enumerate(messages_of(body))]
    tools = _tools(body)
    continues = bool(fields.take(body, "continue_final_message", bool))
    add = fields.take(body, "add_generation_prompt", bool)
    documents = fields.take(body, "documents", list)
    return ChatInput(
        messages=messages,
        tools=tools,
        documents=None if documents is None else fields.objects(documents, "documents"),
        chat_template=fields.take(body, "chat_template", str),
        add_generation_prompt=True if add is None else add,
        continue_final_message=continues,
        kwargs=fields.take(body, "chat_template_kwargs", dict) or {},
        reasoning_effort=fields.choice(body, "reasoning_effort", fields.EFFORTS),
        add_special_tokens=bool(fields.take(body, "add_special_tokens", bool)),
        tool_choice=_tool_choice(body, tools),
    )


def messages_of(body: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return a body's messages, of which there is at least one.

    Raises:
        TokenizeInputError: there is none, or one is no object with a role.
    """
    messages = fields.objects(fields.need(body, "messages", list), "messages")
    if not messages:
        raise TokenizeInputError("messages: must not be empty")
    for number, message in enumerate(messages):
        fields.need(message, "role", str, f"messages[{number}].")
    return messages


def checked_message(message: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """Return a message in which every field that a template may read is of the right kind.

    Raises:
        TokenizeInputError: one is not.
    """
    where = f"messages[{number}]."
    role = message["role"]
    _check_content(message, role, where)
    for field in ("name", "tool_call_id", "reasoning", "reasoning_content", "task"):
        fields.take(message, field, str, where)
    if role == "assistant":
        calls = fields.take(message, "tool_calls", list, where) or []
        for place, call in enumerate(fields.objects(calls, f"{where}tool_calls")):
            _check_call(call, f"{where}tool_calls[{place}].")
    return message


def _check_content(message: Mapping[str, Any], role: str, where: str) -> None:
    content = message.get("content")
    if content is None:
        if "content" in message and role != "assistant":
            raise TokenizeInputError(f"{where}content: null is for assistant messages")
        return
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise TokenizeInputError(f"{where}content: must be text or an array of parts, not {fields.shown(content)}")
    for place, part in enumerate(fields.objects(content, f"{where}content")):
        kind = part.get("type") or next((name for name in sorted(_MEDIA_PARTS) if name in part), None)
        if kind in _TEXT_PARTS:
            fields.need(part, _TEXT_PARTS[kind], str, f"{where}content[{place}].")
        elif kind not in _MEDIA_PARTS and kind != "tool_reference":
            raise TokenizeInputError(f"{where}content[{place}]: parts of type {str(kind)[:40]!r} are not known")


def _check_call(call: Mapping[str, Any], where: str) -> None:
    fields.need(call, "id", str, where)
    if (kind := fields.need(call, "type", str, where)) != "function":
        raise TokenizeInputError(f"{where}type: only calls of type function are supported, not {kind[:40]!r}")
    function = fields.need(call, "function", dict, where)
    fields.need(function, "name", str, f"{where}function.")
    fields.need(function, "arguments", str, f"{where}function.")


def _tools(body: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    tools = fields.take(body, "tools", list)
    if tools is None:
        return None
    if not tools:
        raise TokenizeInputError("tools: must not be an empty array; leave it out for no tools")
    for number, tool in enumerate(fields.objects(tools, "tools")):
        where = f"tools[{number}]."
        if (kind := fields.take(tool, "type", str, where)) not in (None, "function"):
            raise TokenizeInputError(f"{where}type: must be function, not {kind[:40]!r}")
        function = fields.need(tool, "function", dict, where)
        fields.need(function, "name", str, f"{where}function.")
        fields.take(function, "description", str, f"{where}function.")
        fields.take(function, "parameters", dict, f"{where}function.")
    found: Sequence[Mapping[str, Any]] = tools
    return found


def _tool_choice(body: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Return ``none``, ``auto``, ``required``, ``named``, or nothing where the request leaves it open."""
    if "tool_choice" not in body:
        return "auto" if tools else ""
    choice = body["tool_choice"]
    if choice is None or choice == "none":
        return choice or ""
    if tools is None:
        raise TokenizeInputError("tool_choice: needs tools")
    if choice in ("auto", "required"):
        return str(choice)
    if not isinstance(choice, Mapping):
        raise TokenizeInputError("tool_choice: must be none, auto, required or an object that names a function")
    named = fields.need(fields.need(choice, "function", dict, "tool_choice."), "name", str, "tool_choice.function.")
    if all(tool["function"]["name"] != named for tool in tools):
        raise TokenizeInputError(f"tool_choice: there is no tool {named[:40]!r}")
    return "named"
