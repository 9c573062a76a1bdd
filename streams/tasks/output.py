"""Records that the agents produce beside their tables: block updates and dead letters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from kvatlas.bridge.model import pod_ids, topics
from kvatlas.streams.resolve.effects import DeadLetter, PodUpdates, encode

_GATHER_SECONDS: Final = 0.01


class _Waiting(NamedTuple):
    """Updates that somebody waits to be sent."""

    segments: list[PodUpdates]
    receive_ns: int
    done: asyncio.Future[None]


def _finish(waiting: Sequence[_Waiting], error: Exception | None = None) -> None:
    for one in waiting:
        if not one.done.done():  # else its task was cut off
            if error is None:
                one.done.set_result(None)
            else:
                one.done.set_exception(error)


class Output:
    """Records that the agents produce beside their tables.

    Args:
        producer: returns the started ``AIOKafkaProducer``.
        blocks: topic ``kv-blocks`` and its number of partitions.
        dlq: topic ``kv-events-dlq`` and its number of partitions.
        events: topic name of ``kv-events``, named as the origin of dead letters.
    """

    def __init__(self, producer: Callable[[], Any], blocks: tuple[str, int], dlq: tuple[str, int], events: str) -> None:
        self.blocks_partitions = blocks[1]
        self._producer = producer
        self._blocks = blocks[0]
        self._dlq, self._dlq_partitions = dlq
        self._events = events
        self._waiting: list[_Waiting] = []
        self._sending: asyncio.Task[None] | None = None
        self._sent_at = 0.0

    async def send_blocks(self, segments: list[PodUpdates], receive_ns: int) -> None:
        """Send block updates, together with those of other partitions, and wait until the brokers have them.

        Whoever sends updates of a pod waits for them before the next: a pod's updates stay in order.

        Args:
            segments: the updates.
            receive_ns: newest receive time among them.

        Raises:
            KafkaError: not acknowledged.
        """
        if not segments:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(segments, receive_ns, done))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_waiting())
        await done

    async def _send_waiting(self) -> None:
        """Send what waits, all of it at once, until nothing does.

        Each record has a price at both ends, and engines' messages are small: those that come within a few ms share
        their records.
        """
        try:
            loop = asyncio.get_running_loop()
            while self._waiting:
                await asyncio.sleep(max(self._sent_at + _GATHER_SECONDS - loop.time(), 0.0))
                self._sent_at = loop.time()
                waiting, self._waiting = self._waiting, []
                try:
                    await self._send_together(waiting)
                except Exception as error:  # noqa: BLE001 # whoever waits for it decides
                    _finish(waiting, error)
                else:
                    _finish(waiting)
        finally:
            self._sending = None

    async def _send_together(self, waiting: Sequence[_Waiting]) -> None:
        producer = self._producer()
        segments = [segment for one in waiting for segment in one.segments]
        by_partition = encode(segments, self.blocks_partitions, max(one.receive_ns for one in waiting))
        pending = [
            await producer.send(self._blocks, value, partition=partition)
            for partition, values in by_partition.items()
            for value in values
        ]
        await asyncio.gather(*pending)

    async def send_dead(self, letters: Sequence[DeadLetter]) -> None:
        """Send dead letters and wait until the brokers have them.

        Raises:
            KafkaError: not acknowledged.
        """
        producer = self._producer()
        pending = []
        for letter in letters:
            headers = [(name, value) for name, value in letter.headers.items() if name != topics.H_REASON]
            headers += [
                (topics.H_REASON, letter.reason.encode()[:4096]),
                (topics.H_ORIGIN, f"{self._events}/{letter.partition}/{letter.offset}".encode()),
            ]
            partition = pod_ids.pod_partition(letter.pod, self._dlq_partitions)
            pending.append(
                await producer.send(
                    self._dlq, letter.raw, key=letter.pod.encode(), partition=partition, headers=headers
                )
            )
        await asyncio.gather(*pending)

    async def send_dead_blocks(self, partition: int, offset: int, value: bytes, reason: str) -> None:
        """Dead-letter one ``kv-blocks`` record that cannot be read.

        Raises:
            KafkaError: not acknowledged.
        """
        headers = [
            (topics.H_REASON, reason.encode()[:4096]),
            (topics.H_ORIGIN, f"{self._blocks}/{partition}/{offset}".encode()),
        ]
        target = partition % self._dlq_partitions
        await (await self._producer().send(self._dlq, value, partition=target, headers=headers))
