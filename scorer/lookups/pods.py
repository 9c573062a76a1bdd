"""Pods as ``kv-pods`` tells them: both writers' records joined, and the fleet that the walk reads.

Pure: records go in, a snapshot comes out. Most records only move a pod's sequence and age; those cost nothing but
their own decoding. Only a change of what index entries *mean* (epochs, groups, store, model, liveness) builds a
new :class:`~kvatlas.scorer.scoring.walk.Fleet`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.records import GONE, PodRecord
from kvatlas.bridge.model.topics import BASE_VERSION
from kvatlas.scorer.scoring.fleet import Fleet, is_server, meaning


class Changes:
    """Names of pods that have changed and were not taken yet, each once: a slow reader misses repetitions only."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._names)

    def put(self, name: str) -> None:
        """Note that a pod has changed."""
        self._names[name] = None
        self._filled.set()

    async def get(self) -> str:
        """Return the name that has waited longest, once there is one."""
        while not self._names:
            self._filled.clear()
            await self._filled.wait()
        name = next(iter(self._names))
        del self._names[name]
        return name


class PodTable:
    """All pods known, by pod id, as one index version tells what their events mean.

    Attributes:
        directory: both writers' records.
        merged: pod id -> both writers' records joined.
    """

    def __init__(self, block_size_tokens: int = 16, index_version: str = BASE_VERSION) -> None:
        self.directory = PodDirectory(index_version)
        self.directory.on_changed = self._changed
        self.merged: Mapping[str, PodRecord] = self.directory.merged
        self.apply = self.directory.apply
        self.put = self.directory.put
        self.parts = self.directory.parts
        self.read_version = self.directory.read_version
        self._block_size_tokens = block_size_tokens
        self._fleet: Fleet | None = None
        self._models: frozenset[str] | None = None
        self._adapters: dict[str, tuple[str, ...]] = {}
        self._watchers: set[Changes] = set()

    @property
    def fleet(self) -> Fleet:
        """The pods that may score, as of now."""
        if self._fleet is None:
            records = (record for name, record in self.merged.items() if name not in self.directory.clashes)
            self._fleet = Fleet(records, self._block_size_tokens)
        return self._fleet

    def is_model(self, name: str) -> bool:
        """Whether a pod serves a model of this name."""
        return name in self._served()

    def bases_of(self, adapter: str) -> tuple[str, ...]:
        """Return the models of which pods have announced blocks of an adapter."""
        self._served()
        return self._adapters.get(adapter, ())

    def _served(self) -> frozenset[str]:
        if self._models is None:
            alive = [record for record in self.merged.values() if record.state != GONE and record.model]
            self._models = frozenset(record.model for record in alive)
            bases: dict[str, set[str]] = {}
            for record in alive:
                for adapter in record.adapters:
                    bases.setdefault(adapter, set()).add(record.model)
            self._adapters = {adapter: tuple(sorted(models)) for adapter, models in bases.items()}
        return self._models

    def set_block_size(self, tokens: int) -> None:
        """Set the canonical block size, in tokens."""
        if tokens != self._block_size_tokens:
            self._block_size_tokens = tokens
            self._fleet = None

    def _changed(self, name: str, before: PodRecord | None, after: PodRecord | None) -> None:
        if before is None or after is None or self._meaning(before) != self._meaning(after):
            self._fleet = self._models = None
        if after is not None:
            for changes in self._watchers:
                changes.put(name)

    def _meaning(self, record: PodRecord) -> tuple[object, ...]:
        """Return what the fleet and the names served are made of."""
        return (*meaning(record, self._block_size_tokens), tuple(record.adapters))

    def listed(self, model: str = "", *, gone: bool = False) -> list[PodRecord]:
        """Return the pods by name: of one model when given, with those that are gone when asked for."""
        return [
            record
            for _, record in sorted(self.merged.items())
            if (gone or record.state != GONE) and (not model or not record.model or record.model == model)
        ]

    def serving(self, model: str = "") -> list[PodRecord]:
        """Return the pods that requests may go to, by name."""
        return [record for record in self.listed(model) if not is_server(record)]

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[Changes]:
        """Give the names of pods that change from now on."""
        changes = Changes()
        self._watchers.add(changes)
        try:
            yield changes
        finally:
            self._watchers.discard(changes)

    def adopt_watchers(self, other: PodTable) -> None:
        """Let the watchers of another table hear of changes here too: it is about to be replaced by this one."""
        # One set for both: a watcher that leaves one table leaves the other.
        self._watchers |= other._watchers
        other._watchers = self._watchers

    def names(self) -> Iterable[str]:
        """Return all pod ids."""
        return self.merged.keys()
