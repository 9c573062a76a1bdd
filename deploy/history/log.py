"""Read a range of a topic as fast as Kafka gives it, and optionally in the order of time."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import LogError, SettingsError
from kvatlas.bridge.kafka import client_config, lost_right
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.deploy.history.moment import Moment, offsets_at
from kvatlas.deploy.rights import account, contact

_FETCH_BYTES: Final = 16 * 1024 * 1024


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
            max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_bytes=2 * _FETCH_BYTES,
            check_crcs=False,
        )

    async def __aenter__(self) -> LogReader:
        """Connect.

        Raises:
            SettingsError: TLS or SASL settings are refused.
            LogError: Kafka cannot be reached.
        """
        (await contact(self._kafka)).close()  # its errors say which setting is refused, the consumer's do not
        try:
            await self._consumer.start()
        except (KafkaError, OSError) as error:
            await self._consumer.stop()
            raise LogError(f"cannot reach Kafka at {self._kafka.brokers}: {error}; check --brokers") from error
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._consumer.stop()

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
            starts = await offsets_at(self._consumer, tps, since)
            ends = await offsets_at(self._consumer, tps, until)
        except KafkaError as error:
            raise lost_right(error, self._kafka) or LogError(f"cannot find offsets of {topic}: {error}") from error
        return Range(topic, {tp.partition: (starts[tp], max(starts[tp], ends[tp])) for tp in tps})

    async def read(self, span: Range) -> AsyncIterator[list[Record]]:
        """Yield the records of a range in chunks, each partition in order, partitions interleaved as they come.

        Raises:
            LogError: Kafka stopped answering.
        """
        open_ends = {
            TopicPartition(self._kafka.topic(span.topic), partition): end
            for partition, (start, end) in span.bounds.items()
            if start < end
        }
        self._consumer.assign(list(open_ends))
        for tp in open_ends:
            self._consumer.seek(tp, span.bounds[tp.partition][0])
        while open_ends:
            try:
                fetched = await self._consumer.getmany(timeout_ms=1000, max_records=10_000)
                for tp, messages in fetched.items():
                    end = open_ends.get(tp)
                    if end is None:
                        continue
                    chunk = [_record(span.topic, message) for message in messages if message.offset < end]
                    if chunk:
                        yield chunk
                await self._close_ended(open_ends)
            except KafkaError as error:
                raise lost_right(error, self._kafka) or LogError(f"reading {span.topic} stopped: {error}") from error

    async def _close_ended(self, open_ends: dict[TopicPartition, int]) -> None:
        """Drop partitions whose position passed the end: their last offsets may hold no record."""
        ended = [tp for tp, end in open_ends.items() if await self._consumer.position(tp) >= end]
        for tp in ended:
            del open_ends[tp]
        if ended and open_ends:
            positions = {tp: await self._consumer.position(tp) for tp in open_ends}
            self._consumer.assign(list(open_ends))
            for tp, position in positions.items():
                self._consumer.seek(tp, position)

    async def read_in_time(self, span: Range) -> AsyncIterator[Record]:
        """Yield the records of a range in the order of their time, each partition's own order kept.

        Raises:
            LogError: Kafka stopped answering.
        """
        queues: dict[int, deque[Record]] = {
            partition: deque() for partition, (start, end) in span.bounds.items() if start < end
        }
        done: set[int] = set()
        async for chunk in self.read(span):
            partition = chunk[0].partition
            queues[partition].extend(chunk)
            if chunk[-1].offset >= span.bounds[partition][1] - 1:
                done.add(partition)
            while queues and all(queues.values()):
                smallest = min(queues, key=lambda number: queues[number][0].timestamp_ms)
                yield queues[smallest].popleft()
                if smallest in done and not queues[smallest]:
                    del queues[smallest]
        for record in heapq.merge(*queues.values(), key=lambda found: found.timestamp_ms):
            yield record


def _record(topic: str, message: Any) -> Record:
    return Record(
        topic, message.partition, message.offset, message.timestamp, message.key, message.value, message.headers
    )


async def find_sequence(reader: LogReader, topic: str, partition: int, matches: Callable[[Record], bool]) -> int:
    """Return the offset of the first record of a partition that matches, or the end of the partition."""
    tps = [tp for tp in await reader.partitions(topic) if tp.partition == partition]
    if not tps:
        raise SettingsError(f"topic {topic} has no partition {partition}")
    span = await reader.range(topic, Moment(edge="earliest"), Moment(edge="latest"), only=[partition])
    async for chunk in reader.read(span):
        for record in chunk:
            if matches(record):
                return record.offset
    return span.bounds[partition][1]
