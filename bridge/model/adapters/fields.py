"""What the engines' formats share: a batch of tagged events, each read by index (array) or by key (map).

Every engine so far sends ``[ts, events, data_parallel_rank or nil]`` in msgpack, or the same three as a map. An event
is either an array whose first element is the type name, or a map with the key ``"type"``. An adapter gives one
:class:`Format`: the structs of its events and how it names blocks beyond their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS, LimitError, WireError
from kvatlas.bridge.model.block_key import ExtraKey, pack_tokens, pack_wide_tokens, wide_extra
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
    Tier,
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

    @property
    def more(self) -> bool:
        """Tell whether fields that only newer events have say something."""
        return False


class RemovedFields(msgspec.Struct, gc=False, frozen=True):
    """Fields of a BlockRemoved map."""

    block_hashes: list[HashValue]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class RemovedArray(RemovedFields, gc=False, frozen=True, array_like=True, tag="BlockRemoved"):
    """BlockRemoved as an array."""


class ClearedArray(msgspec.Struct, gc=False, frozen=True, array_like=True, tag="AllBlocksCleared"):
    """AllBlocksCleared as an array of one."""


class RemovedMap(RemovedFields, gc=False, frozen=True, tag="BlockRemoved"):
    """BlockRemoved as a map; only maps ever had the fields listed here."""

    ownership: str | None = None
    remaining_copy_counts: list[int | None] | None = None


class ClearedMap(msgspec.Struct, gc=False, frozen=True, tag="AllBlocksCleared"):
    """AllBlocksCleared as a map with its type alone."""


#: What names an event's blocks beyond their tokens: adapter name (None for the base model), cache salt as far as the
#: event says it, and typed extra keys per block, or empty.
Named = tuple[str | None, str | None, list[list[ExtraKey]]]


class Format(NamedTuple):
    """One engine's events.

    Attributes:
        array, map: decoders of an event in the two layouts.
        names: what names a stored event's blocks beyond their tokens.
        finish: adds what only this engine's offload events and newer fields say; None where there is nothing.
    """

    array: msgspec.msgpack.Decoder[Any]
    map: msgspec.msgpack.Decoder[Any]
    names: Callable[[Any], Named]
    finish: Callable[[Any, Stored, Limits], Stored] | None = None


class _BatchArray(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _BatchMap(msgspec.Struct, gc=False, frozen=True):
    ts: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _EnvelopeArray(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: msgspec.Raw
    data_parallel_rank: int | None = None


class _EnvelopeMap(msgspec.Struct, gc=False, frozen=True):
    ts: float
    events: msgspec.Raw
    data_parallel_rank: int | None = None


_batch_array: Final = msgspec.msgpack.Decoder(_BatchArray)
_batch_map: Final = msgspec.msgpack.Decoder(_BatchMap)
_envelope_array: Final = msgspec.msgpack.Decoder(_EnvelopeArray)
_envelope_map: Final = msgspec.msgpack.Decoder(_EnvelopeMap)
#: Messages above this are counted before their events are taken apart.
_COUNT_FIRST_BYTES: Final = 65_536
_MAP_FIRST_BYTES: Final = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])


def peek_rank(payload: bytes) -> int | None:
    """Return a batch's data-parallel rank without reading its events; None when it has none or cannot be read."""
    decoder = _envelope_map if payload[:1] and payload[0] in _MAP_FIRST_BYTES else _envelope_array
    try:
        return decoder.decode(payload).data_parallel_rank
    except DECODE_ERRORS:
        return None


def count_events(payload: bytes) -> int:
    """Return how many events a batch holds, from its first bytes; 0 when they do not say.

    Looks at no event: an array of the timestamp (a double, as every engine sends it) and the array of events.
    """
    if len(payload) < 11 or payload[1] != 0xCB or not 0x90 <= payload[0] <= 0x9F:
        return 0
    return array_length(payload[10:15])


def array_length(head: bytes) -> int:
    """Return the length of a msgpack array from its first five bytes; 0 for what is none."""
    if 0x90 <= head[0] <= 0x9F:
        return head[0] & 0x0F
    if head[0] == 0xDC:
        return int.from_bytes(head[1:3], "big")
    return int.from_bytes(head[1:5], "big") if head[0] == 0xDD else 0


def decode_batch(payload: bytes, limits: Limits, wire: Format) -> Batch:
    """Decode a message; events that cannot be used come back as ``rejected``, each alone.

    Raises:
        LimitError: the message is over ``message_bytes``, ``events_per_batch`` or ``keys_per_batch``.
        WireError: the message is not a batch at all.
    """
    if len(payload) > limits.message_bytes:
        raise LimitError(f"message of {len(payload)} bytes is over the limit of {limits.message_bytes} bytes")
    as_map = bool(payload) and payload[0] in _MAP_FIRST_BYTES
    try:
        if len(payload) > _COUNT_FIRST_BYTES:  # a list of millions would be made before it could be counted
            envelope = (_envelope_map if as_map else _envelope_array).decode(payload)
            _check_events(array_length(bytes(memoryview(envelope.events)[:5])), limits)
        fields = (_batch_map if as_map else _batch_array).decode(payload)
    except DECODE_ERRORS as error:
        raise WireError(f"not an event batch [ts, events, rank]: {error}") from error
    _check_events(len(fields.events), limits)
    events: list[Event] = []
    rejected: list[Rejected] = []
    keys = 0
    for raw in fields.events:
        try:
            event = _event(raw, limits, wire)
        except (*DECODE_ERRORS, WireError, OverflowError, TypeError) as error:
            rejected.append(Rejected(bytes(raw), f"{type(error).__name__}: {error}"))
            continue
        events.append(event)
        if not isinstance(event, Cleared):
            keys += len(event.keys)
            if keys > limits.keys_per_batch:
                raise LimitError(f"batch of {keys} or more block hashes is over the limit of {limits.keys_per_batch}")
    return Batch(fields.ts, events, rejected, fields.data_parallel_rank)


def _check_events(count: int, limits: Limits) -> None:
    if count > limits.events_per_batch:
        raise LimitError(f"batch of {count} events is over the limit of {limits.events_per_batch}")


def _event(raw: msgspec.Raw, limits: Limits, wire: Format) -> Event:
    fields = (wire.map if memoryview(raw)[0] in _MAP_FIRST_BYTES else wire.array).decode(raw)
    if isinstance(fields, StoredFields):
        return _stored(fields, limits, wire)
    if isinstance(fields, RemovedFields):
        return _removed(fields, limits)
    return Cleared()


def _removed(fields: RemovedFields, limits: Limits) -> Removed:
    keys = [engine_key(value) for value in _bounded(fields.block_hashes, limits)]
    tier, group = tier_of(fields.medium, fields.locality), _group(fields.group_idx, limits)
    if not isinstance(fields, RemovedMap) or not (fields.ownership or fields.remaining_copy_counts):
        return Removed(keys=keys, tier=tier, group=group)
    remaining = fields.remaining_copy_counts or []
    if len(remaining) != len(keys) or any(count is not None and count < 0 for count in remaining):
        remaining = []  # counts that fit no block say nothing; the removal itself still does
    return Removed(keys=keys, tier=tier, group=group, ownership=fields.ownership or "", remaining=remaining)


def _stored(fields: StoredFields, limits: Limits, wire: Format) -> Stored:
    size, token_ids = fields.block_size, fields.token_ids
    if size < 0:
        raise WireError(f"block_size is {size}; expected 0 or more")
    if len(token_ids) > limits.tokens_per_event:
        raise LimitError(f"event of {len(token_ids)} tokens is over the limit of {limits.tokens_per_event}")
    keys = [engine_key(value) for value in _bounded(fields.block_hashes, limits)]
    lora, salt, extra = wire.names(fields)
    ahead = b""
    try:
        tokens = pack_tokens(token_ids)
    except (OverflowError, TypeError):
        tokens, ahead, wide = _pack(token_ids)
        if wide and size:
            more = wide_extra(wide, size, len(keys))
            extra = [[*one, *other] for one, other in zip(extra, more, strict=True)] if extra else more
    kind, tier = fields.kv_cache_spec_kind, tier_of(fields.medium, fields.locality)
    stored = Stored(
        keys=keys,
        parent=None if fields.parent_block_hash is None else engine_key(fields.parent_block_hash),
        tokens=tokens,
        block_size_tokens=size,
        tier=tier,
        group=_group(fields.group_idx, limits),
        kind=None if kind is None else KINDS.get(kind, Kind.FULL),
        window_tokens=max(fields.kv_cache_spec_sliding_window or 0, 0),
        lora=lora,
        cache_salt=salt,
        extra=extra,
        masked=bool(tokens) and len(token_ids) != len(keys) * size,
    )
    if ahead:
        stored = msgspec.structs.replace(stored, ahead=ahead)
    finish = wire.finish
    return stored if finish is None or (tier is Tier.GPU and not fields.more) else finish(fields, stored, limits)


def _pack(token_ids: Sequence[Any]) -> tuple[bytes, bytes, dict[int, int]]:
    """Return an event's tokens: packed, the token behind them where they are pairs, and those above 32 bits."""
    ahead = b""
    if isinstance(token_ids[0], list):
        token_ids, behind = _unpair(token_ids)
        ahead = pack_wide_tokens([behind])[0]
    packed, wide = pack_wide_tokens(token_ids)
    return packed, ahead, wide


def _unpair(pairs: Sequence[Any]) -> tuple[list[int], int]:
    """Return the first tokens of overlapping pairs, and the second token of the last.

    Raises:
        WireError: they are no pairs of tokens, or one does not go on where the one before ended.
    """
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise WireError("token_ids: expected pairs of tokens throughout")
    if any(one[1] != other[0] for one, other in pairwise(pairs)):
        raise WireError("token_ids: pairs of tokens that do not overlap")
    return [pair[0] for pair in pairs], pairs[-1][1]


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
