r"""A full local replica of the index: ``kv-blocks`` and ``kv-pods`` followed from their beginning, without workers.

Updates of one pod reach the log over all partitions, each with the pod's position in its stream, so what has been
applied is remembered per pod *and* partition: the positions lie under the workers' meta keys with the partition's
number behind them. A replica in RocksDB also has, in the same write as the entries, where it stands on the log::

    "\x00log" | partition 2      next offset
    "\x00count"                  number of partitions

    "\x00version"              index version

It goes on from there when it is opened again. When the log no longer has what came next, whether that shows when it is
opened or while it runs, the removals among it are unknown: the replica is emptied and read anew. The same happens when
the scorers move to another index version, which has keys and a log of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from kvatlas.bridge.errors import LogError, SettingsError, WireError
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.block_key import KEY_BYTES, partition_of
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.model.validity import Validity
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import end_tasks
from kvatlas.scorer.library.backends.base import Backend
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.scorer.library.backends.memory import MemoryBackend
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.streams.index.apply import apply_blocks, is_meta
from kvatlas.streams.index.blocks_record import decode_blocks
from kvatlas.streams.index.view import BulkView
from kvatlas.streams.state.local_table import LocalTable

log = logging.getLogger(__name__)

_CLIENT_ID: Final = "kvatlas-indexer"
_LOG: Final = b"\x00log"
_COUNT: Final = b"\x00count"
_VERSION: Final = b"\x00version"
_RETRY_SECONDS: Final = 1.0
_SWEEP_SECONDS: Final = 30.0


class Store(BulkView, Protocol):
    """Where a replica is: what is used of a memory backend or of a table in RocksDB."""

    def clear(self) -> None:
        """Remove everything."""


class PartitionView:
    """The index as one partition's records see it: positions of its own, entries shared with all."""

    def __init__(self, store: Store, partition: int) -> None:
        self._store = store
        self._suffix = partition.to_bytes(2, "big")

    def get(self, key: bytes) -> bytes | None:
        """Return the value under a key."""
        return self._store.get(key + self._suffix if is_meta(key) else key)

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        self._store.put(key + self._suffix if is_meta(key) else key, value)

    def delete(self, key: bytes) -> None:
        """Remove a key."""
        self._store.delete(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return values of blocks in order."""
        return self._store.get_many(keys)

    def write_all(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Write values of blocks, None removes."""
        self._store.write_all(writes)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Fetch in one go what is not in memory."""
        self._store.prefetch(key + self._suffix if is_meta(key) else key for key in keys)


class Replica:
    """Follows the log into an index in memory or in RocksDB.

    Attributes:
        counts: what was applied, by name.
        version: the index version that is followed.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        backend: Backend,
        pods: PodTable,
        set_block_size: Callable[[int], None],
        forgotten: Callable[[], None] = lambda: None,
    ) -> None:
        """Describe what to follow.

        Args:
            kafka: how to reach Kafka.
            backend: the index; must be one in memory or in RocksDB.
            pods: table that ``kv-pods`` goes into.
            set_block_size: told of the workers' canonical block size.
            forgotten: called when the index has been emptied.

        Raises:
            SettingsError: the index is a shared one, which the workers fill (``kvatlas worker --mirror``).
        """
        if backend.name not in (MemoryBackend.name, "rocksdb"):
            raise SettingsError(
                f"a replica of the log is in memory or in RocksDB; for {backend.name} see `kvatlas worker --mirror`"
            )
        self.counts: Counter[str] = Counter()
        self.version = topics.BASE_VERSION
        self._catalog = records.IndexCatalog()
        self._sizes: dict[str, int] = {}
        self._kafka = kafka
        self._backend = backend
        self._pods = pods
        self._forgotten = forgotten
        self._swept: dict[str, PodRecord] = {}
        self._set_block_size = set_block_size
        self._views: list[PartitionView] = []
        self._table: Any = None
        self._changed = asyncio.Event()
        self._moving = False
        self._workers = TopicFollower(kafka, topics.WORKERS, self._worker, client_id=_CLIENT_ID)
        self._followers: list[TopicFollower] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, timeout_seconds: float) -> None:
        """Read what is there.

        Raises:
            LogError: Kafka cannot be reached, or not be read to its end in time.
        """
        await self._begins(topics.WORKERS)
        self._workers.start()
        await self._workers.wait(timeout_seconds)
        self._table = None if isinstance(self._backend, MemoryBackend) else self._backend.table  # type: ignore[attr-defined]
        await self._read(self._catalog.active, timeout_seconds)
        await self._followers[-1].wait(timeout_seconds)
        self._tasks["versions"] = asyncio.create_task(self._follow_catalog(timeout_seconds), name="follow catalog")

    async def _read(self, version: str, timeout_seconds: float) -> None:
        """Begin to read an index version; its blocks come in the background."""
        begins = await self._begins(topics.blocks_topic(version))
        self.version = version
        self._take_block_size()
        self._pods.read_version(version)
        start_at = {} if self._table is None else self._resume(self._table, begins)
        self._views = [PartitionView(self._store, number) for number in range(len(begins))]
        pods = TopicFollower(self._kafka, topics.PODS, self._pods.apply, client_id=_CLIENT_ID)
        blocks = TopicFollower(
            self._kafka,
            topics.blocks_topic(version),
            self._blocks,
            client_id=_CLIENT_ID,
            start_at=start_at,
            applied=None if self._table is None else self._stand,
            lost=self._lost,
        )
        # Pods before blocks: a raised epoch must be known before entries of it are scored.
        self._followers = [pods, blocks]
        pods.start()
        await pods.wait(timeout_seconds)
        blocks.start()
        self._tasks["sweep"] = asyncio.create_task(self._sweep_on(), name="sweep replica")

    @property
    def _store(self) -> Store:
        if self._table is None:
            assert isinstance(self._backend, MemoryBackend)
            return self._backend
        table: Store = self._table
        return table

    def _resume(self, table: LocalTable, begins: Mapping[int, int]) -> dict[int, int]:
        """Return where to go on in the log; where it no longer has what came next, empty the table and start anew."""
        count = table.get(_COUNT)
        stands = {number: table.get(_LOG + number.to_bytes(2, "big")) for number in begins}
        found = {number: int.from_bytes(value, "big") for number, value in stands.items() if value is not None}
        version = table.get(_VERSION) or topics.BASE_VERSION.encode()
        kept = count is not None and int.from_bytes(count, "big") == len(begins) and version == self.version.encode()
        if kept and all(found.get(number, 0) >= begin for number, begin in begins.items()):
            self.counts["resumed"] += 1
            return found
        if count is not None:
            log.warning("the replica in %s is too old for the log, or of another one: read anew", table.path)
        self._empty(len(begins))
        return {}

    def _empty(self, partitions: int) -> None:
        self._clear()
        if self._table is not None:
            self._table.put(_COUNT, partitions.to_bytes(2, "big"))
            self._table.put(_VERSION, self.version.encode())
            self._table.settle(force=True)

    def _clear(self) -> None:
        self._store.clear()
        self._swept = {}
        self._forgotten()

    async def _lost(self) -> None:
        """Empty the index: among the records that are gone were removals."""
        self.counts["rebuilt"] += 1
        self._empty(len(self._views))

    def _stand(self, partition: int, offset: int) -> None:
        self._table.put(_LOG + partition.to_bytes(2, "big"), offset.to_bytes(8, "big"))
        self._table.settle(force=True)

    # --- index versions -------------------------------------------------------------------------------------------

    async def _follow_catalog(self, timeout_seconds: float) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._catalog.active != self.version or self._moving:
                try:
                    await self._move(self._catalog.active, timeout_seconds)
                except LogError as error:
                    log.warning("index version %s: %s; trying again", self._catalog.active, error)
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _move(self, version: str, timeout_seconds: float) -> None:
        """Leave one index version for another, in the same index: nothing is answered until it has been read."""
        log.warning("index version %s answers from now on, instead of %s: read anew", version, self.version)
        self._moving = True
        await self._end_reading()
        self._clear()
        await self._read(version, timeout_seconds)
        self.counts["moved"] += 1
        self._moving = False

    async def _end_reading(self) -> None:
        if (sweep := self._tasks.pop("sweep", None)) is not None:
            await end_tasks([sweep])
        for follower in self._followers:
            await follower.stop()

    def _take_block_size(self) -> None:
        known = self._catalog.versions.get(self.version, records.IndexVersion()).block_size_tokens
        if size := self._sizes.get(self.version, known):
            self._set_block_size(size)

    async def _begins(self, name: str) -> dict[int, int]:
        """Return the first offset of every partition of a topic."""
        topic = self._kafka.topic(name)
        async with RangeReader(self._kafka, _CLIENT_ID) as reader:
            edges = await reader.edges(topic, await reader.partitions(topic))
        if not edges:
            raise LogError(f"topic {topic} does not exist on {self._kafka.brokers}; create it with `kvatlas topics`")
        return {number: edge.first for number, edge in edges.items()}

    async def stop(self) -> None:
        """Stop following."""
        if (task := self._tasks.pop("versions", None)) is not None:
            await end_tasks([task])
        await self._end_reading()
        await self._workers.stop()

    @property
    def stale(self) -> bool:
        """False: what comes is applied as it comes, and freshness tells of each pod what does not."""
        return False

    @property
    def rebuilding(self) -> bool:
        """Whether the log is read from its beginning, where blocks are added whose removal comes later."""
        return not self.caught_up

    @property
    def caught_up(self) -> bool:
        """Whether all that was there at the start, or when it was last read anew, has been applied."""
        return bool(self._followers) and not self._moving and all(each.caught_up.is_set() for each in self._followers)

    def failed(self) -> BaseException | None:
        """Return what ended the reading or a task beside it: Kafka's errors do not, those of the index do."""
        errors = [follower.failed() for follower in (self._workers, *self._followers)]
        ended = [task for task in self._tasks.values() if task.done() and not task.cancelled()]
        return next((error for error in (*errors, *(task.exception() for task in ended)) if error is not None), None)

    async def _sweep_on(self) -> None:
        while True:
            try:
                await self.sweep()
            except BackendError as error:  # only room is lost
                log.warning("sweep of the replica: %s", error)
            await asyncio.sleep(_SWEEP_SECONDS)

    async def sweep(self) -> None:
        """Give back the room of epochs that ended since the last time: the workers' sweeps are not on the log."""
        known, before = dict(self._pods.merged), self._swept
        valid = {
            pod_ids.pod_ref(name): pod.ended
            for name, pod in known.items()
            if name not in before or before[name].ended != pod.ended
        }
        # Of a pod that nobody knows any more everything is dead; should it come back now, its epochs lie above.
        valid |= {pod_ids.pod_ref(name): Validity(before[name].epoch + 1) for name in before.keys() - known.keys()}
        if valid:
            self.counts["holders_swept"] += await self._backend.drop_epochs(valid)
        self._swept = known

    def _worker(self, key: bytes | None, value: bytes | None) -> None:
        if not value:
            return
        try:
            if key == records.CATALOG_KEY:
                self._catalog = records.decode(records.IndexCatalog, value)
                self._changed.set()
                return
            worker = records.decode(records.WorkerRecord, value)
        except WireError as error:
            log.warning("kv-workers: %s", error)
            return
        self._sizes[worker.index_version] = worker.block_size_tokens
        if worker.index_version == self.version:
            self._set_block_size(worker.block_size_tokens)

    def _blocks(self, _key: bytes | None, value: bytes | None) -> None:
        try:
            record = decode_blocks(value or b"")
        except WireError as error:
            self.counts["records_dead"] += 1
            log.warning("kv-blocks: %s", error)
            return
        if record.keys:
            number = partition_of(record.keys[:KEY_BYTES], len(self._views))
            apply_blocks(self._views[number], record, self.counts)
            if isinstance(self._backend, MemoryBackend):
                self._backend.shrink()
