"""Announcing this worker on ``kv-workers``, and knowing the others from it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.records import WorkerRecord

logger = logging.getLogger(__name__)


class WorkerBook:
    """What ``kv-workers`` says: who owns which partition of ``kv-blocks``, in one index version."""

    def __init__(self, clock: Callable[[], int] = time.time_ns, version: str = topics.BASE_VERSION) -> None:
        self._version = version
        self._records: dict[str, WorkerRecord] = {}
        self._clock = clock

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Take a ``kv-workers`` record over; a tombstone removes the worker."""
        if key == records.CATALOG_KEY:
            return
        worker = (key or b"").decode(errors="replace")
        if value is None:
            self._records.pop(worker, None)
            return
        try:
            record = records.decode(WorkerRecord, value)
        except WireError as error:
            logger.warning("kv-workers: record of %r cannot be read: %s", worker, error)
            return
        if record.index_version == self._version:
            self._records[worker] = record
        else:
            self._records.pop(worker, None)

    def owner(self, partition: int, besides: str) -> str:
        """Return the endpoint of the other worker that owns a partition, empty when nobody says so.

        Of several that say so the one with the latest assignment: a worker that died, or stood still and has just gone
        on, may still say what was true before.
        """
        now = self._clock()
        claims = [
            record
            for record in self._records.values()
            if record.worker != besides
            and record.expires_ns > now
            and (partition in record.partitions or partition in record.restoring)
        ]
        return max(claims, key=lambda record: (record.generation, record.updated_ns)).endpoint if claims else ""

    def workers(self) -> Iterable[WorkerRecord]:
        """Return the records of all workers, expired ones too."""
        return self._records.values()


class Announcer:
    """Writes this worker's record: at once when roles change, and at intervals so that it does not expire.

    Args:
        producer: returns the started ``AIOKafkaProducer``.
        topic: ``kv-workers`` and its number of partitions.
        describe: returns the record as it is now, without times.
        interval_seconds: how often it is renewed.
        expiry_seconds: how long it holds.
        clock: wall clock, ns since the epoch.
    """

    def __init__(
        self,
        producer: Callable[[], Any],
        topic: tuple[str, int],
        describe: Callable[[], WorkerRecord],
        *,
        interval_seconds: float,
        expiry_seconds: float,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._producer = producer
        self._topic, self._partitions = topic
        self._describe = describe
        self._interval = interval_seconds
        self._expiry_ns = int(expiry_seconds * 1e9)
        self._clock = clock
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Ask for a record at once."""
        self._changed.set()

    async def run(self) -> None:
        """Announce until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self.announce()
            except (KafkaError, OSError) as error:
                logger.warning("kv-workers: not announced, tried again: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._interval)

    async def announce(self) -> None:
        """Write the record now.

        Raises:
            KafkaError: not acknowledged.
        """
        now = self._clock()
        record = msgspec.structs.replace(self._describe(), updated_ns=now, expires_ns=now + self._expiry_ns)
        await self._send(record.worker, records.encode(record))

    async def withdraw(self) -> None:
        """Write a tombstone: this worker left.

        Raises:
            KafkaError: not acknowledged.
        """
        await self._send(self._describe().worker, None)

    async def _send(self, worker: str, value: bytes | None) -> None:
        partition = pod_ids.pod_partition(worker, self._partitions)
        await (await self._producer().send(self._topic, value, key=worker.encode(), partition=partition))
