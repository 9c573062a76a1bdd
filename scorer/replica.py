r"""A full local replica of the index: ``kv-blocks`` and ``kv-pods`` followed from their beginning, without workers.

Updates of one pod reach the log over all partitions, each with the pod's position in its stream, so what has been
applied is remembered per pod *and* partition: the positions lie under the workers' meta keys with the partition's
number behind them. A replica in RocksDB also has, in the same write as the entries, where it stands on the log::

    "\x00log" | partition 2      next offset
    "\x00count"                  number of partitions

It goes on from there when it is opened again, and starts anew when the log no longer has what came next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kvatlas.bridge import records
from kvatlas.bridge.block_key import KEY_BYTES, partition_of
from kvatlas.bridge.errors import LogError, SettingsError, WireError
from kvatlas.bridge.kafka import client_config
from kvatlas.bridge.records import PodRecord
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.scorer.backends.base import Backend
from kvatlas.scorer.backends.errors import BackendError
from kvatlas.scorer.backends.memory import MemoryBackend
from kvatlas.scorer.follow import Follower
from kvatlas.scorer.pods import PodTable
from kvatlas.streams.codec import decode_blocks
from kvatlas.streams.follow import partitions_of
from kvatlas.streams.index import apply_blocks, is_meta
from kvatlas.streams.local import LocalTable

log = logging.getLogger(__name__)

_CLIENT_ID: Final = "kvatlas-indexer"
_LOG: Final = b"\x00log"
_COUNT: Final = b"\x00count"
_SWEEP_SECONDS: Final = 30.0


class Store(Protocol):
    """Where a replica is: what is used of a memory backend or of a table in RocksDB."""

    def get(self, key: bytes) -> bytes | None:
        """Return the value under a key."""

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""

    def delete(self, key: bytes) -> None:
        """Remove a key."""

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Tell which keys will be read."""


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

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Fetch in one go what is not in memory."""
        self._store.prefetch(key + self._suffix if is_meta(key) else key for key in keys)


class Replica:
    """Follows the log into an index in memory or in RocksDB.

    Attributes:
        counts: what was applied, by name.
    """

    def __init__(
        self, kafka: KafkaSettings, backend: Backend, pods: PodTable, set_block_size: Callable[[int], None]
    ) -> None:
        """Describe what to follow.

        Args:
            kafka: how to reach Kafka.
            backend: the index; must be one in memory or in RocksDB.
            pods: table that ``kv-pods`` goes into.
            set_block_size: told of the workers' canonical block size.

        Raises:
            SettingsError: the index is a shared one, which the workers fill (``kvatlas worker --mirror``).
        """
        if backend.name not in (MemoryBackend.name, "rocksdb"):
            raise SettingsError(
                f"a replica of the log is in memory or in RocksDB; for {backend.name} see `kvatlas worker --mirror`"
            )
        self.counts: Counter[str] = Counter()
        self._kafka = kafka
        self._backend = backend
        self._pods = pods
        self._swept: dict[str, PodRecord] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self._set_block_size = set_block_size
        self._views: list[PartitionView] = []
        self._table: Any = None
        self._followers = [
            Follower(kafka, records.PODS, pods.apply, client_id=_CLIENT_ID),
            Follower(kafka, records.WORKERS, self._worker, client_id=_CLIENT_ID),
        ]

    async def start(self, timeout_seconds: float) -> None:
        """Read what is there.

        Raises:
            LogError: Kafka cannot be reached, or not be read to its end in time.
        """
        begins = await self._begins()
        start_at: dict[int, int] = {}
        if isinstance(self._backend, MemoryBackend):
            store: Store = self._backend
        else:
            table = self._table = self._backend.table  # type: ignore[attr-defined]
            store, start_at = table, self._resume(table, begins)
        self._views = [PartitionView(store, number) for number in range(len(begins))]
        blocks = Follower(
            self._kafka,
            records.BLOCKS,
            self._blocks,
            client_id=_CLIENT_ID,
            start_at=start_at,
            applied=None if self._table is None else self._stand,
        )
        self._followers.append(blocks)
        # Pods before blocks: a raised epoch must be known before entries of it are scored.
        for follower in self._followers:
            follower.start()
            await follower.wait(timeout_seconds)
        self._sweeping = asyncio.create_task(self._sweep_on(), name="sweep replica")

    def _resume(self, table: LocalTable, begins: Mapping[int, int]) -> dict[int, int]:
        """Return where to go on in the log; where it no longer has what came next, empty the table and start anew."""
        count = table.get(_COUNT)
        stands = {number: table.get(_LOG + number.to_bytes(2, "big")) for number in begins}
        found = {number: int.from_bytes(value, "big") for number, value in stands.items() if value is not None}
        kept = count is not None and int.from_bytes(count, "big") == len(begins)
        if kept and all(found.get(number, 0) >= begin for number, begin in begins.items()):
            self.counts["resumed"] += 1
            return found
        if count is not None:
            log.warning("the replica in %s is too old for the log, or of another one: read anew", table.path)
        for key, _ in list(table.items()):
            table.delete(key)
        table.put(_COUNT, len(begins).to_bytes(2, "big"))
        table.settle(force=True)
        return {}

    def _stand(self, partition: int, offset: int) -> None:
        self._table.put(_LOG + partition.to_bytes(2, "big"), offset.to_bytes(8, "big"))
        self._table.settle(force=True)

    async def _begins(self) -> dict[int, int]:
        """Return the first offset of every partition of ``kv-blocks``."""
        topic = self._kafka.topic(records.BLOCKS)
        consumer = AIOKafkaConsumer(**client_config(self._kafka, _CLIENT_ID))
        try:
            await consumer.start()
            found = await partitions_of(consumer, topic)
            places = [TopicPartition(topic, number) for number in sorted(found)]
            begins = await consumer.beginning_offsets(places) if places else {}
        except (KafkaError, OSError) as error:
            raise LogError(f"cannot reach Kafka at {self._kafka.brokers}: {error}") from error
        finally:
            await consumer.stop()
        if not begins:
            raise LogError(f"topic {topic} does not exist on {self._kafka.brokers}; create it with `kvatlas topics`")
        return {place.partition: begin for place, begin in begins.items()}

    async def stop(self) -> None:
        """Stop following."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeping
        for follower in self._followers:
            await follower.stop()

    @property
    def stale(self) -> bool:
        """False: what comes is applied as it comes, and freshness tells of each pod what does not."""
        return False

    @property
    def caught_up(self) -> bool:
        """Whether all that was there at the start has been applied."""
        return bool(self._views) and all(follower.caught_up.is_set() for follower in self._followers)

    def failed(self) -> BaseException | None:
        """Return None: a follower goes on after every error."""
        return None

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
            records.pod_ref(name): _bounds(pod)
            for name, pod in known.items()
            if name not in before or _bounds(before[name]) != _bounds(pod)
        }
        # Of a pod that nobody knows any more everything is dead; should it come back now, its epochs lie above.
        valid |= {records.pod_ref(name): (before[name].epoch + 1, 0) for name in before.keys() - known.keys()}
        if valid:
            self.counts["holders_swept"] += await self._backend.drop_epochs(valid)
        self._swept = known

    def _worker(self, key: bytes | None, value: bytes | None) -> None:
        if not value or key == records.CATALOG_KEY:
            return
        try:
            worker = records.decode(records.WorkerRecord, value)
        except WireError as error:
            log.warning("kv-workers: %s", error)
            return
        if worker.index_version == records.BASE_VERSION:
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


def _bounds(pod: PodRecord) -> tuple[int, int]:
    return pod.valid_from, pod.gpu_valid_from
