"""Pod publisher: writes what resolve learnt of pods to ``kv-pods``, at a bounded rate."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from aiokafka.errors import KafkaError

from kvatlas.bridge.kafka.sending import send_record
from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.records import PodRecord

logger = logging.getLogger(__name__)


class PodPublisher:
    """Writes ``kv-pods`` records of the streams side: raised epochs at once, the rest at a bounded rate per pod.

    Args:
        producer: returns the started ``AIOKafkaProducer``.
        topic: ``kv-pods`` and its number of partitions.
        interval_seconds: least time between two unhurried records of one pod.
        writer: writer in the records' keys, of the worker's index version.
    """

    def __init__(
        self,
        producer: Callable[[], Any],
        topic: tuple[str, int],
        interval_seconds: float = 0.2,
        *,
        writer: str = pod_ids.WRITER_STREAMS,
    ) -> None:
        self._writer = writer
        self._producer = producer
        self._topic, self._partitions = topic
        self._interval = interval_seconds
        self._waiting: dict[str, PodRecord] = {}
        self._sent_at: dict[str, float] = {}

    async def send(self, pods: Mapping[str, PodRecord]) -> None:
        """Send records now and wait until the brokers have them.

        Raises:
            KafkaError: not acknowledged.
        """
        now = time.monotonic()
        pending = []
        for pod, record in pods.items():
            self._waiting.pop(pod, None)
            self._sent_at[pod] = now
            pending.append(await self._send(pod, record))
        await asyncio.gather(*pending)

    def offer(self, pods: Mapping[str, PodRecord]) -> None:
        """Keep the newest record of each pod for the next turn of :meth:`run`."""
        self._waiting.update(pods)

    async def run(self) -> None:
        """Send waiting records, each pod at most once in the interval, until cancelled."""
        while True:
            await asyncio.sleep(self._interval / 2 or 0.01)
            try:
                await self.flush()
            except KafkaError as error:
                logger.warning("kv-pods: records not acknowledged, newer ones follow: %s", error)

    async def flush(self, everything: bool = False) -> None:
        """Send waiting records whose interval has passed, or all.

        Raises:
            KafkaError: not acknowledged.
        """
        now = time.monotonic()
        due = {
            pod: record
            for pod, record in self._waiting.items()
            if everything or now - self._sent_at.get(pod, 0.0) >= self._interval
        }
        if due:
            await self.send(due)

    async def withdraw(self, pod: str) -> None:
        """Remove the record of a pod that is forgotten, with a tombstone.

        Raises:
            LogError: not acknowledged.
        """
        self._waiting.pop(pod, None)
        self._sent_at.pop(pod, None)
        partition = pod_ids.pod_partition(pod, self._partitions)
        key = pod_ids.pod_key(self._writer, pod)
        await send_record(self._producer(), self._topic, key, None, partition)

    def forget(self) -> None:
        """Drop what waits: the pods' partitions went to another worker."""
        self._waiting.clear()

    async def _send(self, pod: str, record: PodRecord) -> Any:
        return await self._producer().send(
            self._topic,
            records.encode(record),
            key=pod_ids.pod_key(self._writer, pod),
            partition=pod_ids.pod_partition(pod, self._partitions),
        )
