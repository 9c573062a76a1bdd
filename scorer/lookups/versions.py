"""Index versions as a scorer reads them: one reader for each, and the move from one to the next.

The catalog on ``kv-workers`` says which versions exist and which one answers. A scorer keeps a reader of every version
in it, so that a move finds pods, workers and connections ready, and moves in one step of the event loop: requests that
began before end with the version they began with. It moves only when workers own every partition of the new version and
have answered a lookup in each, over connections that are then open; until then the old one goes on answering.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer.lookups.index import Index, ServiceLookups
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.lookups.router import PartitionRouter
from kvatlas.scorer.scoring.lookup import ACTIVE

log = logging.getLogger(__name__)

_TURN_SECONDS: Final = 0.2
_PROBE_SECONDS: Final = 1.0


class VersionReader:
    """Pods, workers and lookups of one index version.

    Attributes:
        name: the index version.
        pods, workers, lookups: its tables, fed by followers.
    """

    def __init__(
        self,
        name: str,
        kafka: KafkaSettings,
        *,
        client_id: str,
        clock_ns: Callable[[], int] = time.time_ns,
        lookups: Callable[[WorkerDirectory], ServiceLookups] = PartitionRouter,
        block_size_tokens: int = 0,
    ) -> None:
        """Describe what to read; nothing is opened yet.

        Args:
            name: the index version.
            kafka: how to reach Kafka.
            client_id: shown in the broker's logs.
            clock_ns: wall clock in ns.
            lookups: makes the lookups from the table of workers.
            block_size_tokens: canonical block size; 0 takes it from the workers.
        """
        self.name = name
        self.pods = PodTable(index_version=name)
        self.workers = WorkerDirectory(clock_ns, name)
        self._block_size_tokens = block_size_tokens
        self.lookups = lookups(self.workers)
        self._followers = {
            "pods": TopicFollower(kafka, topics.PODS, self.pods.apply, client_id=client_id),
            "workers": TopicFollower(kafka, topics.WORKERS, self.workers.apply, client_id=client_id),
        }
        self._started = False

    @property
    def index(self) -> Index:
        """What a core reads."""
        return Index(self.pods, self.lookups, self._block_size, self._partition_count)

    def _block_size(self) -> int | None:
        if self._block_size_tokens:
            return self._block_size_tokens
        return self.workers.layout.block_size_tokens if self.workers.layout else None

    def _partition_count(self) -> int:
        return self.workers.layout.partition_count if self.workers.layout else 0

    def start(self) -> None:
        """Start reading in the background."""
        self._started = True
        for follower in self._followers.values():
            follower.start()

    async def wait(self, timeout_seconds: float) -> None:
        """Wait until all that was there has been read.

        Raises:
            LogError: not within the time.
        """
        for follower in self._followers.values():
            await follower.wait(timeout_seconds)

    async def stop(self) -> None:
        """Stop reading and let connections go."""
        await asyncio.gather(*(follower.stop() for follower in self._followers.values()))
        await self.lookups.close()

    def failed(self) -> BaseException | None:
        """Return what ended the reading of one of the topics, None while it goes on."""
        return next((error for one in self._followers.values() if (error := one.failed()) is not None), None)

    def unread(self) -> str | None:
        """Return what is still being read for the first time, None when all has been."""
        if not self._started:
            return "starting"
        for name, follower in self._followers.items():
            if not follower.caught_up.is_set():
                return f"kv-{name} is being read"
        return None

    async def takes_over(self) -> bool:
        """Tell whether it answers as completely as an index in use must: in every partition, by its owner."""
        layout = self.workers.layout
        if layout is None or self.unread() is not None or not self.workers.covered:
            return False
        keys = [number.to_bytes(4, "big") + bytes(KEY_BYTES - 4) for number in range(layout.partition_count)]
        answers = await self.lookups.lookup(keys, time.monotonic() + _PROBE_SECONDS)
        return None not in answers.values and all(seen.role == ACTIVE for seen in answers.partitions.values())


class Versions:
    """The readers of one scorer and the one that is used.

    Attributes:
        readers: by index version.
        used: the reader that requests go to.
    """

    def __init__(self, make: Callable[[str], VersionReader], pinned: str, use: Callable[[VersionReader], None]) -> None:
        """Start with one reader.

        Args:
            make: makes the reader of a version.
            pinned: stay with this version; empty follows the catalog.
            use: called with the reader that requests go to from now on.
        """
        self.used = make(pinned or topics.BASE_VERSION)
        self.readers = {self.used.name: self.used}
        self._make = make
        self._pinned = bool(pinned)
        self._use = use

    @property
    def catalog(self) -> records.IndexCatalog:
        """The newest catalog that any reader has seen: one that has just been begun may lag behind the others."""
        return max((reader.workers.catalog for reader in self.readers.values()), key=lambda seen: seen.updated_ns)

    async def start(self, timeout_seconds: float) -> None:
        """Read what is there, of the version that the catalog names.

        Raises:
            LogError: not within the time.
        """
        self.used.start()
        await self.used.wait(timeout_seconds)
        active = self.catalog.active
        if not self._pinned and active != self.used.name:
            await self.settle()
            await self.readers[active].wait(timeout_seconds)
            self._move(self.readers[active])  # covered or not: there is no older answer to keep

    async def run(self) -> None:
        """Follow the catalog until cancelled."""
        while not self._pinned:
            await self.settle()
            await asyncio.sleep(_TURN_SECONDS)

    async def settle(self) -> None:
        """Keep a reader of every version in the catalog, and use the active one once it can take over."""
        catalog = self.catalog
        wanted = {catalog.active, self.used.name, *catalog.versions}
        for name in wanted - self.readers.keys():
            log.info("index version %s: reading pods and workers", name)
            self.readers[name] = self._make(name)
            self.readers[name].start()
        active = self.readers[catalog.active]
        if active is not self.used and await active.takes_over() and self.catalog.active == active.name:
            self._move(active)
        for name in self.readers.keys() - wanted:
            log.info("index version %s was dropped", name)
            await self.readers.pop(name).stop()

    def _move(self, reader: VersionReader) -> None:
        log.info("index version %s answers from now on, instead of %s", reader.name, self.used.name)
        self.used = reader
        self._use(reader)

    async def stop(self) -> None:
        """Stop all readers."""
        await asyncio.gather(*(reader.stop() for reader in self.readers.values()))
