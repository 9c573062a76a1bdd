"""Recovery of each pod's position: ``kv-pods``, then the tail of ``kv-events`` behind it."""

from __future__ import annotations

import time
from typing import Any, Final

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.ingest.recovered import Recovered, fold
from kvatlas.bridge.kafka.ranges import Edges, RangeReader
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
    heads, events = settings.topic(topics.PODS), settings.topic(topics.EVENTS)
    pods: dict[str, Recovered] = {}
    newest: dict[int, int] = {}
    async with RangeReader(settings, "kvatlas-bridge-recovery") as reader:
        async for number, batch in reader.read(heads, await reader.edges(heads, partitions)):
            for message in batch:
                # The last one on the log, not the latest by its clock, which may have been put back since.
                newest[number] = take_record(pods, message) or newest.get(number, 0)
        edges = await reader.edges(events, partitions)
        starts = await _starts(reader, events, edges, pods, newest)
        if known_blocks:
            starts = {number: min(start, edges[number].end - _KNOWN_RECORDS) for number, start in starts.items()}
        bounds = {number: (max(start, edges[number].first), edges[number].end) for number, start in starts.items()}
        async for number, batch in reader.read(events, bounds):
            for message in batch:
                if message.key is not None:
                    place, headers = (number, message.offset), dict(message.headers)
                    fold(pods, message.key, message.value or b"", headers, place, known_blocks=known_blocks)
    return pods


async def _starts(
    reader: RangeReader, topic: str, edges: dict[int, Edges], pods: dict[str, Recovered], newest: dict[int, int]
) -> dict[int, int]:
    """Return where to read ``kv-events`` from.

    A bridge writes the records of all its pods that changed about once a second, each behind the events that it is
    of. So what is older than the newest record by far more than that is in the records, and a pod that has said
    nothing for hours costs no reading of hours.

    Args:
        reader: of ranges.
        topic: full name of ``kv-events``.
        edges: where its partitions begin and end.
        pods: as ``kv-pods`` tells of them.
        newest: partition -> when its newest record was written, ns.
    """
    starts = {}
    for number in edges:
        offsets = [p.record.events_offset for p in pods.values() if p.record.events_partition == number]
        # The last message itself is read again: its bytes tell whether the engine is still the same.
        starts[number] = max(min(offsets), 0) if offsets else 0
    settled = {
        number: int(newest[number] / 1e6 - _SETTLED_SECONDS * 1000)
        for number in starts
        if newest.get(number, 0) > _SETTLED_SECONDS * 1e9
    }
    found = await reader.since(topic, settled)
    # Nothing since then is what a broker that knows no moments says of every one, of the first as well.
    first = await reader.since(topic, {number: 0 for number, at in found.items() if at is None})
    known = {number: at for number, at in found.items() if at is not None}
    known |= {number: edges[number].end for number, at in first.items() if at is not None}
    return {number: max(start, known.get(number, 0)) for number, start in starts.items()}


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
