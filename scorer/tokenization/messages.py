"""Chat messages of the OpenAI API as vLLM hands them to chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvatlas.scorer.tokenization.content_format import Format
from kvatlas.scorer.tokenization.errors import TokenizeInputError

#: Part type -> the field that holds its text.
_TEXT_FIELDS: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_MODALITIES: Final = {
    "image_url": "image",
    "input_image": "image",
    "image_embeds": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "audio_embeds": "audio",
    "video_url": "video",
    "video_embeds": "video",
}
#: Fields of parts with a meaning of their own; any other is for the template.
_KNOWN_FIELDS: Final = frozenset(
    {"type", "uuid", "closed", "detail", "file", "image_pil", "name", *_TEXT_FIELDS.values(), *_MODALITIES}
)
#: Changes with every request of one client, which would make all prompts different; vLLM leaves it out too.
BILLING_LINE: Final = "x-anthropic-billing-header"


def prepare(messages: Sequence[Mapping[str, Any]], form: Format) -> list[dict[str, Any]]:
    """Return messages as templates get them: content in one form, tool call arguments as objects.

    Fields that are not part of the chat API are left out, as vLLM does.

    Raises:
        TokenizeInputError: a message has no role, or content or tool calls of a kind no template can get.
    """
    return [_message(number, message, form) for number, message in enumerate(messages)]


def developer_as_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a template that knows no ``developer``: such messages become part of one system message."""
    if all(message["role"] != "developer" for message in messages):
        return messages
    renamed = []
    for message in messages:
        if message["role"] == "developer":
            renamed.append({**{key: value for key, value in message.items() if key != "tools"}, "role": "system"})
        else:
            renamed.append(message)
    systems = [number for number, message in enumerate(renamed) if message["role"] == "system"]
    if systems == [0]:
        return renamed
    texts = [_plain(renamed[number].get("content") or "") for number in systems]
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in renamed if message["role"] != "system")]


def is_media(part: Any) -> bool:
    """Whether a content part is a picture, sound or video."""
    if not isinstance(part, Mapping):
        return False
    kind = part.get("type")
    return kind in _MODALITIES or (not kind and any(name in part for name in _MODALITIES))


def systems_in_front(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the text of all system messages in the first one, joined without a separator."""
    texts = [_plain(message["content"]) for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "".join(texts)}, *others]


def normal_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools as vLLM hands them to templates: known fields in its order, defaults filled in, others left out.

    Raises:
        TokenizeInputError: a tool is no function.
    """
    return [_tool(f"tools[{number}]", tool) for number, tool in enumerate(tools)]


def _tool(where: str, tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") not in (None, "function"):
        raise TokenizeInputError(f"{where} must be an object of type function, with a function")
    deferred = tool.get("defer_loading")
    inner: dict[str, Any] = {name: function.get(name) for name in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        inner["strict"] = function["strict"]
    loading = function.get("defer_loading")
    if loading is not None or deferred is not None:
        inner["defer_loading"] = deferred if loading is None else loading
    found: dict[str, Any] = {"type": "function", "function": inner}
    if deferred is not None:
        found["defer_loading"] = deferred
    return found


def _message(number: int, message: Mapping[str, Any], form: Format) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise TokenizeInputError(f"messages[{number}]: role must be text")
    where = f"messages[{number}].content"
    found: dict[str, Any] = {"role": role, "content": _content(where, role, message.get("content"), form)}
    if role == "assistant":
        _add_assistant(number, message, found)
    elif role == "tool":
        if "tool_call_id" in message:
            found["tool_call_id"] = message["tool_call_id"]
        if isinstance(found["content"], list) and all(part.get("type") == "text" for part in found["content"]):
            found["content"] = _plain(found["content"])
    for field in ("name", "task"):
        if isinstance(message.get(field), str):
            found[field] = message[field]
    if role == "developer":
        found["tools"] = message.get("tools")
    return found


def _content(where: str, role: str, content: Any, form: Format) -> str | list[Any]:
    if content is None:
        parts: Sequence[Any] = []
    elif isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, Sequence):
        parts = content
    else:
        raise TokenizeInputError(f"{where} must be text, a list of parts or null, not {type(content).__name__}")
    if role == "system":
        parts = _without_billing(parts)
    prepared = [ready for n, part in enumerate(parts) if (ready := _part(f"{where}[{n}]", part, form)) is not None]
    # In a text, parts without any vanish together with their line.
    return prepared if form == "openai" else "\n".join(text for text in prepared if text)


def _part(where: str, part: Any, form: Format) -> Any:
    """Return a part as an object (``openai``) or as text; None leaves it out."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise TokenizeInputError(f"{where} must be an object or text, not {type(part).__name__}")
    kind = part.get("type") or next((name for name in _MODALITIES if name in part), None)
    extra = {key: value for key, value in part.items() if key not in _KNOWN_FIELDS}
    if kind in _TEXT_FIELDS:
        text = part.get(_TEXT_FIELDS[kind])
        if text is None:
            return None
        if not isinstance(text, str):
            raise TokenizeInputError(f"{where}.{_TEXT_FIELDS[kind]} must be text, not {type(text).__name__}")
        return {"type": "text", "text": text, **extra} if form == "openai" else text
    if kind == "tool_reference":
        name = str(part.get("name", ""))
        return {"type": kind, "name": name} if form == "openai" else name
    if kind not in _MODALITIES:
        raise TokenizeInputError(f"{where}: content parts of type {kind!r} are not known")
    if form == "openai":
        return {"type": _MODALITIES[kind], **extra}
    raise TokenizeInputError(
        f"{where}: this model's template takes text only, and which text stands for {_MODALITIES[kind]} is known to "
        f"the engine alone; send token ids with the items' places instead"
    )


def _add_assistant(number: int, message: Mapping[str, Any], found: dict[str, Any]) -> None:
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise TokenizeInputError(f"messages[{number}].tool_calls must be a list")
        found["tool_calls"] = [_tool_call(f"messages[{number}].tool_calls[{n}]", call) for n, call in enumerate(calls)]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        found["reasoning"] = found["reasoning_content"] = reasoning


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise TokenizeInputError(f"{where} must be an object of type function, with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            # Part of the history: refusing it would refuse every later turn too, and the engine does not.
            arguments = {}
    if not isinstance(arguments, Mapping):
        arguments = {}
    inner = {"arguments": dict(arguments), **_first(function, "name"), **_rest(function, "arguments", "name")}
    return {
        **_first(call, "id"),
        "function": inner,
        "type": "function",
        **_rest(call, "id", "function", "type"),
    }


def _first(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: fields[name]} if name in fields else {}


def _rest(fields: Mapping[str, Any], *known: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in known}


def _without_billing(parts: Sequence[Any]) -> list[Any]:
    kept = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not (isinstance(text, str) and text.startswith(BILLING_LINE)):
            kept.append(part)
        elif rest := text.partition("\n")[2]:
            kept.append(rest if isinstance(part, str) else {**part, "text": rest})
    return kept


def _plain(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))
