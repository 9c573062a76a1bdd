"""Where every pod stands on the log: its record on ``kv-pods``, and what ``kv-events`` holds behind that record."""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from xxhash import xxh3_64_intdigest

from kvatlas.bridge import records
from kvatlas.bridge.errors import LogError, WireError
from kvatlas.bridge.kafka import client_config, lost_right
from kvatlas.bridge.records import Control, KeyedBatch, PodRecord
from kvatlas.bridge.sequence import DIGESTS, Position
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.bridge.strip import KnownBlocks

_DOUBLE: Final = struct.Struct(">d")


def read_ts(payload: bytes) -> float | None:
    """Return the engine's clock in a message (seconds) from its first bytes; None when it has none there."""
    if len(payload) >= 10 and payload[1] == 0xCB and 0x90 <= payload[0] <= 0x9F:
        value: float = _DOUBLE.unpack_from(payload, 2)[0]
        return value
    return None


def apply_control(record: PodRecord, control: Control) -> PodRecord:
    """Return a pod's record after a turn of its stream."""
    epoch = records.epoch_of(control.incarnation)
    changes: dict[str, Any] = {"epoch": epoch}
    if control.type == "gap":
        changes["suspect_before"] = epoch
    else:
        changes["valid_from"] = epoch
        changes["last_sequence"] = -1
        changes["state"] = records.GONE if control.type == "gone" else records.LIVE
    if control.first_lost >= 0:
        changes |= {
            "first_lost": control.first_lost,
            "last_lost": control.last_lost,
            "lost": record.lost + control.last_lost - control.first_lost + 1,
            "last_sequence": control.last_lost,
        }
    return msgspec.structs.replace(record, **changes)


class Recovered(msgspec.Struct):
    """One pod as the log knows it; ``blocks`` where its batches are stored without tokens."""

    record: PodRecord
    digests: list[tuple[int, int]] = []
    blocks: KnownBlocks | None = None

    def position(self) -> Position:
        """Return where its stream goes on; a pod that was gone starts anew under a later incarnation."""
        incarnation = records.incarnation_of(self.record.epoch)
        return Position(
            incarnation, self.record.last_sequence, self.record.last_event_ns / 1e9, tuple(self.digests[-DIGESTS:])
        )


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
    pod = key.decode(errors="replace")
    known = pods.get(pod)
    if known is None:
        known = pods[pod] = Recovered(PodRecord(pod=pod, writer=records.WRITER_BRIDGE))
    record = known.record
    if headers.get(records.H_CONTENT_TYPE) == records.CONTENT_CONTROL.encode():
        try:
            control = records.decode(Control, value)
        except WireError:
            return
        if control.incarnation > records.incarnation_of(record.epoch):
            if control.type != "gap":
                known.digests.clear()
                known.blocks = None
            known.record = apply_control(record, control)
        return
    incarnation = int(headers.get(records.H_INCARNATION, b"0"))
    sequence = int(headers.get(records.H_SEQUENCE, b"-1"))
    ts = read_ts(value)
    if headers.get(records.H_CONTENT_TYPE) == records.CONTENT_KEYS.encode():
        try:
            batch = records.decode(KeyedBatch, value)
        except WireError:
            return
        ts = batch.timestamp
        if known_blocks and incarnation >= records.incarnation_of(record.valid_from):
            if known.blocks is None:
                known.blocks = KnownBlocks(known_blocks)
            known.blocks.learn(batch)
    if incarnation != records.incarnation_of(record.epoch) or sequence < record.last_sequence:
        return
    if headers.get(records.H_CONTENT_TYPE) == records.CONTENT_ENGINE.encode():
        known.digests.append((sequence, xxh3_64_intdigest(value)))
    known.record = msgspec.structs.replace(
        record,
        last_sequence=sequence,
        last_event_ns=0 if ts is None else int(ts * 1e9),
        receive_ns=int(headers.get(records.H_RECEIVE_NS, b"0")),
        events_partition=place[0],
        events_offset=place[1],
    )


async def recover(
    settings: KafkaSettings, partitions: list[int], *, known_blocks: int = 0, known_records: int = 0
) -> dict[str, Recovered]:
    """Read where the pods of some partitions stand.

    Args:
        settings: the cluster.
        partitions: of ``kv-events``.
        known_blocks: engine blocks to remember per pod where tokens are stripped, 0 for none.
        known_records: records per partition that are read back for them.

    Raises:
        LogError: Kafka does not answer.
        RightsError: the account may not read a topic.
    """
    consumer = AIOKafkaConsumer(
        **client_config(settings, "kvatlas-bridge-recovery"),
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=50,
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    pods: dict[str, Recovered] = {}
    try:
        await consumer.start()
        heads = [TopicPartition(settings.topic(records.PODS), number) for number in partitions]
        async for message in _to_end(consumer, heads, {}):
            _take_record(pods, message)
        starts = {}
        for number in partitions:
            place = TopicPartition(settings.topic(records.EVENTS), number)
            offsets = [p.record.events_offset for p in pods.values() if p.record.events_partition == number]
            # The last message itself is read again: its bytes tell whether the engine is still the same.
            starts[place] = max(min(offsets), 0) if offsets else 0
        if known_blocks and starts:
            for place, end in (await consumer.end_offsets(list(starts))).items():
                starts[place] = max(min(starts[place], end - known_records), 0)
        async for message in _to_end(consumer, list(starts), starts):
            if message.key is not None:
                place = (message.partition, message.offset)
                fold(pods, message.key, message.value or b"", dict(message.headers), place, known_blocks=known_blocks)
    except KafkaError as error:
        raise lost_right(error, settings) or LogError(
            f"cannot read pod positions from {settings.brokers}: {error}"
        ) from error
    finally:
        await consumer.stop()
    return pods


def _take_record(pods: dict[str, Recovered], message: Any) -> None:
    key = (message.key or b"").decode(errors="replace")
    writer, _, pod = key.partition("|")
    if writer != records.WRITER_BRIDGE:
        return
    if message.value is None:
        pods.pop(pod, None)
        return
    try:
        pods[pod] = Recovered(records.decode(PodRecord, message.value))
    except WireError:
        return


async def _to_end(consumer: Any, places: list[TopicPartition], starts: dict[TopicPartition, int]) -> Any:
    if not places:
        return
    consumer.assign(places)
    ends = await consumer.end_offsets(places)
    first = await consumer.beginning_offsets(places)
    for place in places:
        consumer.seek(place, min(max(starts.get(place, 0), first[place]), ends[place]))
    open_places = {place for place in places if await consumer.position(place) < ends[place]}
    while open_places:
        for messages in (await consumer.getmany(timeout_ms=200)).values():
            for message in messages:
                yield message
        for place in list(open_places):
            if await consumer.position(place) >= ends[place]:
                open_places.discard(place)
