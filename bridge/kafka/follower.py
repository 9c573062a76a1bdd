"""Following a compacted topic from its start: the newest value of every key, and what changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError

from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import end_tasks

logger = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0
_POLL_MS: Final = 500
_FETCH_WAIT_MS: Final = 50  # the embedded broker makes every record wait this long

Apply = Callable[[bytes | None, bytes | None], Any]


class TopicFollower:
    """Reads every partition of a topic from its first record on and hands over each record.

    Args:
        kafka: how to reach the brokers.
        topic: full topic name.
        apply: called with key and value (None for a tombstone) of each record.
        client_id: name in the brokers' logs.

    Attributes:
        caught_up: set once everything that was there at the start has been handed over.
    """

    def __init__(self, kafka: KafkaSettings, topic: str, apply: Apply, client_id: str) -> None:
        self._kafka = kafka
        self._topic = topic
        self._apply = apply
        self._client_id = client_id
        self._task: asyncio.Task[None] | None = None
        self.caught_up = asyncio.Event()

    async def start(self) -> None:
        """Begin to follow."""
        self._task = asyncio.create_task(self._run(), name=f"follow-{self._topic}")

    async def stop(self) -> None:
        """Stop following."""
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None

    async def _run(self) -> None:
        positions: dict[TopicPartition, int] = {}
        while True:
            consumer = AIOKafkaConsumer(
                **client_config(self._kafka, self._client_id),
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                fetch_max_wait_ms=_FETCH_WAIT_MS,
            )
            try:
                await consumer.start()
                await self._follow(consumer, positions)
            except KafkaError as error:
                logger.warning("%s: cannot be followed, tried again: %s", self._topic, error)
                await asyncio.sleep(_RETRY_SECONDS)
            finally:
                await consumer.stop()

    async def _follow(self, consumer: Any, positions: dict[TopicPartition, int]) -> None:
        numbers = await partitions_of(consumer, self._topic)
        if not numbers:
            raise UnknownTopicOrPartitionError(self._topic)
        partitions = [TopicPartition(self._topic, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions)
        for partition in partitions:
            positions[partition] = max(starts[partition], positions.get(partition, 0))
            consumer.seek(partition, positions[partition])
        while True:
            if not self.caught_up.is_set() and all(positions[at] >= ends[at] for at in partitions):
                self.caught_up.set()
            batches = await consumer.getmany(timeout_ms=_POLL_MS)
            for partition, batch in batches.items():
                for record in batch:
                    self._apply(record.key, record.value)
                positions[partition] = batch[-1].offset + 1


async def partitions_of(client: Any, topic: str) -> set[int]:
    """Return the partitions of a topic as the brokers know them now; empty when there is no such topic."""
    cluster = client._client.cluster
    found = cluster.partitions_for_topic(topic)
    if not found:
        client._client.add_topic(topic)
        await client._client.force_metadata_update()
        found = cluster.partitions_for_topic(topic)
    return set(found or ())
