"""Read a range of a topic as fast as Kafka gives it, and optionally in the order of time."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, NamedTuple

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.ranges import RangeReader, within
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import account, contact
from kvatlas.deploy.history.moment import Moment, offsets_at


class Record(NamedTuple):
    """One record of any topic, as it lies on the log.

    Attributes:
        topic: its name without the deployment's prefix.
        partition, offset: where it is.
        timestamp_ms: Kafka's time of it, ms since the epoch.
        key, value: as they are; value None is a tombstone.
        headers: in order.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]


class Range(NamedTuple):
    """Which part of a topic to read: partition -> (first offset, offset after the last)."""

    topic: str
    bounds: dict[int, tuple[int, int]]

    @property
    def records(self) -> int:
        """Return how many offsets the range spans; compacted and aborted records count too."""
        return sum(max(0, end - start) for start, end in self.bounds.values())


class LogReader:
    """A reader of ranges of the deployment's topics, named without its prefix. Use as ``async with``."""

    def __init__(self, kafka: KafkaSettings, client_id: str = "kvatlas-history") -> None:
        self._kafka = kafka
        self._ranges = RangeReader(kafka, client_id)

    async def __aenter__(self) -> LogReader:
        """Connect.

        Raises:
            SettingsError: TLS or SASL settings are refused.
            LogError: Kafka cannot be reached.
        """
        (await contact(self._kafka)).close()  # its errors say which setting is refused, the consumer's do not
        await self._ranges.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._ranges.__aexit__()

    def failed(self) -> BaseException | None:
        """Return why it finds no new leaders any more, None while it does."""
        return self._ranges.failed()

    async def partitions(self, topic: str) -> list[int]:
        """Return the partitions of a topic.

        Raises:
            LogError: the topic does not exist, or Kafka does not answer.
        """
        name = self._kafka.topic(topic)
        if not (found := await self._ranges.partitions(name)):
            raise LogError(
                f"topic {name} does not exist on {self._kafka.brokers}, or {account(self._kafka)} may not see it; "
                "`kvatlas topics` creates it, docs/security.md lists the rights"
            )
        return found

    async def range(self, topic: str, since: Moment, until: Moment, only: Collection[int] | None = None) -> Range:
        """Turn two moments into offsets, as the log stands now.

        Args:
            topic: name without the deployment's prefix.
            since: first record.
            until: the range ends before the record at this moment.
            only: partitions to read; None reads all.

        Raises:
            LogError: Kafka does not answer, or the topic does not exist.
        """
        numbers = [number for number in await self.partitions(topic) if only is None or number in only]
        starts = await self._offsets(topic, numbers, since)
        ends = await self._offsets(topic, numbers, until)
        return Range(topic, {number: (starts[number], max(starts[number], ends[number])) for number in numbers})

    async def _offsets(self, topic: str, numbers: list[int], moment: Moment) -> dict[int, int]:
        """Return the offsets of a moment, also where the broker knows none by time, as the embedded one does.

        Such a broker says that nothing came after any time. That it is so is seen by the record before the offset it
        names, and then the log, which is in its memory, is read through.
        """
        name = self._kafka.topic(topic)
        edges = await self._ranges.edges(name, numbers)
        known = {} if moment.time_ms is None else await self._ranges.since(name, dict.fromkeys(numbers, moment.time_ms))
        found = offsets_at(edges, moment, known)
        if moment.time_ms is None:
            return found
        before = {number: (end - 1, end) for number, end in found.items() if end > edges[number].first}
        if not await self._first_since(topic, before, moment.time_ms):
            return found
        spans = {number: (edges[number].first, end) for number, end in found.items()}
        return found | await self._first_since(topic, spans, moment.time_ms)

    async def _first_since(self, topic: str, bounds: dict[int, tuple[int, int]], time_ms: int) -> dict[int, int]:
        """Return the offset of the first record at or after a time of each partition that has one."""
        found: dict[int, int] = {}
        async for partition, chunk in self._ranges.read(self._kafka.topic(topic), bounds):
            for record in chunk:
                if record.timestamp >= time_ms:
                    found.setdefault(partition, record.offset)
        return found

    async def read(self, span: Range) -> AsyncIterator[list[Record]]:
        """Yield the records of a range in chunks, each partition in order, partitions interleaved as they come.

        Raises:
            LogError: Kafka stopped answering.
        """
        async for partition, chunk in self._ranges.read(self._kafka.topic(span.topic), span.bounds):
            yield _records(span.topic, partition, chunk)

    async def read_in_time(self, span: Range) -> AsyncIterator[Record]:
        """Yield the records of a range in the order of their time, each partition's own order kept.

        Raises:
            LogError: Kafka stopped answering.
        """
        async for record in in_time(self._ranges, self._kafka.topic(span.topic), span):
            yield record


async def in_time(ranges: RangeReader, topic: str, span: Range) -> AsyncIterator[Record]:
    """Merge the partitions of a range by time.

    About two fetches of each partition are held: brokers fill an answer partition by partition, so without a limit the
    first ones would be read to their end while the last are still waited for.
    """
    queues: dict[int, deque[Record]] = {
        partition: deque() for partition, (start, end) in span.bounds.items() if start < end
    }
    heads: list[tuple[int, int]] = []  # (time, partition) of every queue that has records
    awaited = set(queues)  # nothing can be given out before these have shown what they have
    fetched = dict.fromkeys(queues, 0)  # records of each partition's last fetch
    fetcher = await ranges.fetcher(topic, span.bounds, lambda partition: len(queues[partition]) <= fetched[partition])
    async for partition, batches in fetcher.batches():
        queue = queues[partition]
        if chunk := _records(span.topic, partition, within(batches, span.bounds[partition])):
            if not queue:
                heapq.heappush(heads, (chunk[0].timestamp_ms, partition))
            queue.extend(chunk)
            fetched[partition] = len(chunk)
        if chunk or partition not in fetcher.left:
            awaited.discard(partition)
        while heads and not awaited:
            first = heads[0][1]
            queue = queues[first]
            yield queue.popleft()
            if queue:
                heapq.heapreplace(heads, (queue[0].timestamp_ms, first))
            else:
                heapq.heappop(heads)
                if first in fetcher.left:
                    awaited.add(first)
    for record in heapq.merge(*queues.values(), key=lambda found: found.timestamp_ms):
        yield record


def _records(topic: str, partition: int, chunk: list[Any]) -> list[Record]:
    return [
        Record(topic, partition, found.offset, found.timestamp, found.key, found.value, tuple(found.headers))
        for found in chunk
    ]


async def find_record(reader: LogReader, span: Range, matches: Callable[[Record], bool]) -> int:
    """Return the offset of the first record of a range in one partition that matches, or the end of the range."""
    async for chunk in reader.read(span):
        for record in chunk:
            if matches(record):
                return record.offset
    (end,) = (end for _, end in span.bounds.values())
    return end
