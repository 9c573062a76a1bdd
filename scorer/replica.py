"""A full local replica of the index: ``kv-blocks`` and ``kv-pods`` followed from their beginning, without workers.

Updates of one pod reach the log over all partitions, each with the pod's position in its stream, so what has been
applied is remembered per pod *and* partition: the positions lie under the workers' meta keys with the partition's
number behind them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from kvatlas.bridge import records
from kvatlas.bridge.block_key import KEY_BYTES, partition_of
from kvatlas.bridge.errors import LogError, SettingsError, WireError
from kvatlas.bridge.kafka import client_config
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.scorer.backends.base import Backend
from kvatlas.scorer.backends.memory import MemoryBackend
from kvatlas.scorer.follow import Follower
from kvatlas.scorer.pods import PodTable
from kvatlas.streams.codec import decode_blocks
from kvatlas.streams.index import apply_blocks, is_meta

log = logging.getLogger(__name__)

_CLIENT_ID: Final = "kvatlas-indexer"


class PartitionView:
    """The index as one partition's records see it: positions of its own, entries shared with all."""

    def __init__(self, backend: MemoryBackend, partition: int) -> None:
        self._backend = backend
        self._suffix = partition.to_bytes(2, "big")

    def get(self, key: bytes) -> bytes | None:
        """Return the value under a key."""
        return self._backend.get(key + self._suffix if is_meta(key) else key)

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        self._backend.put(key + self._suffix if is_meta(key) else key, value)

    def delete(self, key: bytes) -> None:
        """Remove a key."""
        self._backend.delete(key)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Do nothing: everything is here."""


class Replica:
    """Follows the log into an index in memory.

    Attributes:
        counts: what was applied, by name.
    """

    def __init__(
        self, kafka: KafkaSettings, backend: Backend, pods: PodTable, set_block_size: Callable[[int], None]
    ) -> None:
        """Describe what to follow.

        Args:
            kafka: how to reach Kafka.
            backend: the index; must be one in memory.
            pods: table that ``kv-pods`` goes into.
            set_block_size: told of the workers' canonical block size.

        Raises:
            SettingsError: the index is not one in memory: a lasting index is what the workers keep.
        """
        if not isinstance(backend, MemoryBackend):
            raise SettingsError(f"a replica of the log is kept in memory; the {backend.name} backend is not for it")
        self.counts: Counter[str] = Counter()
        self._kafka = kafka
        self._backend = backend
        self._set_block_size = set_block_size
        self._views: list[PartitionView] = []
        self._followers = [
            Follower(kafka, records.PODS, pods.apply, client_id=_CLIENT_ID),
            Follower(kafka, records.WORKERS, self._worker, client_id=_CLIENT_ID),
            Follower(kafka, records.BLOCKS, self._blocks, client_id=_CLIENT_ID),
        ]

    async def start(self, timeout_seconds: float) -> None:
        """Read what is there.

        Raises:
            LogError: Kafka cannot be reached, or not be read to its end in time.
        """
        self._views = [PartitionView(self._backend, number) for number in range(await self._partitions())]
        # Pods before blocks: a raised epoch must be known before entries of it are scored.
        for follower in self._followers:
            follower.start()
            await follower.wait(timeout_seconds)

    async def _partitions(self) -> int:
        admin = AIOKafkaAdminClient(**client_config(self._kafka, _CLIENT_ID))
        topic = self._kafka.topic(records.BLOCKS)
        try:
            await admin.start()
            found = (await admin.describe_topics([topic]))[0]["partitions"]
        except (KafkaError, OSError) as error:
            raise LogError(f"cannot reach Kafka at {self._kafka.brokers}: {error}") from error
        finally:
            await admin.close()
        if not found:
            raise LogError(f"topic {topic} does not exist on {self._kafka.brokers}; create it with `kvatlas topics`")
        return len(found)

    async def stop(self) -> None:
        """Stop following."""
        for follower in self._followers:
            await follower.stop()

    @property
    def stale(self) -> bool:
        """False: what comes is applied as it comes, and freshness tells of each pod what does not."""
        return False

    @property
    def caught_up(self) -> bool:
        """Whether all that was there at the start has been applied."""
        return all(follower.caught_up.is_set() for follower in self._followers)

    def failed(self) -> BaseException | None:
        """Return None: a follower goes on after every error."""
        return None

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
            self._backend.shrink()
