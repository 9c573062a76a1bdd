"""Record batches of a range, fetched while the ones before are being read.

A consumer makes an object of every record and asks for more when all of it has been taken. Here the brokers are asked
for the next stretch as soon as the offsets of the last one are known, which its batch headers say, and records are made
from the batches by their reader.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, NodeNotReadyError, OffsetOutOfRangeError, for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.memory_records import MemoryRecords

from kvatlas.bridge.errors import LogError

#: A batch of records as aiokafka reads it: iterable, each record with offset, timestamp, key, value and headers.
RecordBatch = Any

_PARTITION_BYTES: Final = 4 * 1024 * 1024
_RESPONSE_BYTES: Final = 32 * 1024 * 1024
_WAIT_MS: Final = 200
_PAUSE_SECONDS: Final = 0.2
_GIVE_UP_SECONDS: Final = 30.0


class RangeFetcher:
    """Fetches the batches of some partitions of one topic up to given offsets.

    Args:
        client: a started ``AIOKafkaClient``.
        topic: full topic name.
        bounds: partition -> (first offset, offset after the last).
        wants: asked before every fetch whether more of a partition is wanted now. It must want one of those that are
            left whenever all that was fetched has been taken.
    """

    def __init__(
        self,
        client: Any,
        topic: str,
        bounds: Mapping[int, tuple[int, int]],
        wants: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._wants = wants
        self._client = client
        self._topic = topic
        self._positions = {partition: start for partition, (start, end) in bounds.items() if start < end}
        self._ends = {partition: end for partition, (_, end) in bounds.items()}
        self._answered = time.monotonic()

    @property
    def left(self) -> Collection[int]:
        """Partitions that have not been read to the end of their range."""
        return self._positions.keys()

    async def batches(self) -> AsyncIterator[tuple[int, list[RecordBatch]]]:
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
        request = FetchRequest(_WAIT_MS, 1, _RESPONSE_BYTES, 0, [(self._topic, partitions)], rack_id="")
        return await self._client.send(node, request)

    async def _take(self, task: asyncio.Task[Any]) -> list[tuple[int, list[RecordBatch]]]:
        """Return the batches of an answer and move the positions past them."""
        try:
            response = task.result()
            found = [
                self._advanced(partition, code, rest[-1])
                for _, partitions in response.topics
                for partition, code, *rest in partitions
            ]
        except KafkaError as error:
            if time.monotonic() - self._answered > _GIVE_UP_SECONDS:
                raise LogError(f"reading {self._topic} stopped: {error!r}") from error
            await asyncio.sleep(_PAUSE_SECONDS)
            await self._client.force_metadata_update()
            return []
        self._answered = time.monotonic()
        return [(partition, batches) for partition, batches in found if batches or partition not in self._positions]

    def _advanced(self, partition: int, code: int, data: bytes) -> tuple[int, list[RecordBatch]]:
        if code:
            if code == OffsetOutOfRangeError.errno:
                raise LogError(
                    f"{self._topic}/{partition}: offset {self._positions.get(partition)} is no longer on the log"
                )
            raise for_code(code)(f"{self._topic}/{partition}")
        batches = []
        records = MemoryRecords(data)
        while (position := self._positions.get(partition)) is not None and records.has_next():
            batch = records.next_batch()
            if batch.next_offset <= position:
                continue  # the old and the new leader of a partition answered both
            self._positions[partition] = batch.next_offset
            if not batch.is_control_batch:
                batches.append(batch)
            if batch.next_offset >= self._ends[partition]:
                del self._positions[partition]
        return partition, batches
