"""Requests of ``kvatlas.v1`` turned into prompts: validated once, here, with errors that name the field."""

from __future__ import annotations

import json
import time
from typing import Any, Final, NamedTuple

from kvatlas.bridge.block_key import TOKEN_BYTES
from kvatlas.scorer.engine import Prompt, pack
from kvatlas.scorer.errors import InputError, TooLargeError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import ChatInput, Truncation
from kvatlas.scorer.v1 import scorer_pb2 as pb

_SIDES: Final = ("", "left", "right")


class Input(NamedTuple):
    """A prompt, how long its tokens took in ms, and which tokenizer made them (empty when they were given)."""

    prompt: Prompt
    tokenize_ms: float
    tokenizer: str


async def read(request: pb.ScoreRequest, pool: TokenizerPool, settings: ScorerSettings) -> Input:
    """Turn a request into a prompt.

    Raises:
        InputError: it has no model, none or several forms of input, or a field that cannot be used.
        TooLargeError: it is over a limit.
        ScorerError: from tokenizing; names the model.
    """
    if not request.model:
        raise InputError("model is empty: block keys start from the model's name")
    forms = [
        name
        for name, given in (
            ("tokens", len(request.tokens)),
            ("tokens_packed", len(request.tokens_packed)),
            ("prompt", bool(request.prompt)),
            ("chat", request.HasField("chat")),
        )
        if given
    ]
    if len(forms) > 1:
        raise InputError(f"{' and '.join(forms)} are given; give one form of input")
    if request.truncation_side not in _SIDES:
        raise InputError(f"truncation_side is {request.truncation_side!r}; give left or right")
    began = time.perf_counter()
    packed, tokenizer = await _tokens(request, forms[0] if forms else "", pool, settings)
    spent = (time.perf_counter() - began) * 1000
    prompt = Prompt(
        model=request.model,
        packed=packed,
        lora=request.lora,
        cache_salt=request.cache_salt,
        pods=tuple(request.pods),
        multimodal=tuple((item.identifier, item.offset, item.length) for item in request.multimodal if item.length),
        usable_only=request.usable_only,
    )
    return Input(prompt, spent if tokenizer else 0.0, tokenizer)


async def _tokens(
    request: pb.ScoreRequest, form: str, pool: TokenizerPool, settings: ScorerSettings
) -> tuple[bytes, str]:
    if form == "tokens_packed":
        if len(request.tokens_packed) % TOKEN_BYTES:
            raise InputError(f"tokens_packed has {len(request.tokens_packed)} bytes; expected 4 a token")
        return _cut(request, request.tokens_packed), ""
    if form == "tokens":
        return _cut(request, pack(list(request.tokens))), ""
    truncate = Truncation(request.truncate_tokens, _side(request)) if request.truncate_tokens else None
    if form == "prompt":
        if len(request.prompt) > settings.max_prompt_bytes:
            raise TooLargeError(
                f"prompt of {len(request.prompt)} characters is over max_prompt_bytes, {settings.max_prompt_bytes}"
            )
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        encoded = await pool.encode(request.model, request.prompt, special, truncate)
        return encoded.ids, encoded.backend
    if form == "chat":
        if len(request.chat.messages) > settings.max_messages:
            raise TooLargeError(f"{len(request.chat.messages)} messages are over max_messages, {settings.max_messages}")
        encoded = await pool.encode_chat(request.model, chat_input(request.chat), truncate)
        return encoded.ids, encoded.backend
    return b"", ""


def _side(request: pb.ScoreRequest) -> Any:
    return request.truncation_side or None


def _cut(request: pb.ScoreRequest, packed: bytes) -> bytes:
    size = request.truncate_tokens * TOKEN_BYTES
    if not size or len(packed) <= size:
        return packed
    return packed[-size:] if request.truncation_side == "left" else packed[:size]


def chat_input(chat: pb.Chat) -> ChatInput:
    """Return a chat in the words of the tokenizer pool.

    Raises:
        InputError: a JSON field is no JSON, or not of the kind it must be.
    """
    return ChatInput(
        messages=[_message(number, message) for number, message in enumerate(chat.messages)],
        tools=_json("chat.tools_json", chat.tools_json, list),
        documents=_json("chat.documents_json", chat.documents_json, list),
        chat_template=chat.chat_template or None,
        add_generation_prompt=(
            chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not chat.continue_final_message
        ),
        continue_final_message=chat.continue_final_message,
        kwargs=_json("chat.template_kwargs_json", chat.template_kwargs_json, dict) or {},
    )


def _message(number: int, message: pb.ChatMessage) -> dict[str, Any]:
    where = f"chat.messages[{number}]"
    found: dict[str, Any] = {"role": message.role}
    parts = _json(f"{where}.parts_json", message.parts_json, list)
    calls = _json(f"{where}.tool_calls_json", message.tool_calls_json, list)
    found["content"] = parts if parts is not None else (None if calls and not message.content else message.content)
    if calls is not None:
        found["tool_calls"] = calls
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.name:
        found["name"] = message.name
    return found | (_json(f"{where}.extra_json", message.extra_json, dict) or {})


def _json(where: str, text: str, kind: type) -> Any:
    if not text:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise InputError(f"{where} is a JSON {type(value).__name__}; expected a {kind.__name__}")
    return value
