"""Gauges that are read off at intervals: sizes, cache, roles, lag."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from kvatlas.streams import metrics
from kvatlas.streams.app import BLOCK_INDEX, WorkerApp
from kvatlas.streams.store import Role
from kvatlas.streams.table import BulkTable

_INTERVAL_SECONDS: Final = 2.0


class Gauges:
    """Reads gauges off a worker's app.

    Args:
        app: the app.
        lag_of: partition of ``kv-blocks`` -> records behind, -1 when unknown.
    """

    def __init__(self, app: WorkerApp, lag_of: Callable[[int], int]) -> None:
        self._app = app
        self._lag_of = lag_of

    async def run(self) -> None:
        """Read off until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            for table in self._app.sources.values():
                self._table(table)

    def _table(self, table: BulkTable) -> None:
        states = list(table.store.states.values())
        for role in Role:
            metrics.ROLE.labels(table.name, role.value).set(sum(state.role is role for state in states))
        metrics.CACHE_HITS.labels(table.name).set(sum(state.cache.hits for state in states))
        metrics.CACHE_MISSES.labels(table.name).set(sum(state.cache.misses for state in states))
        metrics.CACHE_ENTRIES.labels(table.name).set(sum(len(state.cache) for state in states))
        metrics.CACHE_BYTES.labels(table.name).set(sum(state.cache.size_bytes for state in states))
        metrics.TABLE_BYTES.labels(table.name).set(sum(state.size_bytes() for state in states))
        metrics.TABLE_KEYS.labels(table.name).set(sum(state.entries() for state in states))
        for state in states:
            metrics.APPLIED_OFFSET.labels(table.name, state.partition).set(state.meta.source_offset)
            if table.name == BLOCK_INDEX:
                self._lag(state.partition, state.meta.receive_ns)

    def _lag(self, partition: int, receive_ns: int) -> None:
        lag = self._lag_of(partition)
        metrics.LAG_RECORDS.labels("index", partition).set(max(lag, 0))
        age_ms = (time.time_ns() - receive_ns) / 1e6 if lag > 0 and receive_ns else 0.0
        metrics.LAG_MS.labels("index", partition).set(max(age_ms, 0.0))
