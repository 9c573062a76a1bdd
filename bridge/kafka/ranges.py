"""Reader of ranges of topics: where their partitions begin and end, and the records between two offsets.

A consumer makes an object of every record and asks for more when all of it has been taken. Here the brokers are asked
for the next stretch as soon as the offsets of the last one are known, which its batch headers say, and records are made
from the batches by their reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, NodeNotReadyError, OffsetOutOfRangeError, for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.memory_records import MemoryRecords

from kvatlas.bridge.errors import KvatlasError, LogError
from kvatlas.bridge.kafka.config import client_config, is_loopback
from kvatlas.bridge.kafka.fetching import connect, metadata_error, metadata_task
from kvatlas.bridge.kafka.rights import lost_right
from kvatlas.bridge.runtime.settings import KafkaSettings

#: A batch of records as aiokafka reads it: iterable, each record with offset, timestamp, key, value and headers.
RecordBatch = Any

_PARTITION_BYTES: Final = 4 * 1024 * 1024
_RESPONSE_BYTES: Final = 32 * 1024 * 1024
#: What comes is there already; the embedded broker answers a fetch over several partitions only when this is over.
_WAIT_MS: Final = 200
_LOCAL_WAIT_MS: Final = 20
_PAUSE_SECONDS: Final = 0.2
_GIVE_UP_SECONDS: Final = 30.0


class Edges(NamedTuple):
    """Where a partition begins and ends: its first offset, and the one after its last."""

    first: int
    end: int


async def edges_of(consumer: Any, topic: str, partitions: Iterable[int]) -> dict[int, Edges]:
    """Return where partitions begin and end now.

    Raises:
        KafkaError: Kafka does not answer.
    """
    places = [TopicPartition(topic, number) for number in partitions]
    if not places:
        return {}
    first, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
    return {place.partition: Edges(first[place], ends[place]) for place in places}


class RangeReader:
    """A client that reads ranges: no group, no commits, nothing that others could notice. Use as ``async with``.

    Topics are named in full, with the deployment's prefix.
    """

    def __init__(self, kafka: KafkaSettings, client_id: str) -> None:
        self._kafka, self._client_id = kafka, client_id
        self._started: Any = None

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            SettingsError: TLS or SASL settings are refused.
            LogError: Kafka cannot be reached.
        """
        consumer = AIOKafkaConsumer(**client_config(self._kafka, self._client_id), enable_auto_commit=False)
        await connect(consumer, self._kafka)
        self._started = consumer
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        if self._started is not None:
            with contextlib.suppress(Exception):  # closing raises what ended the client, which was told
                await self._started.stop()

    @property
    def _consumer(self) -> Any:
        assert self._started is not None, "use it as `async with`"
        return self._started

    def failed(self) -> BaseException | None:
        """Return why it finds no new leaders any more, None while it does."""
        return None if self._started is None else metadata_error(metadata_task(self._started))

    async def partitions(self, topic: str) -> list[int]:
        """Return the partitions of a topic as the brokers know them now; none when there is no such topic.

        Raises:
            LogError: Kafka does not answer.
        """
        client = self._consumer._client
        try:
            # All topics are asked for, since asking for one by name may create it.
            found = (await client.fetch_all_metadata()).partitions_for_topic(topic)
            if found:
                await client.add_topic(topic)  # what was read before may be all that the client keeps track of
        except KafkaError as error:
            raise self._error(topic, error) from error
        return sorted(found or ())

    async def edges(self, topic: str, partitions: Iterable[int]) -> dict[int, Edges]:
        """Return where partitions begin and end now.

        Raises:
            LogError: Kafka does not answer.
            RightsError: the account may not read the topic.
        """
        if (ended := self.failed()) is not None:
            raise LogError(f"{topic} at {self._kafka.brokers} cannot be read: {ended}") from ended
        try:
            return await edges_of(self._consumer, topic, partitions)
        except KafkaError as error:
            raise self._error(topic, error) from error

    async def since(self, topic: str, moments_ms: Mapping[int, int]) -> dict[int, int | None]:
        """Return the first offset at or after a time of each partition; None where the broker knows of none.

        Raises:
            LogError: Kafka does not answer.
        """
        wanted = {TopicPartition(topic, number): moment for number, moment in moments_ms.items()}
        try:
            found = await self._consumer.offsets_for_times(wanted) if wanted else {}
        except KafkaError as error:
            raise self._error(topic, error) from error
        return {place.partition: found[place].offset if found.get(place) else None for place in wanted}

    async def read(self, topic: str, bounds: Mapping[int, tuple[int, int]]) -> AsyncIterator[tuple[int, list[Any]]]:
        """Yield (partition, its next records) of a range, partitions interleaved as they come.

        Args:
            topic: its full name.
            bounds: partition -> (first offset, offset after the last).

        Raises:
            LogError: Kafka stopped answering, or the range is not on the log any more.
        """
        fetcher = await self.fetcher(topic, bounds)
        async for partition, batches in fetcher.batches():
            if records := within(batches, bounds[partition]):
                yield partition, records

    async def fetcher(
        self,
        topic: str,
        bounds: Mapping[int, tuple[int, int]],
        wants: Callable[[int], bool] = lambda _: True,
        *,
        wait_ms: int | None = None,
    ) -> RangeFetcher:
        """Return what fetches the batches of a range."""
        client = self._consumer._client
        await client.add_topic(topic)
        if wait_ms is None:
            wait_ms = _LOCAL_WAIT_MS if is_loopback(self._kafka) else _WAIT_MS
        return RangeFetcher(client, topic, bounds, wants, wait_ms=wait_ms)

    def _error(self, topic: str, error: KafkaError) -> KvatlasError:
        return lost_right(error, self._kafka) or LogError(
            f"{self._kafka.brokers} does not say where {topic} begins and ends: {error!r}"
        )


def within(batches: list[RecordBatch], bounds: tuple[int, int]) -> list[Any]:
    """Return the records of batches that lie in a range: the first and the last batch may reach out of it."""
    first, end = bounds
    found = [record for batch in batches for record in batch]
    if found and not (first <= found[0].offset and found[-1].offset < end):
        found = [record for record in found if first <= record.offset < end]
    return found


class RangeFetcher:
    """Fetches the batches of some partitions of one topic up to given offsets.

    Args:
        client: a started ``AIOKafkaClient``.
        topic: full topic name.
        bounds: partition -> (first offset, offset after the last).
        wants: asked before every fetch whether more of a partition is wanted now. It must want one of those that are
            left whenever all that was fetched has been taken.
        wait_ms: how long a broker may wait for records.

    Attributes:
        ends: partition -> where it ended when it was last fetched.
    """

    def __init__(
        self,
        client: Any,
        topic: str,
        bounds: Mapping[int, tuple[int, int]],
        wants: Callable[[int], bool] = lambda _: True,
        *,
        wait_ms: int = _WAIT_MS,
    ) -> None:
        self._wants = wants
        self._wait_ms = wait_ms
        self._client = client
        self._topic = topic
        self._positions = {partition: start for partition, (start, end) in bounds.items() if start < end}
        self._bounds = {partition: end for partition, (_, end) in bounds.items()}
        self._answered = time.monotonic()
        self.ends: dict[int, int] = {}

    @property
    def left(self) -> Collection[int]:
        """Partitions that have not been read to the end of their range."""
        return self._positions.keys()

    async def batches(self) -> AsyncGenerator[tuple[int, list[RecordBatch]], None]:
        """Yield (partition, its next batches). The first and last batch may hold records outside the bounds.

        A partition that ends without a further record yields no batches once more.

        Raises:
            LogError: the range is not on the log any more, or no broker answered for half a minute.
        """
        pending: dict[int, asyncio.Task[Any]] = {}
        try:
            while pending or self._positions:
                pending |= self._ask(pending)  # what was not wanted before may be now
                done, _ = await asyncio.wait(pending.values(), return_when=asyncio.FIRST_COMPLETED)
                found: list[tuple[int, list[RecordBatch]]] = []
                for node, task in list(pending.items()):
                    if task in done:
                        del pending[node]
                        found += await self._take(task)
                pending |= self._ask(pending)
                await asyncio.sleep(0)  # the next request is on its way while these are read
                for partition, batches in found:
                    yield partition, batches
        finally:
            for task in pending.values():
                task.cancel()

    def _ask(self, pending: Mapping[int, asyncio.Task[Any]]) -> dict[int, asyncio.Task[Any]]:
        """Send one request to each leader that has none under way; node -> its answer."""
        by_node: dict[int, list[tuple[int, int, int]]] = {}
        for partition, position in self._positions.items():
            if not self._wants(partition):
                continue
            node = self._client.cluster.leader_for_partition(TopicPartition(self._topic, partition))
            by_node.setdefault(-1 if node is None else node, []).append((partition, position, _PARTITION_BYTES))
        return {
            node: asyncio.create_task(self._request(node, partitions))
            for node, partitions in by_node.items()
            if node not in pending
        }

    async def _request(self, node: int, partitions: list[tuple[int, int, int]]) -> Any:
        if node < 0:
            raise NodeNotReadyError(f"no leader is known for partitions of {self._topic}")
        request = FetchRequest(self._wait_ms, 1, _RESPONSE_BYTES, 0, [(self._topic, partitions)], rack_id="")
        return await self._client.send(node, request)

    async def _take(self, task: asyncio.Task[Any]) -> list[tuple[int, list[RecordBatch]]]:
        """Return the batches of an answer and move the positions past them."""
        try:
            response = task.result()
            found = [
                self._advanced(partition, code, rest[0], rest[-1])
                for _, partitions in response.topics
                for partition, code, *rest in partitions
            ]
        except KafkaError as error:
            if time.monotonic() - self._answered > _GIVE_UP_SECONDS:
                raise LogError(f"reading {self._topic} stopped: {error!r}") from error
            await asyncio.sleep(_PAUSE_SECONDS)
            with contextlib.suppress(TimeoutError):  # a client whose metadata's task has ended never answers
                await asyncio.wait_for(self._client.force_metadata_update(), _GIVE_UP_SECONDS)
            return []
        self._answered = time.monotonic()
        return [(partition, batches) for partition, batches in found if batches or partition not in self._positions]

    def _advanced(self, partition: int, code: int, end: int, data: bytes) -> tuple[int, list[RecordBatch]]:
        if code:
            if code == OffsetOutOfRangeError.errno:
                raise LogError(
                    f"{self._topic}/{partition}: offset {self._positions.get(partition)} is no longer on the log"
                )
            raise for_code(code)(f"{self._topic}/{partition}")
        self.ends[partition] = end
        batches = []
        records = MemoryRecords(data)
        while (position := self._positions.get(partition)) is not None and records.has_next():
            batch = records.next_batch()
            if batch.next_offset <= position:
                continue  # the old and the new leader of a partition answered both
            self._positions[partition] = batch.next_offset
            if not batch.is_control_batch:
                batches.append(batch)
            if batch.next_offset >= self._bounds[partition]:
                del self._positions[partition]
        return partition, batches
