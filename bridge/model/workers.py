"""Worker directory: who answers for which partition, as ``kv-workers`` tells it. Pure; the clock is passed in.

Workers that redirect and scorers that route follow the same one, so both name the same owner.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.block_key import KEY_VERSION
from kvatlas.bridge.model.records import CATALOG_KEY, IndexCatalog, WorkerRecord, decode
from kvatlas.bridge.model.topics import BASE_VERSION

log = logging.getLogger(__name__)


class Route(NamedTuple):
    """Endpoints that may answer for a partition, best first.

    Attributes:
        owners: active and caught up; the newest assignment first.
        standbys: may be behind: standby copies, then owners whose announcement ran out.
    """

    owners: tuple[str, ...]
    standbys: tuple[str, ...]


class Layout(NamedTuple):
    """What all workers of a deployment agree on."""

    partition_count: int
    block_size_tokens: int


_NOWHERE = Route((), ())


def _claim(record: WorkerRecord) -> tuple[int, int]:
    """Return how late a worker's assignment is: two owners overlap while partitions move, the later one is right."""
    return record.generation, record.updated_ns


class WorkerDirectory:
    """All workers known of one index version, by worker id.

    Attributes:
        catalog: the index versions and the active one, as last announced.
        records: worker id -> its newest record.
        refused: worker id -> why its announcement is not used.
        rejected: records that could not be read.
        version: grows with every change; caches of routes compare it.
    """

    def __init__(self, clock_ns: Callable[[], int], index_version: str = BASE_VERSION) -> None:
        """Start empty.

        Args:
            clock_ns: wall clock in ns, as the workers' expiry is.
            index_version: workers of other versions are passed over.
        """
        self.catalog = IndexCatalog()
        self._index_version = index_version
        self.records: dict[str, WorkerRecord] = {}
        self.refused: dict[str, str] = {}
        self.rejected = 0
        self.version = 0
        self._clock_ns = clock_ns
        self._layout: Layout | None = None
        self._routes: dict[int, Route] = {}
        self._routes_until_ns = 0

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Apply one ``kv-workers`` record; one that cannot be read is counted and left out."""
        if key == CATALOG_KEY:
            self._take_catalog(value)
            return
        name = (key or b"").decode("utf-8", "replace")
        self.version += 1
        self._routes_until_ns = 0
        if not value:
            self.records.pop(name, None)
            self.refused.pop(name, None)
        else:
            try:
                record = decode(WorkerRecord, value)
            except WireError as error:
                self.rejected += 1
                log.warning("kv-workers: record of %s: %s", name, error)
                return
            if record.index_version == self._index_version:
                self.records[name] = record
            else:
                self.records.pop(name, None)
        self._settle()

    def _take_catalog(self, value: bytes | None) -> None:
        try:
            self.catalog = decode(IndexCatalog, value) if value else IndexCatalog()
        except WireError as error:
            self.rejected += 1
            log.warning("kv-workers: catalog of index versions: %s", error)

    @property
    def layout(self) -> Layout | None:
        """Partition count and block size that the workers announce; None before the first one."""
        return self._layout

    def _settle(self) -> None:
        """Choose the layout (of the newest record that is still valid) and refuse workers that differ."""
        now = self._clock_ns()
        usable = [r for r in self.records.values() if r.partition_count > 0 and r.key_version == KEY_VERSION]
        newest = max(usable, key=lambda r: (r.expires_ns > now, r.updated_ns), default=None)
        if newest is not None:
            self._layout = Layout(newest.partition_count, newest.block_size_tokens)
        refused = {}
        for name, record in self.records.items():
            if record.key_version != KEY_VERSION:
                refused[name] = f"block key version {record.key_version}; this build knows {KEY_VERSION}"
            elif record.partition_count > 0 and self._layout != Layout(
                record.partition_count, record.block_size_tokens
            ):
                refused[name] = (
                    f"{record.partition_count} partitions of {record.block_size_tokens}-token blocks, "
                    f"while the newest worker has {self._layout}"
                )
        for name in refused.keys() - self.refused.keys():
            log.error("worker %s is not asked: %s", name, refused[name])
        self.refused = refused

    def route(self, partition: int) -> Route:
        """Return who may answer for a partition now."""
        now = self._clock_ns()
        if now >= self._routes_until_ns:
            self._build(now)
        return self._routes.get(partition, _NOWHERE)

    def owner(self, partition: int, besides: str = "") -> str:
        """Return the endpoint of the worker that owns a partition, empty when nobody says so.

        Args:
            partition: of ``kv-blocks``.
            besides: a worker that does not count: the one that asks.

        Of several that say so the one with the latest assignment: a worker that died, or stood still and has just gone
        on, may still say what was true before. One that restores the partition is named where none has it yet.
        """
        now = self._clock_ns()
        fresh = [record for record in self.records.values() if record.worker != besides and record.expires_ns > now]
        claims = [record for record in fresh if partition in record.partitions]
        claims = claims or [record for record in fresh if partition in record.restoring]
        return max(claims, key=_claim).endpoint if claims else ""

    def _build(self, now: int) -> None:
        self.version += 1
        owners: dict[int, list[WorkerRecord]] = {}
        standbys: dict[int, list[WorkerRecord]] = {}
        expired: dict[int, list[WorkerRecord]] = {}
        until = now + 3_600_000_000_000
        for name, record in self.records.items():
            if name in self.refused or not record.endpoint:
                continue
            fresh = record.expires_ns > now
            if fresh:
                until = min(until, record.expires_ns)
            for partition in record.partitions:
                (owners if fresh else expired).setdefault(partition, []).append(record)
            if fresh:
                for partition in record.standby:
                    standbys.setdefault(partition, []).append(record)
        self._routes = {}
        for partition in owners.keys() | standbys.keys() | expired.keys():
            ranked = sorted(owners.get(partition, []), key=_claim, reverse=True)
            behind = sorted(
                standbys.get(partition, []), key=lambda r: r.offsets.get(partition, -1), reverse=True
            ) + sorted(expired.get(partition, []), key=lambda r: r.updated_ns, reverse=True)
            first = tuple(dict.fromkeys(r.endpoint for r in ranked))
            self._routes[partition] = Route(
                first, tuple(e for e in dict.fromkeys(r.endpoint for r in behind) if e not in first)
            )
        self._routes_until_ns = until

    def endpoints(self) -> set[str]:
        """Return every endpoint that a route may name."""
        return {record.endpoint for record in self.records.values() if record.endpoint}

    @property
    def stale(self) -> bool:
        """Whether no announcement holds any more: Kafka or all workers are away, and what is known only ages."""
        now = self._clock_ns()
        return self._layout is not None and not any(record.expires_ns > now for record in self.records.values())

    @property
    def covered(self) -> bool:
        """Whether every partition has an owner that answers for it now."""
        return self._layout is not None and not self.uncovered()

    def uncovered(self) -> list[int]:
        """Return partitions that no owner answers for now."""
        if self._layout is None:
            return []
        return [p for p in range(self._layout.partition_count) if not self.route(p).owners]
