"""From a request to a query: the form of input, its limits, tokens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Final

from kvatlas.bridge.model.block_key import TOKEN_BYTES, pack_tokens, pack_wide_tokens
from kvatlas.scorer.api.bounds import MAX_MESSAGES
from kvatlas.scorer.errors import DeadlineError, InputError, TooLargeError, UnknownModelError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.query import PromptTokens, ScoreQuery
from kvatlas.scorer.tokenization.body_fields import EFFORTS
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import ChatInput, Truncation
from kvatlas.scorer.v1 import scorer_pb2 as pb

_SIDES: Final = {"": None, "left": "left", "right": "right"}


def _given(tokens: Any) -> PromptTokens:
    """Return token ids as they were given; those above 32 bits are kept beside the packed ones."""
    try:
        return PromptTokens(pack_tokens(tokens))
    except OverflowError:
        packed, wide = pack_wide_tokens(tokens)
        return PromptTokens(packed, wide=wide)


async def tokens_of(
    request: pb.ScoreRequest, settings: ScorerSettings, pool: TokenizerPool | None, deadline: float
) -> PromptTokens:
    """Return a request's token ids; ``deadline`` in monotonic seconds.

    Raises:
        DeadlineError: text was not tokenized in time.
        InputError: there is not exactly one form of input, or it makes no sense.
        TooLargeError: it is past a limit.
        UnknownModelError: text was given and there is no tokenizer for the model.
    """
    forms = [
        name
        for name, given in (
            ("tokens", bool(request.tokens)),
            ("tokens_packed", bool(request.tokens_packed)),
            ("prompt", bool(request.prompt)),
            ("chat", request.HasField("chat")),
        )
        if given
    ]
    if len(forms) > 1:
        raise InputError(f"give one form of input, not {' and '.join(forms)}")
    if request.truncate_tokens and request.multimodal:
        raise InputError("truncate_tokens: not together with multimodal, whose places are those of the whole prompt")
    if not request.model:
        raise InputError("model: missing; block keys differ by model")
    if not forms:
        return PromptTokens(b"")
    if request.tokens:
        found = _given(request.tokens)
    elif request.tokens_packed:
        if len(request.tokens_packed) % TOKEN_BYTES:
            raise InputError(f"tokens_packed: {len(request.tokens_packed)} bytes are no multiple of {TOKEN_BYTES}")
        found = PromptTokens(request.tokens_packed)
    else:
        found = await _tokenized(request, settings, pool, deadline)
    if found.wide and request.truncate_tokens:
        raise InputError("truncate_tokens: not together with token ids above 32 bits, which stand for pictures")
    if forms[0].startswith("tokens") and request.truncate_tokens:
        found = PromptTokens(_truncated(found.packed, request))
    check_length(found, settings)
    return found


def check_length(prompt: PromptTokens, settings: ScorerSettings) -> None:
    """Refuse a prompt of more than ``max_tokens``.

    Raises:
        TooLargeError: it is one.
    """
    if prompt.tokens > settings.max_tokens:
        raise TooLargeError(f"{prompt.tokens} tokens; at most {settings.max_tokens} (max_tokens)")


def _truncated(packed: bytes, request: pb.ScoreRequest) -> bytes:
    keep = request.truncate_tokens * TOKEN_BYTES
    if request.truncation_side == "left":
        return packed[-keep:]
    if request.truncation_side not in _SIDES:
        raise InputError(f"truncation_side: {request.truncation_side!r} is neither left nor right")
    return packed[:keep]


async def _tokenized(
    request: pb.ScoreRequest, settings: ScorerSettings, pool: TokenizerPool | None, deadline: float
) -> PromptTokens:
    if pool is None:
        raise UnknownModelError(f"no tokenizer for {request.model!r} here: this scorer takes token ids only")
    if request.truncation_side not in _SIDES:
        raise InputError(f"truncation_side: {request.truncation_side!r} is neither left nor right")
    truncate = None
    if request.truncate_tokens:
        truncate = Truncation(request.truncate_tokens, _SIDES[request.truncation_side])
    if request.HasField("chat"):
        chat = chat_input(request.chat, settings)
        encoding = pool.encode_chat(request.model, chat, truncate=truncate)
    else:
        # Four bytes a character at most, so most prompts need no encoding to know.
        limit = settings.max_prompt_bytes
        if len(request.prompt) * 4 > limit and len(request.prompt.encode()) > limit:
            raise TooLargeError(f"prompt: at most {settings.max_prompt_bytes} bytes (max_prompt_bytes)")
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        encoding = pool.encode(request.model, request.prompt, add_special_tokens=special, truncate=truncate)
    try:
        async with asyncio.timeout(deadline - time.monotonic()) as waiting:
            encoded = await encoding
    except TimeoutError as error:
        if not waiting.expired():
            raise
        # What was begun goes on, so that a model that takes long to load is there for who asks again.
        raise DeadlineError(
            f"the text was not tokenized in time; is the tokenizer of {request.model!r} loading?"
        ) from error
    return PromptTokens(encoded.ids, encoded.backend or "local")


def chat_input(chat: pb.Chat, settings: ScorerSettings) -> ChatInput:
    """Return a chat as tokenization takes it.

    Raises:
        InputError: a JSON field is not what it says.
        TooLargeError: more messages or text than the limits allow.
    """
    if len(chat.messages) > MAX_MESSAGES:
        raise TooLargeError(f"chat: {len(chat.messages)} messages; at most {MAX_MESSAGES}")
    if chat.ByteSize() > settings.max_prompt_bytes:
        raise TooLargeError(f"chat: {chat.ByteSize()} bytes; at most {settings.max_prompt_bytes} (max_prompt_bytes)")
    return ChatInput(
        messages=[_message(message, number) for number, message in enumerate(chat.messages)],
        tools=_json(chat.tools_json, "tools_json", list),
        documents=_json(chat.documents_json, "documents_json", list),
        chat_template=chat.chat_template or None,
        add_generation_prompt=chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True,
        continue_final_message=chat.continue_final_message,
        kwargs=_json(chat.template_kwargs_json, "template_kwargs_json", dict) or {},
        reasoning_effort=_effort(chat.reasoning_effort),
        add_special_tokens=chat.add_special_tokens,
        tool_choice=chat.tool_choice,
    )


def _effort(effort: str) -> str | None:
    if effort and effort not in EFFORTS:
        raise InputError(f"chat.reasoning_effort: {effort[:40]!r} is none of {', '.join(sorted(EFFORTS))}")
    return effort or None


def _message(message: pb.ChatMessage, number: int) -> Mapping[str, Any]:
    where = f"chat.messages[{number}]"
    fields: dict[str, Any] = {"role": message.role}
    parts = _json(message.parts_json, f"{where}.parts_json", list)
    fields["content"] = message.content if parts is None else parts
    calls = _json(message.tool_calls_json, f"{where}.tool_calls_json", list)
    if calls is not None:
        fields["tool_calls"] = calls
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.name:
        fields["name"] = message.name
    return fields | (_json(message.extra_json, f"{where}.extra_json", dict) or {})


def _json(text: str, where: str, kind: type) -> Any:
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise InputError(f"{where}: not a JSON {'array' if kind is list else 'object'}")
    return value


def query_of(request: pb.ScoreRequest, prompt: PromptTokens, seconds: float) -> ScoreQuery:
    """Return what a request asks, with its tokens and the time that they took."""
    items = request.multimodal
    return ScoreQuery(
        model=request.model,
        prompt=prompt._replace(seconds=seconds),
        lora=request.lora,
        cache_salt=request.cache_salt,
        items=[(item.identifier, item.offset, item.length) for item in items] if items else (),
        pods=frozenset(request.pods),
        strategy=request.strategy,
        usable_only=request.usable_only,
    )
