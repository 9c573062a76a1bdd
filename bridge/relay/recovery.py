"""Recovery of each pod's position: ``kv-pods``, then the tail of ``kv-events`` behind it."""

from __future__ import annotations

import time
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import LogError, WireError
from kvatlas.bridge.ingest.recovered import Recovered, fold
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import fetch, start_client
from kvatlas.bridge.kafka.rights import lost_right
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.runtime.settings import KafkaSettings

#: Events this much older than the newest pod record are in the records, see :func:`_starts`.
_SETTLED_SECONDS: Final = 60.0
#: Records per partition that are read back for the blocks known where tokens are stripped: a few seconds' reading.
_KNOWN_RECORDS: Final = 50_000


async def recover(settings: KafkaSettings, partitions: list[int], *, known_blocks: int = 0) -> dict[str, Recovered]:
    """Read where the pods of some partitions stand.

    Args:
        settings: the cluster.
        partitions: of ``kv-events``.
        known_blocks: engine blocks to remember per pod where tokens are stripped, 0 for none.

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
    newest: dict[int, int] = {}
    try:
        await start_client(consumer)
        heads = [TopicPartition(settings.topic(topics.PODS), number) for number in partitions]
        async for message in _to_end(consumer, heads, {}):
            # The last one on the log, not the latest by its clock, which may have been put back since.
            newest[message.partition] = take_record(pods, message) or newest.get(message.partition, 0)
        starts = await _starts(consumer, settings.topic(topics.EVENTS), partitions, pods, newest)
        if known_blocks and starts:
            for place, end in (await consumer.end_offsets(list(starts))).items():
                starts[place] = max(min(starts[place], end - _KNOWN_RECORDS), 0)
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


async def _starts(
    consumer: Any, topic: str, partitions: list[int], pods: dict[str, Recovered], newest: dict[int, int]
) -> dict[TopicPartition, int]:
    """Return where to read ``kv-events`` from.

    A bridge writes the records of all its pods that changed about once a second, each behind the events that it is
    of. So what is older than the newest record by far more than that is in the records, and a pod that has said
    nothing for hours costs no reading of hours.

    Args:
        consumer: a started consumer.
        topic: full name of ``kv-events``.
        partitions: its partitions.
        pods: as ``kv-pods`` tells of them.
        newest: partition -> when its newest record was written, ns.
    """
    starts = {}
    for number in partitions:
        offsets = [p.record.events_offset for p in pods.values() if p.record.events_partition == number]
        # The last message itself is read again: its bytes tell whether the engine is still the same.
        starts[TopicPartition(topic, number)] = max(min(offsets), 0) if offsets else 0
    settled = {
        place: int(newest[place.partition] / 1e6 - _SETTLED_SECONDS * 1000)
        for place in starts
        if newest.get(place.partition, 0) > _SETTLED_SECONDS * 1e9
    }
    for place, offset in (await _first_since(consumer, settled)).items():
        starts[place] = max(starts[place], offset)
    return starts


async def _first_since(consumer: Any, moments: dict[TopicPartition, int]) -> dict[TopicPartition, int]:
    """Return the first offset since a moment (ms) by partition; without those of a broker that knows no moments."""
    if not moments:
        return {}
    ends = await consumer.end_offsets(list(moments))
    found = await consumer.offsets_for_times(moments)
    # Nothing since then is what a broker that knows no moments says of every one, of the first as well.
    silent = [place for place, at in found.items() if at is None]
    first = await consumer.offsets_for_times(dict.fromkeys(silent, 0)) if silent else {}
    known = {place: at.offset for place, at in found.items() if at is not None}
    return known | {place: ends[place] for place, at in first.items() if at is not None}


def take_record(pods: dict[str, Recovered], message: Any) -> int:
    """Take a record of ``kv-pods``; returns when a bridge wrote it (ns), 0 for what no bridge wrote."""
    key = (message.key or b"").decode(errors="replace")
    writer, _, pod = key.partition("|")
    if writer != pod_ids.WRITER_BRIDGE:
        return 0
    if message.value is None:
        pods.pop(pod, None)
        return 0
    try:
        record = records.decode(PodRecord, message.value)
    except WireError:
        return 0
    pods[pod] = Recovered(record)
    return min(record.updated_ns, time.time_ns())  # a clock that is ahead must not hide the events of today


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
        for messages in (await fetch(consumer, timeout_ms=200)).values():
            for message in messages:
                yield message
        for place in list(open_places):
            if await consumer.position(place) >= ends[place]:
                open_places.discard(place)
