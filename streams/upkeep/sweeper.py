"""The sweep: dead holders leave the tables in the background, at a bounded rate.

Readers never see an entry of an ended epoch, swept or not; the sweep only gives the space back. A partition is swept
when a pod's epochs have moved since its last complete sweep, or pods are to be forgotten: a pod that has been gone for
long leaves its state and its positions too, so that pods that come and go under ever new names do not add up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Protocol

from kvatlas.bridge.errors import KvatlasError
from kvatlas.streams import metrics
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.index.apply import Swept, Validities, sweep_index
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import PartitionState

logger = logging.getLogger(__name__)

_SLICE_ENTRIES: Final = 1_000
_ENTRIES_PER_SECOND: Final = 20_000

Forget = Mapping[int, int]


class SweepItems(Protocol):
    """Finds what is dead in a slice of entries."""

    def __call__(self, items: list[tuple[bytes, bytes]], valid: Validities, *, forget: Forget) -> Swept:
        """Return what is to be written; ``forget`` is pod ref -> incarnation last seen."""


class Sweeper:
    """Sweeps the active partitions of one table in turn.

    Args:
        table: the table.
        validity: what holds now: pod ref -> which entries have not ended.
        sweep: finds what is dead in a slice of entries.
        interval_seconds: pause after a round over all partitions.
        forget: pods that may be forgotten now: pod ref -> incarnation last seen.
        on_deleted: told of table keys that a sweep has removed.
    """

    def __init__(
        self,
        table: BulkTable,
        validity: Callable[[], Validities],
        *,
        interval_seconds: float,
        sweep: SweepItems = sweep_index,
        forget: Callable[[], Forget] = dict,
        on_deleted: Callable[[Sequence[bytes]], Awaitable[None]] | None = None,
    ) -> None:
        self._table = table
        self._validity = validity
        self._sweep = sweep
        self._interval = interval_seconds
        self._forget = forget
        self._on_deleted = on_deleted
        self._swept: dict[int, tuple[Validities, Forget]] = {}

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(self._interval)
            for partition in list(self._table.states):
                try:
                    await self.sweep_partition(partition)
                except KvatlasError as error:
                    if not error.retriable:
                        raise
                    logger.warning("sweep of %s/%d: %s; goes on next time", self._table.name, partition, error)

    async def sweep_partition(self, partition: int) -> int:
        """Sweep one partition; returns the number of dead holders removed.

        Raises:
            ChangelogError: what was removed could not be written; nothing is lost.
        """
        valid, forget = dict(self._validity()), self._forget()
        if self._swept.get(partition) == (valid, forget):
            return 0
        start, dropped = b"", 0
        while (state := self._table.partition(partition)) is not None:
            async with state.lock:
                if self._table.partition(partition) is not state:
                    return dropped
                items = await state.items_apart(start, _SLICE_ENTRIES)
                if self._table.partition(partition) is not state:
                    return dropped
                found = self._sweep(items, valid, forget=forget)
                if found.dropped:
                    await self._write(state, found)
            if found.deletes and self._on_deleted is not None:
                await self._on_deleted(found.deletes)
            dropped += found.dropped
            metrics.SWEPT.labels(self._table.name).inc(found.seen)
            metrics.SWEEP_DROPPED.labels(self._table.name).inc(found.dropped)
            if len(items) < _SLICE_ENTRIES:
                self._swept[partition] = valid, forget
                metrics.SWEEPS.labels(self._table.name).inc()
                return dropped
            start = items[-1][0] + b"\x00"
            await asyncio.sleep(_SLICE_ENTRIES / _ENTRIES_PER_SECOND)
        return dropped

    async def _write(self, state: PartitionState, found: Swept) -> None:
        writes = {**found.puts, **dict.fromkeys(found.deletes)}
        await self._table.commit(state, ChangeSet(writes, state.meta.source_offset, state.meta.receive_ns))
