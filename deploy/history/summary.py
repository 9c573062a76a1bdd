"""What a record says, cheaply: enough to print and filter it, without turning tokens into numbers.

Token ids are most of a message's bytes. Here they are skipped as raw bytes and only counted, which makes reading a log
several times faster than applying it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS, WireError
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.adapters.fields import (
    ClearedArray,
    ClearedMap,
    HashValue,
    RemovedArray,
    RemovedFields,
    RemovedMap,
    StoredFields,
    array_length,
)
from kvatlas.bridge.model.events import tier_of
from kvatlas.deploy.history.log import Record

_CONTROL: Final = topics.CONTENT_CONTROL.encode()
_KEYS: Final = topics.CONTENT_KEYS.encode()
_U64: Final = 0xFFFFFFFFFFFFFFFF


class _Stored(StoredFields, gc=False, frozen=True):
    token_ids: msgspec.Raw  # type: ignore[assignment]
    lora_name: Any = None
    extra_keys: msgspec.Raw = msgspec.Raw(b"\xc0")  # type: ignore[assignment]


class _StoredArray(_Stored, gc=False, frozen=True, array_like=True, tag="BlockStored"):
    pass


class _StoredMap(_Stored, gc=False, frozen=True, tag="BlockStored"):
    pass


class _MapBatch(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: list[_StoredMap | RemovedMap | ClearedMap]
    data_parallel_rank: int | None = None


class _BatchOfMaps(msgspec.Struct, gc=False, frozen=True):
    ts: float
    events: list[_StoredMap | RemovedMap | ClearedMap]
    data_parallel_rank: int | None = None


class _ArrayBatch(msgspec.Struct, gc=False, frozen=True, array_like=True):
    ts: float
    events: list[_StoredArray | RemovedArray | ClearedArray]
    data_parallel_rank: int | None = None


_map_batch: Final = msgspec.msgpack.Decoder(_MapBatch)
_array_batch: Final = msgspec.msgpack.Decoder(_ArrayBatch)
_batch_of_maps: Final = msgspec.msgpack.Decoder(_BatchOfMaps)

STORED: Final = "stored"
REMOVED: Final = "removed"
CLEARED: Final = "cleared"
CONTROL: Final = "control"
UNREADABLE: Final = "unreadable"
TYPES: Final = (STORED, REMOVED, CLEARED, CONTROL, UNREADABLE)


class EventLine(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
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


class MessageLine(msgspec.Struct, frozen=True, omit_defaults=True):
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


class Message(msgspec.Struct, frozen=True, gc=False):
    """A ``kv-events`` record, decoded as far as filters need it; :meth:`line` makes of it what is printed.

    Attributes:
        record, headers: as read.
        engine_time: the engine's clock, seconds since the epoch.
        events: decoded events, a control, or stripped events; empty when it cannot be read.
        failure: why it cannot be read.
    """

    record: Record
    headers: dict[str, bytes]
    engine_time: float
    events: Sequence[Any]
    failure: str = ""

    def has_type(self, wanted: Collection[str]) -> bool:
        """Tell whether an event has one of these types."""
        if self.failure:
            return UNREADABLE in wanted
        for event in self.events:  # noqa: SIM110 # half the time of any() over a generator
            if _TYPE_OF[type(event)] in wanted:
                return True
        return False

    def types(self) -> list[str]:
        """Return the types of the events, in order."""
        return [UNREADABLE] if self.failure else [_TYPE_OF[type(event)] for event in self.events]

    def line(self) -> MessageLine:
        """Return what is printed of it."""
        get = self.headers.get
        record = self.record
        events = [EventLine(UNREADABLE, detail=self.failure)] if self.failure else [_line(e) for e in self.events]
        return MessageLine(
            partition=record.partition,
            offset=record.offset,
            timestamp_ms=record.timestamp_ms,
            pod=(record.key or b"").decode(errors="replace"),
            sequence=number_of(get(topics.H_SEQUENCE)),
            incarnation=number_of(get(topics.H_INCARNATION)),
            source=get(topics.H_SOURCE, b"").decode(errors="replace"),
            model=get(topics.H_MODEL, b"").decode(errors="replace"),
            engine_time=self.engine_time,
            events=events,
        )


def read_message(record: Record, headers: dict[str, bytes] | None = None) -> Message:
    """Decode one ``kv-events`` record; never raises.

    Args:
        record: the record.
        headers: its headers, when the caller has them as a dict already.
    """
    if headers is None:
        headers = dict(record.headers)
    value = record.value or b""
    try:
        content = headers.get(topics.H_CONTENT_TYPE)
        if content == _CONTROL:
            return Message(record, headers, 0.0, (records.decode(records.Control, value),))
        if content == _KEYS:
            keyed = records.decode(records.KeyedBatch, value)
            return Message(record, headers, keyed.timestamp, keyed.events)
        batch: _MapBatch | _ArrayBatch | _BatchOfMaps
        try:
            batch = (_map_batch if b"\x90" <= value[:1] < b"\xde" else _batch_of_maps).decode(value)
        except msgspec.ValidationError:
            batch = _array_batch.decode(value)
        return Message(record, headers, batch.ts, batch.events)
    except (*DECODE_ERRORS, WireError) as error:
        return Message(record, headers, 0.0, (), str(error))


def _line(event: Any) -> EventLine:
    if isinstance(event, _Stored):
        keys = event.block_hashes
        return EventLine(
            STORED,
            blocks=len(keys),
            tokens=array_length(bytes(event.token_ids)),
            block_size_tokens=event.block_size,
            tier=_tier_name(event.medium, event.locality),
            group=event.group_idx or 0,
            lora=event.lora_name if isinstance(event.lora_name, str) else "",
            first=_hex(keys[0]) if keys else "",
            last=_hex(keys[-1]) if keys else "",
            parent=_hex(event.parent_block_hash),
        )
    if isinstance(event, RemovedFields):
        keys = event.block_hashes
        return EventLine(
            REMOVED,
            blocks=len(keys),
            tier=_tier_name(event.medium, event.locality),
            group=event.group_idx or 0,
            first=_hex(keys[0]) if keys else "",
            last=_hex(keys[-1]) if keys else "",
        )
    if isinstance(event, records.Control):
        return _control(event)
    if isinstance(event, records.KeyedCleared):
        return EventLine(CLEARED, detail="keys")
    if isinstance(event, records.KeyedStored | records.KeyedRemoved):
        return _keyed(event)
    return EventLine(CLEARED)


@lru_cache(maxsize=256)
def _tier_name(medium: str | None, locality: str | None) -> str:
    return tier_of(medium, locality).name.lower()


def _keyed(event: records.KeyedStored | records.KeyedRemoved) -> EventLine:
    keys = event.engine_keys
    return EventLine(
        STORED if isinstance(event, records.KeyedStored) else REMOVED,
        blocks=len(keys),
        group=event.group,
        first=keys[0].hex() if keys else "",
        last=keys[-1].hex() if keys else "",
        detail="keys",
    )


def _control(control: records.Control) -> EventLine:
    lost = f" lost {control.first_lost} to {control.last_lost}" if control.type == "gap" else ""
    return EventLine(CONTROL, detail=f"{control.type}{lost} {control.reason}".strip())


def _hex(value: HashValue | None) -> str:
    if isinstance(value, int):
        return f"{value & _U64:016x}"
    return "" if value is None else value.hex()


def number_of(value: bytes | None) -> int:
    """Return a header's number, -1 for none and for what is no number."""
    try:
        return topics.header_number(value)
    except ValueError:
        return -1


_TYPE_OF: Final[dict[type, str]] = {
    _StoredMap: STORED,
    _StoredArray: STORED,
    records.KeyedStored: STORED,
    RemovedMap: REMOVED,
    RemovedArray: REMOVED,
    records.KeyedRemoved: REMOVED,
    ClearedMap: CLEARED,
    ClearedArray: CLEARED,
    records.KeyedCleared: CLEARED,
    records.Control: CONTROL,
}
