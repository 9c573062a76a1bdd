"""Announcer: writes this worker's record to ``kv-workers``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.sending import send_record
from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.records import WorkerRecord

logger = logging.getLogger(__name__)

_RENEWED_SECONDS: Final = 2.0
#: Several renewals may be late before scorers look elsewhere.
_EXPIRY_NS: Final = 10_000_000_000


class Announcer:
    """Writes this worker's record: at once when roles change, and at intervals so that it does not expire.

    Args:
        producer: returns the started ``AIOKafkaProducer``.
        topic: ``kv-workers`` and its number of partitions.
        describe: returns the record as it is now, without times.
        clock: wall clock, ns since the epoch.
    """

    def __init__(
        self,
        producer: Callable[[], Any],
        topic: tuple[str, int],
        describe: Callable[[], WorkerRecord],
        *,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._producer = producer
        self._topic, self._partitions = topic
        self._describe = describe
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
            except LogError as error:
                logger.warning("kv-workers: not announced, tried again: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _RENEWED_SECONDS)

    async def announce(self) -> None:
        """Write the record now.

        Raises:
            LogError: not acknowledged.
        """
        now = self._clock()
        record = msgspec.structs.replace(self._describe(), updated_ns=now, expires_ns=now + _EXPIRY_NS)
        await self._send(record.worker, records.encode(record))

    async def withdraw(self) -> None:
        """Write a tombstone: this worker left.

        Raises:
            LogError: not acknowledged.
        """
        await self._send(self._describe().worker, None)

    async def _send(self, worker: str, value: bytes | None) -> None:
        partition = pod_ids.pod_partition(worker, self._partitions)
        await send_record(self._producer(), self._topic, worker.encode(), value, partition)
