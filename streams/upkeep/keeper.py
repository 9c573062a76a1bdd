"""Idle-partition heartbeat: an owner with nothing to write writes a meta record, so that a replaced one notices.

A writer learns from the offset of its own batch whether somebody else wrote before it (``fence``). A partition
without traffic would not learn it before compaction has acted on what the other wrote, so its owner writes a batch
without entries from time to time, two small records.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from kvatlas.bridge.errors import KvatlasError
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import PartitionState, Role

logger = logging.getLogger(__name__)

INTERVAL_SECONDS: Final = 60.0


class Keeper:
    """Writes to the changelogs of partitions that are idle, or that have entries to be written again.

    Args:
        tables: the worker's.
        may_commit: whether this worker is sure to own its partitions.
        interval_seconds: a changelog that was not written for so long is idle.
        clock: wall clock, ns since the epoch.
    """

    def __init__(
        self,
        tables: Iterable[BulkTable],
        *,
        may_commit: Callable[[], bool],
        interval_seconds: float = INTERVAL_SECONDS,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._tables = list(tables)
        self._may_commit = may_commit
        self._interval = interval_seconds
        self._clock = clock

    async def run(self) -> None:
        """Keep until cancelled.

        Raises:
            FencedError: another worker owns a partition that this one took for its own.
            KvatlasError: whatever else cannot be tried again.
        """
        while True:
            await asyncio.sleep(self._interval / 12)
            try:
                await self.look()
            except KvatlasError as error:
                if not error.retriable:
                    raise
                logger.warning("idle changelogs cannot be written, tried again: %s", error)

    async def look(self) -> int:
        """Look at all partitions once; returns how many were written.

        Raises:
            FencedError: another worker owns a partition that this one took for its own.
            ChangelogError: Kafka did not acknowledge.
        """
        written = 0
        for table in self._tables:
            for partition, state in list(table.states.items()):
                if not self._due(state):
                    continue
                async with state.lock:
                    if not self._due(state) or not self._may_commit() or table.states.get(partition) is not state:
                        continue
                    await table.commit(state, ChangeSet({}, state.meta.source_offset, 0))
                    written += 1
        return written

    def _due(self, state: PartitionState) -> bool:
        idle = self._clock() - state.meta.written_ns > self._interval * 1e9
        return state.role is Role.ACTIVE and (idle or bool(state.foreign))
