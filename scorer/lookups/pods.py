"""Pods as ``kv-pods`` tells them: both writers' records joined, and the fleet that the walk reads.

Pure: records go in, a snapshot comes out. Most records only move a pod's sequence and age; those cost nothing but
their own decoding. Only a change of what index entries *mean* (epochs, groups, store, model, liveness) builds a
new :class:`~kvatlas.scorer.scoring.walk.Fleet`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.pod_ids import WRITER_BRIDGE, WRITER_STREAMS, pod_ref, streams_writer
from kvatlas.bridge.model.records import GONE, PodRecord, decode, merge_pod
from kvatlas.bridge.model.topics import BASE_VERSION
from kvatlas.scorer.scoring.walk import Fleet

log = logging.getLogger(__name__)


def _meaning(record: PodRecord) -> tuple[object, ...]:
    """Return what the fleet reads of a record."""
    return (
        record.state == GONE,
        record.valid_from,
        record.gpu_valid_from,
        record.suspect_before,
        record.model,
        record.store,
        record.block_size_tokens,
        record.approximate,
        tuple(sorted(record.groups.items())),
        tuple(record.adapters),
    )


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
        merged: pod id -> both writers' records joined.
        clashes: pod ids refused because another pod has the same 64-bit reference.
        rejected: records that could not be read.
    """

    def __init__(self, block_size_tokens: int = 16, index_version: str = BASE_VERSION) -> None:
        self._streams = streams_writer(index_version)
        self.merged: dict[str, PodRecord] = {}
        self.clashes: set[str] = set()
        self.rejected = 0
        self._parts: dict[str, dict[str, PodRecord]] = {}
        self._names: dict[int, str] = {}
        self._block_size_tokens = block_size_tokens
        self._fleet: Fleet | None = None
        self._models: frozenset[str] | None = None
        self._adapters: dict[str, tuple[str, ...]] = {}
        self._watchers: set[Changes] = set()

    @property
    def fleet(self) -> Fleet:
        """The pods that may score, as of now."""
        if self._fleet is None:
            records = (record for name, record in self.merged.items() if name not in self.clashes)
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

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Apply one ``kv-pods`` record; one that cannot be read is counted and left out."""
        writer, _, name = (key or b"").decode("utf-8", "replace").partition("|")
        if writer.partition(".")[0] not in (WRITER_BRIDGE, WRITER_STREAMS) or not name:
            self._reject(f"kv-pods: key {key!r} is not <writer>|<pod id>")
            return
        if writer == self._streams:
            writer = WRITER_STREAMS
        elif writer != WRITER_BRIDGE:
            return  # of another index version
        if not value:
            self._remove(writer, name)
            return
        try:
            record = decode(PodRecord, value)
        except WireError as error:
            self._reject(f"kv-pods: record of {name}: {error}")
            return
        self.put(writer, name, record)

    def put(self, writer: str, name: str, record: PodRecord) -> None:
        """Apply one writer's record of a pod."""
        known = self._names.setdefault(pod_ref(name), name)
        if known != name and name not in self.clashes:
            self.clashes.add(name)
            log.error("pod %s has the same 64-bit reference as pod %s and is not scored: rename it", name, known)
        parts = self._parts.setdefault(name, {})
        before = self.merged.get(name)
        if (old := parts.get(writer)) is not None and record.epoch < old.epoch:
            return  # a late record of an earlier owner of the partition or pod: epochs only grow
        parts[writer] = record
        self._changed(name, before, merge_pod(parts.get(WRITER_BRIDGE), parts.get(WRITER_STREAMS)))

    def parts(self, name: str) -> Mapping[str, PodRecord]:
        """Return each writer's record of a pod; empty for one that is not known."""
        return self._parts.get(name, {})

    def _changed(self, name: str, before: PodRecord | None, after: PodRecord) -> None:
        self.merged[name] = after
        if before is None or _meaning(before) != _meaning(after):
            self._fleet = self._models = None
        for changes in self._watchers:
            changes.put(name)

    def _remove(self, writer: str, name: str) -> None:
        parts = self._parts.get(name)
        if parts is None or parts.pop(writer, None) is None:
            return
        before = self.merged[name]
        if parts:
            self._changed(name, before, merge_pod(parts.get(WRITER_BRIDGE), parts.get(WRITER_STREAMS)))
            return
        del self._parts[name], self.merged[name]
        self.clashes.discard(name)
        if self._names.get(pod_ref(name)) == name:
            del self._names[pod_ref(name)]
        self._fleet = self._models = None

    def read_version(self, index_version: str) -> None:
        """Take the records of another index version, from their beginning; those of the one before are forgotten."""
        self._streams = streams_writer(index_version)
        for name, parts in list(self._parts.items()):
            record = parts.get(WRITER_STREAMS)
            if record is not None and not record.approximate:  # a prediction is the reader's own
                self._remove(WRITER_STREAMS, name)

    def _reject(self, text: str) -> None:
        self.rejected += 1
        log.warning("%s", text)

    def listed(self, model: str = "", *, gone: bool = False) -> list[PodRecord]:
        """Return the pods by name: of one model when given, with those that are gone when asked for."""
        return [
            record
            for _, record in sorted(self.merged.items())
            if (gone or record.state != GONE) and (not model or not record.model or record.model == model)
        ]

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
