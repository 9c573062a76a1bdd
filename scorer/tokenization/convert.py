"""Between the messages of ``tokenization.TokenizationService`` and ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kvatlas.scorer.tokenization.errors import TokenizeInputError
from kvatlas.scorer.tokenization.records import ChatInput
from kvatlas.scorer.v1 import tokenization_pb2 as pb


def value_of(value: pb.Value) -> Any:
    """Return a protobuf value as Python's; whole numbers become integers, as the caller's JSON had them."""
    kind = value.WhichOneof("value")
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    if kind == "list_value":
        return [value_of(item) for item in value.list_value.values]
    if kind == "struct_value":
        return fields_of(value.struct_value.fields)
    return getattr(value, kind) if kind else None


def fields_of(fields: Mapping[str, pb.Value]) -> dict[str, Any]:
    """Return a map of values; protobuf maps have no order, so keys come sorted, to give the same text every time."""
    return {key: value_of(fields[key]) for key in sorted(fields)}


def to_value(value: Any) -> pb.Value:
    """Return a JSON value as protobuf's."""
    if isinstance(value, bool):
        return pb.Value(bool_value=value)
    if isinstance(value, int | float):
        return pb.Value(number_value=value)
    if isinstance(value, str):
        return pb.Value(string_value=value)
    if isinstance(value, Mapping):
        return pb.Value(struct_value=pb.StructValue(fields={str(key): to_value(item) for key, item in value.items()}))
    if isinstance(value, Iterable):
        return pb.Value(list_value=pb.ListValue(values=[to_value(item) for item in value]))
    return pb.Value()


def message_of(message: pb.ChatMessage) -> dict[str, Any]:
    """Return one chat message as the OpenAI API has it."""
    found: dict[str, Any] = {"role": message.role, "content": None}
    if message.content_parts:
        found["content"] = [_part_of(part) for part in message.content_parts]
    elif message.HasField("content"):
        found["content"] = message.content
    if message.HasField("tool_calls_json"):
        found["tool_calls"] = parse_json("tool_calls_json", message.tool_calls_json, list)
    return found


def to_message(message: Mapping[str, Any]) -> pb.ChatMessage:
    """Return a chat message as protobuf's.

    Raises:
        TokenizeInputError: it has something that the other service's message cannot hold.
    """
    content = message.get("content")
    found = pb.ChatMessage(role=str(message.get("role", "")))
    if isinstance(content, str):
        found.content = content
    elif content is not None:
        found.content_parts.extend(_to_part(part) for part in content)
    if message.get("tool_calls"):
        found.tool_calls_json = json.dumps(message["tool_calls"], ensure_ascii=False)
    return found


def chat_of_template_request(request: pb.ChatTemplateRequest) -> ChatInput:
    """Return the chat of a RenderChatTemplate call."""
    return ChatInput(
        messages=[message_of(message) for turn in request.conversation_turns for message in turn.messages],
        tools=[fields_of(tool.tool) for tool in request.tools] or None,
        documents=[fields_of(document.document) for document in request.documents] or None,
        chat_template=request.chat_template or None,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        kwargs=fields_of(request.chat_template_kwargs),
    )


def chat_of_completion(request: pb.RenderChatCompletionRequest) -> ChatInput:
    """Return the chat of a RenderChatCompletion call; documents come among the template arguments.

    Raises:
        TokenizeInputError: a field that holds JSON does not, or holds another kind of it.
    """
    kwargs = parse_json("chat_template_kwargs", request.chat_template_kwargs, dict) or {}
    add = request.add_generation_prompt if request.HasField("add_generation_prompt") else None
    return ChatInput(
        messages=[message_of(message) for message in request.messages],
        tools=parse_json("tools_json", request.tools_json, list) or None,
        chat_template=request.chat_template or None,
        add_generation_prompt=not request.continue_final_message if add is None else add,
        continue_final_message=request.continue_final_message,
        kwargs=kwargs,
    )


def parse_json(field: str, text: str, kind: type) -> Any:
    """Return the JSON in a field, None when it is empty.

    Raises:
        TokenizeInputError: it is not JSON of this kind.
    """
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizeInputError(f"{field} is not JSON: {error}") from error
    if value is not None and not isinstance(value, kind):
        raise TokenizeInputError(f"{field} must be a JSON {'array' if kind is list else 'object'}")
    return value


def _part_of(part: pb.ContentPart) -> dict[str, Any]:
    if part.HasField("image_url"):
        return {"type": part.type or "image_url", "image_url": {"url": part.image_url.url}}
    return {"type": part.type or "text", "text": part.text if part.HasField("text") else None}


def _to_part(part: Any) -> pb.ContentPart:
    if isinstance(part, str):
        return pb.ContentPart(type="text", text=part)
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return pb.ContentPart(type=part.get("type", "text"), text=part["text"])
    if isinstance(part, Mapping) and part.get("type") == "image_url":
        url = part.get("image_url")
        text = url.get("url", "") if isinstance(url, Mapping) else str(url or "")
        return pb.ContentPart(type="image_url", image_url=pb.ImageUrl(url=text))
    raise TokenizeInputError("a tokenizer service takes content parts of type text and image_url only")
