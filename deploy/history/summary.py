"""What a record says, cheaply: enough to print and filter it, without turning tokens into numbers.

Token ids are most of a message's bytes. Here they are skipped as raw bytes and only counted, which makes reading a log
several times faster than applying it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from kvatlas.bridge import records
from kvatlas.bridge.errors import WireError
from kvatlas.bridge.events import engine_key, tier_of
from kvatlas.deploy.history.log import Record

HashValue = int | bytes


class _Stored(msgspec.Struct, gc=False, frozen=True):
    block_hashes: list[HashValue]
    parent_block_hash: HashValue | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = msgspec.Raw(b"\xc0")
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _Removed(msgspec.Struct, gc=False, frozen=True):
    block_hashes: list[HashValue]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _StoredArray(_Stored, gc=False, frozen=True, array_like=True, tag="BlockStored"):
    pass


class _RemovedArray(_Removed, gc=False, frozen=True, array_like=True, tag="BlockRemoved"):
    pass


class _ClearedArray(msgspec.Struct, gc=False, frozen=True, array_like=True, tag="AllBlocksCleared"):
    pass


class _StoredMap(_Stored, gc=False, frozen=True, tag="BlockStored"):
    pass


class _RemovedMap(_Removed, gc=False, frozen=True, tag="BlockRemoved"):
    pass


class _ClearedMap(msgspec.Struct, gc=False, frozen=True, tag="AllBlocksCleared"):
    pass


class _MapBatch(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: list[_StoredMap | _RemovedMap | _ClearedMap]
    data_parallel_rank: int | None = None


class _ArrayBatch(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: list[_StoredArray | _RemovedArray | _ClearedArray]
    data_parallel_rank: int | None = None


_map_batch: Final = msgspec.msgpack.Decoder(_MapBatch)
_array_batch: Final = msgspec.msgpack.Decoder(_ArrayBatch)

STORED: Final = "stored"
REMOVED: Final = "removed"
CLEARED: Final = "cleared"
UNREADABLE: Final = "unreadable"
TYPES: Final = (STORED, REMOVED, CLEARED, "control", "keys", UNREADABLE)


class EventLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event as ``kvatlas replay`` shows it.

    Attributes:
        type: one of :data:`TYPES`.
        blocks: engine keys it names.
        tokens: token ids it carries.
        first, last: first and last engine key, hex.
        parent: engine key before the first, hex.
        detail: what else there is to say.
    """

    type: str
    blocks: int = 0
    tokens: int = 0
    block_size_tokens: int = 0
    tier: str = ""
    group: int = 0
    lora: str = ""
    first: str = ""
    last: str = ""
    parent: str = ""
    detail: str = ""


class MessageLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One ``kv-events`` record as ``kvatlas replay`` shows it."""

    partition: int
    offset: int
    timestamp_ms: int
    pod: str
    sequence: int = -1
    incarnation: int = -1
    source: str = ""
    model: str = ""
    engine_time: float = 0.0
    events: list[EventLine] = []


def message_line(record: Record) -> MessageLine:
    """Read one ``kv-events`` record; what cannot be read becomes an ``unreadable`` event with the reason."""
    headers = dict(record.headers)
    engine_time, events = _events(headers.get(records.H_CONTENT_TYPE, b""), record.value or b"")
    return MessageLine(
        partition=record.partition,
        offset=record.offset,
        timestamp_ms=record.timestamp_ms,
        pod=(record.key or b"").decode(errors="replace"),
        sequence=_number(headers.get(records.H_SEQUENCE)),
        incarnation=_number(headers.get(records.H_INCARNATION)),
        source=headers.get(records.H_SOURCE, b"").decode(errors="replace"),
        model=headers.get(records.H_MODEL, b"").decode(errors="replace"),
        engine_time=engine_time,
        events=events,
    )


def _events(content: bytes, value: bytes) -> tuple[float, list[EventLine]]:
    try:
        if content == records.CONTENT_CONTROL.encode():
            return 0.0, [_control(records.decode(records.Control, value))]
        if content == records.CONTENT_KEYS.encode():
            keyed = records.decode(records.KeyedBatch, value)
            return keyed.timestamp, list(_keyed(keyed))
        return _engine(value)
    except (msgspec.MsgspecError, WireError, RecursionError) as error:
        return 0.0, [EventLine(type=UNREADABLE, detail=str(error))]


def _engine(value: bytes) -> tuple[float, list[EventLine]]:
    batch: _MapBatch | _ArrayBatch
    try:
        batch = _map_batch.decode(value)
    except msgspec.ValidationError:
        batch = _array_batch.decode(value)
    return batch.ts, [_line(event) for event in batch.events]


def _line(event: _Stored | _Removed | Any) -> EventLine:
    if isinstance(event, _Stored):
        keys = event.block_hashes
        return EventLine(
            type=STORED,
            blocks=len(keys),
            tokens=array_length(event.token_ids),
            block_size_tokens=event.block_size,
            tier=tier_of(event.medium, event.locality).name.lower(),
            group=event.group_idx or 0,
            lora=event.lora_name or "",
            first=_hex(keys[0]) if keys else "",
            last=_hex(keys[-1]) if keys else "",
            parent=_hex(event.parent_block_hash),
        )
    if isinstance(event, _Removed):
        keys = event.block_hashes
        return EventLine(
            type=REMOVED,
            blocks=len(keys),
            tier=tier_of(event.medium, event.locality).name.lower(),
            group=event.group_idx or 0,
            first=_hex(keys[0]) if keys else "",
            last=_hex(keys[-1]) if keys else "",
        )
    return EventLine(type=CLEARED)


def _keyed(batch: records.KeyedBatch) -> Iterator[EventLine]:
    for event in batch.events:
        if isinstance(event, records.KeyedCleared):
            yield EventLine(type=CLEARED, detail="keys")
            continue
        keys = event.engine_keys
        stored = isinstance(event, records.KeyedStored)
        yield EventLine(
            type=STORED if stored else REMOVED,
            blocks=len(keys),
            group=event.group,
            first=keys[0].hex() if keys else "",
            last=keys[-1].hex() if keys else "",
            detail="keys",
        )


def _control(control: records.Control) -> EventLine:
    lost = f" lost {control.first_lost} to {control.last_lost}" if control.type == "gap" else ""
    return EventLine(type="control", detail=f"{control.type}{lost} {control.reason}".strip())


def array_length(raw: msgspec.Raw) -> int:
    """Return the number of elements of an encoded msgpack array, from its header alone; 0 for anything else."""
    view = memoryview(raw)
    first = view[0]
    if first & 0xF0 == 0x90:
        return first & 0x0F
    if first in (0xDC, 0xDD):
        return int.from_bytes(view[1 : 3 if first == 0xDC else 5], "big")
    return 0


def _hex(value: HashValue | None) -> str:
    return "" if value is None else engine_key(value).hex()


def _number(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else -1
