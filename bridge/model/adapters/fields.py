"""What the engines' formats share: a batch of tagged events, each read by index (array) or by key (map).

Every engine so far sends ``[ts, events, data_parallel_rank or nil]`` in msgpack. An event is either an array whose
first element is the type name, or a map with the key ``"type"``. An adapter gives one :class:`Layout`: the array
position of each field; the map key is the field's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import LimitError, WireError
from kvatlas.bridge.model.block_key import ExtraKey, pack_tokens
from kvatlas.bridge.model.events import (
    KINDS,
    Batch,
    Cleared,
    Event,
    Kind,
    Limits,
    Rejected,
    Removed,
    Stored,
    engine_key,
    tier_of,
)

HashValue = int | bytes
ExtraValue = list[Any] | None


class StoredFields(msgspec.Struct, gc=False, frozen=True):
    """Fields of a BlockStored map; unknown ones are ignored, late ones have defaults."""

    block_hashes: list[HashValue]
    parent_block_hash: HashValue | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[ExtraValue] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class RemovedFields(msgspec.Struct, gc=False, frozen=True):
    """Fields of a BlockRemoved map."""

    block_hashes: list[HashValue]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class StoredArray(StoredFields, gc=False, frozen=True, array_like=True, tag="BlockStored"):
    """BlockStored as an array: the order above is the wire order; extra elements are ignored."""


class RemovedArray(RemovedFields, gc=False, frozen=True, array_like=True, tag="BlockRemoved"):
    """BlockRemoved as an array."""


class ClearedArray(msgspec.Struct, gc=False, frozen=True, array_like=True, tag="AllBlocksCleared"):
    """AllBlocksCleared as an array of one."""


class StoredMap(StoredFields, gc=False, frozen=True, tag="BlockStored"):
    """BlockStored as a map; only maps ever had the fields listed here."""

    lookahead_token_ids: Any = None


class RemovedMap(RemovedFields, gc=False, frozen=True, tag="BlockRemoved"):
    """BlockRemoved as a map."""


class ClearedMap(msgspec.Struct, gc=False, frozen=True, tag="AllBlocksCleared"):
    """AllBlocksCleared as a map with its type alone."""


class _BatchFields(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _Envelope(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: msgspec.Raw
    data_parallel_rank: int | None = None


_batch: Final = msgspec.msgpack.Decoder(_BatchFields)
_envelope: Final = msgspec.msgpack.Decoder(_Envelope)
_array: Final = msgspec.msgpack.Decoder(StoredArray | RemovedArray | ClearedArray)
_map: Final = msgspec.msgpack.Decoder(StoredMap | RemovedMap | ClearedMap)
_MAP_FIRST_BYTES: Final = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])

SplitExtra = Callable[[list[Any], str | None, bool], tuple[str | None, list[ExtraKey]]]


def peek_rank(payload: bytes) -> int | None:
    """Return a batch's data-parallel rank without reading its events; None when it has none or cannot be read."""
    try:
        return _envelope.decode(payload).data_parallel_rank
    except (msgspec.MsgspecError, RecursionError):
        return None


def count_events(payload: bytes) -> int:
    """Return how many events a batch holds, from its first bytes; 0 when they do not say.

    Looks at no event: an array of the timestamp (a double, as every engine sends it) and the array of events.
    """
    if len(payload) < 11 or payload[1] != 0xCB or not 0x90 <= payload[0] <= 0x9F:
        return 0
    first = payload[10]
    if 0x90 <= first <= 0x9F:
        return first & 0x0F
    if first == 0xDC:
        return int.from_bytes(payload[11:13], "big")
    return int.from_bytes(payload[11:15], "big") if first == 0xDD else 0


def decode_batch(payload: bytes, limits: Limits, split_extra: SplitExtra) -> Batch:
    """Decode a message; events that cannot be used come back as ``rejected``, each alone.

    Raises:
        LimitError: the message is over ``message_bytes`` or ``events_per_batch``.
        WireError: the message is not a batch at all.
    """
    if len(payload) > limits.message_bytes:
        raise LimitError(f"message of {len(payload)} bytes is over the limit of {limits.message_bytes} bytes")
    try:
        fields = _batch.decode(payload)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError(f"not an event batch [ts, events, rank]: {error}") from error
    if len(fields.events) > limits.events_per_batch:
        raise LimitError(f"batch of {len(fields.events)} events is over the limit of {limits.events_per_batch}")
    events: list[Event] = []
    rejected: list[Rejected] = []
    for raw in fields.events:
        try:
            events.append(_event(raw, limits, split_extra))
        except (msgspec.MsgspecError, WireError, OverflowError, RecursionError, TypeError) as error:
            rejected.append(Rejected(bytes(raw), f"{type(error).__name__}: {error}"))
    return Batch(fields.ts, events, rejected, fields.data_parallel_rank)


def _event(raw: msgspec.Raw, limits: Limits, split_extra: SplitExtra) -> Event:
    fields = (_map if memoryview(raw)[0] in _MAP_FIRST_BYTES else _array).decode(raw)
    if isinstance(fields, StoredFields):
        return _stored(fields, limits, split_extra)
    if isinstance(fields, RemovedFields):
        return Removed(
            keys=[engine_key(value) for value in _bounded(fields.block_hashes, limits)],
            tier=tier_of(fields.medium, fields.locality),
            group=_group(fields.group_idx, limits),
        )
    return Cleared()


def _stored(fields: StoredFields, limits: Limits, split_extra: SplitExtra) -> Stored:
    size = fields.block_size
    if size < 0:
        raise WireError(f"block_size is {size}; expected 0 or more")
    if len(fields.token_ids) > limits.tokens_per_event:
        raise LimitError(f"event of {len(fields.token_ids)} tokens is over the limit of {limits.tokens_per_event}")
    keys = [engine_key(value) for value in _bounded(fields.block_hashes, limits)]
    lora = fields.lora_name or (f"lora:{fields.lora_id}" if fields.lora_id else None)
    salt, extra = _extra(fields, len(keys), split_extra)
    tokens = pack_tokens(fields.token_ids)
    return Stored(
        keys=keys,
        parent=None if fields.parent_block_hash is None else engine_key(fields.parent_block_hash),
        tokens=tokens,
        block_size_tokens=size,
        tier=tier_of(fields.medium, fields.locality),
        group=_group(fields.group_idx, limits),
        kind=KINDS.get(fields.kv_cache_spec_kind or "full_attention", Kind.FULL),
        window_tokens=max(fields.kv_cache_spec_sliding_window or 0, 0),
        lora=lora,
        cache_salt=salt,
        extra=extra,
        masked=bool(tokens) and len(fields.token_ids) != len(keys) * size,
        lookahead=isinstance(fields, StoredMap) and bool(fields.lookahead_token_ids),
    )


def _extra(fields: StoredFields, blocks: int, split_extra: SplitExtra) -> tuple[str | None, list[list[ExtraKey]]]:
    if not fields.extra_keys or not any(fields.extra_keys):
        return None, []
    if len(fields.extra_keys) != blocks:
        raise WireError(f"extra_keys has {len(fields.extra_keys)} entries for {blocks} block hashes")
    salt: str | None = None
    extra: list[list[ExtraKey]] = []
    for number, values in enumerate(fields.extra_keys):
        first = number == 0 and fields.parent_block_hash is None
        found, typed = split_extra(values or [], fields.lora_name, first)
        salt = found or salt
        extra.append(typed)
    return salt, extra if any(extra) else []


def _bounded(values: list[HashValue], limits: Limits) -> list[HashValue]:
    if len(values) > limits.keys_per_event:
        raise LimitError(f"event of {len(values)} block hashes is over the limit of {limits.keys_per_event}")
    return values


def _group(value: int | None, limits: Limits) -> int:
    group = value or 0
    if not 0 <= group <= limits.group_max:
        raise WireError(f"group_idx is {group}; expected 0 to {limits.group_max}")
    return group


def encode_batch(timestamp: float, events: list[Mapping[str, Any]], dp_rank: int | None) -> bytes:
    """Encode a batch in the newest vLLM layout: an array of ``[ts, events as maps, rank]``."""
    return _encoder.encode((timestamp, events, dp_rank))


_encoder: Final = msgspec.msgpack.Encoder()
