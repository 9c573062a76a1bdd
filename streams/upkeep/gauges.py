"""Gauges that are read off at intervals: sizes, cache, roles, lag."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from kvatlas.streams import metrics
from kvatlas.streams.faust_app.app import WorkerApp
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.state.partition import PartitionState, Role

_INTERVAL_SECONDS: Final = 2.0


class Gauges:
    """Reads gauges off a worker's app.

    Args:
        app: the app.
    """

    def __init__(self, app: WorkerApp) -> None:
        self._app = app
        self._shown: set[tuple[str, str, int]] = set()

    async def run(self) -> None:
        """Update the gauges periodically, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            self.read()

    def read(self) -> None:
        """Read off once."""
        shown: set[tuple[str, str, int]] = set()
        for topic, table in self._app.sources.items():
            tasks = self._app.tasks[topic]
            self._table(table)
            metrics.QUEUED_RECORDS.labels(tasks.name).set(tasks.held)
            for state in table.states.values():
                if state.role is Role.ACTIVE:
                    shown.add((tasks.name, table.name, state.partition))
                    metrics.APPLIED_OFFSET.labels(table.name, state.partition).set(state.meta.source_offset)
                    self._lag(tasks.name, topic, state)
        for agent, name, partition in self._shown - shown:  # another worker shows them now
            metrics.APPLIED_OFFSET.remove(name, partition)
            metrics.LAG_RECORDS.remove(agent, partition)
            metrics.LAG_MS.remove(agent, partition)
        self._shown = shown

    def _table(self, table: BulkTable) -> None:
        states = list(table.states.values())
        for role in Role:
            metrics.ROLE.labels(table.name, role.value).set(sum(state.role is role for state in states))
        metrics.CACHE_HITS.labels(table.name).set(sum(state.cache.hits for state in states))
        metrics.CACHE_MISSES.labels(table.name).set(sum(state.cache.misses for state in states))
        metrics.CACHE_ENTRIES.labels(table.name).set(sum(len(state.cache) for state in states))
        metrics.CACHE_BYTES.labels(table.name).set(sum(state.cache.size_bytes for state in states))
        metrics.TABLE_BYTES.labels(table.name).set(sum(state.size_bytes() for state in states))
        metrics.TABLE_KEYS.labels(table.name).set(sum(state.entries() for state in states))

    def _lag(self, agent: str, topic: str, state: PartitionState) -> None:
        reflected = state.reflected
        end = self._app.source_end(topic, state.partition)
        lag = 0 if end is None else max(end - reflected.source_offset - 1, 0)
        metrics.LAG_RECORDS.labels(agent, state.partition).set(lag)
        age_ms = (time.time_ns() - reflected.receive_ns) / 1e6 if lag > 0 and reflected.receive_ns else 0.0
        metrics.LAG_MS.labels(agent, state.partition).set(max(age_ms, 0.0))
