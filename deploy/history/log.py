"""Read a range of a topic as fast as Kafka gives it, and optionally in the order of time."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import KvatlasError, LogError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import metadata_error, metadata_task, start_client
from kvatlas.bridge.kafka.rights import lost_right
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import account, contact
from kvatlas.deploy.history.fetch import RangeFetcher, RecordBatch
from kvatlas.deploy.history.moment import EARLIEST, Moment, offsets_at


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
    """A consumer of ranges: no group, no commits, nothing that others could notice.

    Use as ``async with``.
    """

    def __init__(self, kafka: KafkaSettings, client_id: str = "kvatlas-history") -> None:
        self._kafka = kafka
        self._consumer = AIOKafkaConsumer(
            **client_config(kafka, client_id),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )

    async def __aenter__(self) -> LogReader:
        """Connect.

        Raises:
            SettingsError: TLS or SASL settings are refused.
            LogError: Kafka cannot be reached.
        """
        try:
            (await contact(self._kafka)).close()  # its errors say which setting is refused, the consumer's do not
            await start_client(self._consumer)
            await asyncio.sleep(0)  # stopped before its tasks have begun, aiokafka would raise their cancellation
        except KvatlasError:
            await self._consumer.stop()
            raise
        except (KafkaError, OSError) as error:
            await self._consumer.stop()
            raise LogError(f"cannot reach Kafka at {self._kafka.brokers}: {error}; check --brokers") from error
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._consumer.stop()

    def failed(self) -> BaseException | None:
        """Return why it finds no new leaders any more, None while it does."""
        return metadata_error(metadata_task(self._consumer))

    async def partitions(self, topic: str) -> list[TopicPartition]:
        """Return the partitions of a topic.

        Raises:
            LogError: the topic does not exist.
        """
        name = self._kafka.topic(topic)
        # All topics are asked for, since asking for one by name may create it.
        client = self._consumer._client
        found = (await client.fetch_all_metadata()).partitions_for_topic(name)
        if not found:
            raise LogError(
                f"topic {name} does not exist on {self._kafka.brokers}, or {account(self._kafka)} may not see it; "
                "`kvatlas topics` creates it, docs/security.md lists the rights"
            )
        await client.add_topic(name)  # what was read before may be all that the client keeps track of
        return [TopicPartition(name, partition) for partition in sorted(found)]

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
        try:
            tps = [tp for tp in await self.partitions(topic) if only is None or tp.partition in only]
            starts = await self._offsets(topic, tps, since)
            ends = await self._offsets(topic, tps, until)
        except KafkaError as error:
            raise lost_right(error, self._kafka) or LogError(f"cannot find offsets of {topic}: {error}") from error
        return Range(topic, {tp.partition: (starts[tp], max(starts[tp], ends[tp])) for tp in tps})

    async def _offsets(self, topic: str, tps: list[TopicPartition], moment: Moment) -> dict[TopicPartition, int]:
        """Return the offsets of a moment, also where the broker knows none by time, as the embedded one does.

        Such a broker says that nothing came after any time. That it is so is seen by the record before the offset it
        names, and then the log, which is in its memory, is read through.
        """
        found = await offsets_at(self._consumer, tps, moment)
        if moment.time_ms is None:
            return found
        first = await offsets_at(self._consumer, tps, EARLIEST)
        before = {tp: (end - 1, end) for tp, end in found.items() if end > first[tp]}
        if not await self._first_since(topic, before, moment):
            return found
        return found | await self._first_since(topic, {tp: (first[tp], end) for tp, end in found.items()}, moment)

    async def _first_since(
        self, topic: str, bounds: dict[TopicPartition, tuple[int, int]], moment: Moment
    ) -> dict[TopicPartition, int]:
        """Return the offset of the first record at or after a time of each partition that has one."""
        names = {tp.partition: tp for tp in bounds}
        found: dict[TopicPartition, int] = {}
        span = Range(topic, {tp.partition: bound for tp, bound in bounds.items()})
        async for chunk in self.read(span):
            for record in chunk:
                if record.timestamp_ms >= (moment.time_ms or 0):
                    found.setdefault(names[record.partition], record.offset)
        return found

    async def read(self, span: Range) -> AsyncIterator[list[Record]]:
        """Yield the records of a range in chunks, each partition in order, partitions interleaved as they come.

        Raises:
            LogError: Kafka stopped answering.
        """
        client, name = await self._client(span.topic)
        async for partition, batches in RangeFetcher(client, name, span.bounds).batches():
            if chunk := _chunk(span, partition, batches):
                yield chunk

    async def read_in_time(self, span: Range) -> AsyncIterator[Record]:
        """Yield the records of a range in the order of their time, each partition's own order kept.

        Raises:
            LogError: Kafka stopped answering.
        """
        client, name = await self._client(span.topic)
        async for record in in_time(client, name, span):
            yield record

    async def _client(self, topic: str) -> tuple[Any, str]:
        client: Any = self._consumer._client
        name = self._kafka.topic(topic)
        await client.add_topic(name)
        return client, name


async def in_time(client: Any, topic: str, span: Range) -> AsyncIterator[Record]:
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
    fetcher = RangeFetcher(client, topic, span.bounds, lambda partition: len(queues[partition]) <= fetched[partition])
    async for partition, batches in fetcher.batches():
        queue = queues[partition]
        if chunk := _chunk(span, partition, batches):
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


def _chunk(span: Range, partition: int, batches: list[RecordBatch]) -> list[Record]:
    """Return the records of batches that lie in the range: the first and the last batch may reach out of it."""
    first, end = span.bounds[partition]
    chunk = [record for batch in batches for record in _records(span.topic, partition, batch)]
    if chunk and not (first <= chunk[0].offset and chunk[-1].offset < end):
        chunk = [record for record in chunk if first <= record.offset < end]
    return chunk


def _records(topic: str, partition: int, batch: RecordBatch) -> list[Record]:
    return [
        Record(topic, partition, found.offset, found.timestamp, found.key, found.value, tuple(found.headers))
        for found in batch
    ]


async def find_record(reader: LogReader, span: Range, matches: Callable[[Record], bool]) -> int:
    """Return the offset of the first record of a range in one partition that matches, or the end of the range."""
    async for chunk in reader.read(span):
        for record in chunk:
            if matches(record):
                return record.offset
    (end,) = (end for _, end in span.bounds.values())
    return end
