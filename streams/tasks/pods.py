"""Pod records: publishing what resolve learnt of pods, and following what everybody knows of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.model.validity import Validity

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
        interval_seconds: float,
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
            KafkaError: not acknowledged.
        """
        self._waiting.pop(pod, None)
        self._sent_at.pop(pod, None)
        partition = pod_ids.pod_partition(pod, self._partitions)
        key = pod_ids.pod_key(self._writer, pod)
        await (await self._producer().send(self._topic, None, key=key, partition=partition))

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


class PodBook:
    """What ``kv-pods`` says, both writers merged.

    Args:
        version: index version whose resolve agents count; those of other versions are passed over.

    Attributes:
        bad: records that could not be read.
        on_changed: told the pod id of every record taken over.
    """

    def __init__(self, version: str = topics.BASE_VERSION) -> None:
        self._streams = pod_ids.streams_writer(version)
        self._records: dict[tuple[str, str], PodRecord] = {}
        self.bad = 0
        self.on_changed: Callable[[str], None] | None = None

    def apply(self, key: bytes | None, value: bytes | None) -> str | None:
        """Take a ``kv-pods`` record over; returns the pod id it was about."""
        writer, _, pod = (key or b"").decode(errors="replace").partition("|")
        if not pod:
            self.bad += 1
            return None
        if writer not in (pod_ids.WRITER_BRIDGE, self._streams):
            return None
        if value is None:
            self._records.pop((writer, pod), None)
            self._tell(pod)
            return pod
        try:
            record = records.decode(PodRecord, value)
        except WireError as error:
            self.bad += 1
            logger.warning("kv-pods: record of %r cannot be read: %s", key, error)
            return None
        known = self._records.get((writer, pod))
        if known is not None and record.epoch < known.epoch:
            return None  # late, of an earlier owner of the pod: epochs only grow, and bounds must not go back
        self._records[writer, pod] = record
        self._tell(pod)
        return pod

    def _tell(self, pod: str) -> None:
        if self.on_changed is not None:
            self.on_changed(pod)

    def merged(self, pod: str) -> PodRecord | None:
        """Return what both writers know of a pod, None when neither knows it."""
        bridge = self._records.get((pod_ids.WRITER_BRIDGE, pod))
        streams = self._records.get((self._streams, pod))
        return None if bridge is None and streams is None else records.merge_pod(bridge, streams)

    def pods(self) -> list[PodRecord]:
        """Return all pods, merged."""
        names = sorted({pod for _, pod in self._records})
        return [found for pod in names if (found := self.merged(pod)) is not None]

    def ended(self) -> dict[int, Validity]:
        """Return pod ref -> which entries have not ended, for the sweep."""
        return {pod_ids.pod_ref(pod.pod): pod.ended for pod in self.pods()}

    def gone_since(self, before_ns: int) -> dict[int, int]:
        """Return pod ref -> incarnation, of pods that were gone before a time (ns since the epoch) and are since.

        Only pods that the bridge still has a record of: it keeps what is late of them from coming back to life.
        """
        found = {}
        for (writer, name), record in self._records.items():
            if writer != pod_ids.WRITER_BRIDGE or record.state != records.GONE or record.updated_ns >= before_ns:
                continue
            pod = self.merged(name)
            assert pod is not None
            if max(pod.updated_ns, pod.receive_ns) < before_ns:
                found[pod_ids.pod_ref(name)] = epochs.incarnation_of(pod.epoch)
        return found

    def names(self) -> dict[int, str]:
        """Return pod ref -> pod id."""
        return {pod_ids.pod_ref(pod): pod for _, pod in self._records}
