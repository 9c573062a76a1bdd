"""Recovered position of a pod: its record on ``kv-pods`` with what ``kv-events`` holds behind that record. Pure."""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

import msgspec
from xxhash import xxh3_64_intdigest

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.ingest.memory import DIGESTS
from kvatlas.bridge.ingest.messages import StreamPosition
from kvatlas.bridge.ingest.strip import KnownBlocks
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.numbers import COUNT_MAX
from kvatlas.bridge.model.records import Control, KeyedBatch, PodRecord

_DOUBLE: Final = struct.Struct(">d")
#: The year 2262, where a moment in ns leaves 64 bits.
_LATEST_SECONDS: Final = 9.2e9


def event_ns(seconds: float | None) -> int:
    """Return an engine's clock in ns; 0 where it says none, or no moment at all."""
    return int(seconds * 1e9) if seconds is not None and 0 < seconds < _LATEST_SECONDS else 0


def read_ts(payload: bytes) -> float | None:
    """Return the engine's clock in a message (seconds) from its first bytes; None when it has none there."""
    if len(payload) >= 10 and payload[1] == 0xCB and 0x90 <= payload[0] <= 0x9F:
        value: float = _DOUBLE.unpack_from(payload, 2)[0]
        return value
    return None


def apply_control(record: PodRecord, control: Control) -> PodRecord:
    """Return a pod's record after a turn of its stream."""
    epoch = epochs.epoch_of(control.incarnation)
    changes: dict[str, Any] = {"epoch": epoch}
    if control.type == "gap":
        changes["suspect_before"] = epoch
        changes["heard_from"] = control.last_lost + 1 if control.last_lost >= 0 else -1
    else:
        changes["valid_from"] = epoch
        changes["last_sequence"], changes["heard_from"] = -1, 0
        changes["state"] = records.GONE if control.type == "gone" else records.LIVE
    if control.first_lost >= 0:
        changes |= {
            "first_lost": control.first_lost,
            "last_lost": control.last_lost,
            "lost": min(record.lost + max(control.last_lost - control.first_lost + 1, 0), COUNT_MAX),
            "last_sequence": control.last_lost,
        }
    return msgspec.structs.replace(record, **changes)


class Handover(NamedTuple):
    """What the next session of a pod goes on from."""

    record: PodRecord
    position: StreamPosition
    blocks: KnownBlocks | None


class Recovered(msgspec.Struct):
    """One pod as the log knows it.

    Attributes:
        record: its record, with what ``kv-events`` says behind it.
        digests: (sequence, digest) of its newest messages.
        blocks: its engine blocks where its batches are stored without tokens.
        ahead: whether ``record`` says more than ``kv-pods``.
    """

    record: PodRecord
    digests: list[tuple[int, int]] = []
    blocks: KnownBlocks | None = None
    ahead: bool = False

    def position(self) -> StreamPosition:
        """Return where its stream goes on; a pod that was gone starts anew under a later incarnation."""
        record = self.record
        # Behind a gap the clock is that of the last message before it.
        ts = 0.0 if record.last_sequence == record.last_lost else record.last_event_ns / 1e9
        incarnation = epochs.incarnation_of(record.epoch)
        return StreamPosition(incarnation, record.last_sequence, ts, tuple(self.digests[-DIGESTS:]))


def fold(
    pods: dict[str, Recovered],
    key: bytes,
    value: bytes,
    headers: dict[str, bytes],
    place: tuple[int, int],
    *,
    known_blocks: int = 0,
) -> None:
    """Apply one record of ``kv-events`` to what is known of its pod.

    Args:
        pods: pod id -> what is known; changed in place.
        key: the record's key, the pod id.
        value: the record's value.
        headers: its headers.
        place: its partition and offset.
        known_blocks: engine blocks to remember per pod where tokens are stripped, 0 for none.
    """
    numbers = _numbers(headers)
    if numbers is None:  # no record of ours; readers dead-letter it
        return
    incarnation, sequence, receive_ns = numbers
    pod = key.decode(errors="replace")
    known = pods.setdefault(pod, Recovered(PodRecord(pod=pod, writer=pod_ids.WRITER_BRIDGE)))
    record = known.record
    if headers.get(topics.H_CONTENT_TYPE) == topics.CONTENT_CONTROL.encode():
        try:
            control = records.decode(Control, value)
        except WireError:
            return
        if control.incarnation > epochs.incarnation_of(record.epoch):
            if control.type != "gap":
                known.digests.clear()
                known.blocks = None
            known.record = apply_control(record, control)
            known.ahead = True
        return
    ts = read_ts(value)
    if headers.get(topics.H_CONTENT_TYPE) == topics.CONTENT_KEYS.encode():
        try:
            batch = records.decode(KeyedBatch, value)
        except WireError:
            return
        ts = batch.timestamp
        if known_blocks and incarnation >= epochs.incarnation_of(record.valid_from):
            if known.blocks is None:
                known.blocks = KnownBlocks(known_blocks)
            known.blocks.learn(batch)
    if incarnation != epochs.incarnation_of(record.epoch) or sequence < record.last_sequence:
        return
    if headers.get(topics.H_CONTENT_TYPE) == topics.CONTENT_ENGINE.encode():
        known.digests.append((sequence, xxh3_64_intdigest(value)))
    known.ahead = known.ahead or sequence > record.last_sequence
    known.record = msgspec.structs.replace(
        record,
        last_sequence=sequence,
        last_event_ns=event_ns(ts),
        receive_ns=receive_ns,
        events_partition=place[0],
        events_offset=place[1],
    )


def _numbers(headers: dict[str, bytes]) -> tuple[int, int, int] | None:
    """Return incarnation, sequence and receive time (ns) from a record's headers; None where one is no number."""
    try:
        incarnation = topics.header_number(headers.get(topics.H_INCARNATION), 0)
        sequence = topics.header_number(headers.get(topics.H_SEQUENCE))
        receive_ns = topics.header_number(headers.get(topics.H_RECEIVE_NS), 0)
    except ValueError:
        return None
    return (incarnation, sequence, receive_ns) if incarnation <= epochs.INCARNATION_MAX else None
