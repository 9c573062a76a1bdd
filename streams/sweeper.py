"""The sweep: dead holders leave the tables in the background, at a bounded rate.

Readers never see an entry of an ended epoch, swept or not; the sweep only gives the space back. A partition is swept
when a pod's epochs have moved since its last complete sweep.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Final

from aiokafka.errors import KafkaError
from mode import get_logger

from kvatlas.bridge.errors import KvatlasError
from kvatlas.streams import metrics
from kvatlas.streams.index import Swept, Validity, sweep_index
from kvatlas.streams.store import PartitionState, Role
from kvatlas.streams.table import BulkTable

logger = get_logger(__name__)

_SLICE_ENTRIES: Final = 1_000

SweepItems = Callable[[list[tuple[bytes, bytes]], Validity], Swept]


class Sweeper:
    """Sweeps the active partitions of one table in turn.

    Args:
        table: the table.
        validity: what holds now: pod ref -> (valid_from, gpu_valid_from).
        sweep: finds what is dead in a slice of entries.
        interval_seconds: pause after a round over all partitions.
        entries_per_second: bound of the rate.
    """

    def __init__(
        self,
        table: BulkTable,
        validity: Callable[[], Validity],
        *,
        interval_seconds: float,
        entries_per_second: int,
        sweep: SweepItems = sweep_index,
    ) -> None:
        self._table = table
        self._validity = validity
        self._sweep = sweep
        self._interval = interval_seconds
        self._rate = entries_per_second
        self._swept: dict[int, Validity] = {}

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            for partition in list(self._table.store.states):
                try:
                    await self.sweep_partition(partition)
                except (KvatlasError, KafkaError) as error:
                    logger.warning("sweep of %s/%d: %s; goes on next time", self._table.name, partition, error)

    async def sweep_partition(self, partition: int) -> int:
        """Sweep one partition; returns the number of dead holders removed.

        Raises:
            ChangelogError: what was removed could not be written; nothing is lost.
        """
        valid = dict(self._validity())
        if self._swept.get(partition) == valid:
            return 0
        start, dropped = b"", 0
        while (state := self._mine(partition)) is not None:
            async with state.lock:
                if self._mine(partition) is not state:
                    return dropped
                items = list(itertools.islice(state.items(start), _SLICE_ENTRIES))
                found = self._sweep(items, valid)
                if found.dropped:
                    await self._write(partition, state, found)
            dropped += found.dropped
            metrics.SWEPT.labels(self._table.name).inc(found.seen)
            metrics.SWEEP_DROPPED.labels(self._table.name).inc(found.dropped)
            if len(items) < _SLICE_ENTRIES:
                self._swept[partition] = valid
                metrics.SWEEPS.labels(self._table.name).inc()
                return dropped
            start = items[-1][0] + b"\x00"
            await asyncio.sleep(_SLICE_ENTRIES / self._rate)
        return dropped

    def _mine(self, partition: int) -> PartitionState | None:
        state = self._table.store.states.get(partition)
        return state if state is not None and state.role is Role.ACTIVE else None

    async def _write(self, partition: int, state: PartitionState, found: Swept) -> None:
        view = self._table.view(partition)
        for key, value in found.puts.items():
            view.put(key, value)
        for key in found.deletes:
            view.delete(key)
        await self._table.commit(partition, view, state.meta.source_offset, state.meta.receive_ns)
