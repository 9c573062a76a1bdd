"""Object tier: blocks as objects of an S3-compatible store, with the file tier's promises.

Stored means that the store took the object whole, loaded means that every byte matched its checksum. A block's name
leads to its object, so nothing is ever listed here; an engine's knowledge of what is there is what it asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Final

from kvatlas.connector.errors import ClosedError
from kvatlas.connector.files import layout
from kvatlas.connector.files.blocks import BlockBuffers, Missing
from kvatlas.connector.files.gather import Gather
from kvatlas.connector.files.holdings import Change
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.files.pool import IoPool, Task
from kvatlas.connector.files.recent import Recent
from kvatlas.connector.metrics import Metrics
from kvatlas.connector.objects import bodies
from kvatlas.connector.objects.announced import Announced
from kvatlas.connector.objects.bodies import Damaged
from kvatlas.connector.objects.client import DeniedError, Objects, ObjectStoreError, connect
from kvatlas.connector.objects.pause import Pause
from kvatlas.connector.objects.settings import ObjectTierSettings
from kvatlas.connector.objects.uses import ObjectUses
from kvatlas.connector.outcome import OffloadTier, Outcome, Result, Results

log = logging.getLogger(__name__)


class ObjectTier:
    """Blocks of one fingerprint below one prefix of a bucket.

    Args:
        settings: see :class:`ObjectTierSettings`.
        fingerprint: decides the prefix below the address's own.
        objects: the store's requests; a connection by the settings when None.
        clock_ns: wall clock in nanoseconds, for uses.
        monotonic: seconds that never go back, for waiting periods.
        listener: told of every change in the order they happened, from request threads: it must return quickly, must
            not raise and must not call the tier.
        metrics: where to count; its own when None.

    Raises:
        LayoutError: the prefix says that it belongs to another fingerprint.
        SettingsError: the settings name no store.
    """

    kind: Final = "object"

    def __init__(
        self,
        settings: ObjectTierSettings,
        fingerprint: Fingerprint,
        *,
        objects: Objects | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
        listener: Callable[[Change], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.settings = settings
        self.fingerprint = fingerprint
        self.directory = fingerprint.directory()
        self.metrics = metrics or Metrics()
        self._digest = fingerprint.digest()
        self._objects = objects or connect(settings)
        self._clock_ns = clock_ns
        self._announced = Announced(listener)
        self._counting = threading.Lock()
        self._absent = Recent(settings.absent_seconds, monotonic)
        self._distrusted = Recent(settings.distrust_seconds, monotonic)
        self._pause = Pause(settings.pause_failures, settings.pause_seconds, monotonic)
        self._used_bytes = 0
        self.read_only = not self._prepare()
        writer = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._uses = ObjectUses(self._objects, self.directory, writer, settings.usage_seconds, monotonic)
        self._pool = IoPool(
            threads=settings.threads,
            write_threads=settings.write_threads or max(1, settings.threads // 2),
            queued_write_bytes=settings.queued_write_bytes,
            name="kvatlas-object",
        )
        self.metrics.gauges["queued_reads"] = lambda: float(self._pool.queued[0])
        self.metrics.gauges["queued_writes"] = lambda: float(self._pool.queued[1])
        self.metrics.gauges["object_used_bytes"] = lambda: float(self._used_bytes)
        self.metrics.gauges["object_paused"] = lambda: float(self._pause.active)

    def _prepare(self) -> bool:
        """Check the prefix's manifest, or write it; returns whether blocks can be stored."""
        path = f"{self.directory}/{layout.MANIFEST_NAME}"
        try:
            with contextlib.suppress(Missing):
                found = self._objects.get(path)
                layout.check_manifest(bytes(found.body), self.fingerprint, f"{self.settings.url}/{path}")
                return True
            self._objects.put(path, layout.encode_manifest(self.fingerprint), part_bytes=1 << 40)
        except DeniedError as error:
            log.warning("%s: %s; blocks are loaded where that is allowed, none are stored", self.settings.url, error)
            return False
        except ObjectStoreError as error:
            # A store that is away may come back: stores and loads try, and report what becomes of them.
            log.warning("%s does not answer (%s); it is tried again with the next blocks", self.settings.url, error)
            self._note_failure(error)
        return True

    def path(self, key: bytes) -> str:
        """Return the name of a block's object below the settings' prefix."""
        return f"{self.directory}/{layout.block_path(key)}"

    # -- store -----------------------------------------------------------------------------------------------

    def store(self, blocks: Sequence[BlockBuffers]) -> Future[Results]:
        """Store blocks; their buffers must stay unchanged until the future is done.

        Returns:
            A future that always ends, with one result per key: STORED, EXISTS, SHED, FAILED or CANCELLED.
        """
        job = Gather(len(blocks))
        for block in blocks:
            task = self._task(job, block, self._store_block)
            try:
                accepted = self._pool.write(task)
            except ClosedError:
                task.cancel()
                continue
            if not accepted:
                self.metrics.count("shed")
                job.add({block.key: Result(Outcome.SHED, "too many stores are waiting")})
        return job.future

    def _task(self, job: Gather, block: BlockBuffers, work: Callable[[BlockBuffers], Result]) -> Task:
        def run() -> None:
            try:
                result = work(block)
            except Exception as error:  # noqa: BLE001 - the outcome carries it, so that a future always ends
                self.metrics.count("failed")
                result = Result(Outcome.FAILED, repr(error))
            job.add({block.key: result})

        cancelled = {block.key: Result(Outcome.CANCELLED, "the tier closed")}
        return Task(run, lambda: job.add(cancelled), block.size_bytes)

    def _store_block(self, block: BlockBuffers) -> Result:
        if self.read_only:
            self.metrics.count("failed")
            return Result(Outcome.FAILED, "the bucket is read-only")
        if self._pause.active:
            self.metrics.count("shed")
            return Result(Outcome.SHED, "the object store is away")
        try:
            with self._announced.lock(block.key):
                if block.key not in self._absent and self._is_there(block):
                    result = Result(Outcome.EXISTS, tier=OffloadTier.OBJECT)
                else:
                    self._put(block)
                    result = Result(Outcome.STORED, tier=OffloadTier.OBJECT)
                self._announced.stored(block.key)
        except DeniedError as error:
            self.read_only = True
            log.warning("%s: %s; no block is stored until a restart", self.settings.url, error)
            return self._failed(block.key, error)
        except ObjectStoreError as error:
            return self._failed(block.key, error)
        self._use([block.key])
        return result

    def _put(self, block: BlockBuffers) -> None:
        begin = time.perf_counter()
        body = bodies.encode(self._digest, block)
        self._objects.put(self.path(block.key), body, part_bytes=self.settings.part_bytes)
        self._answered(block.key)
        size = block.size_bytes
        self.metrics.moved("object", "store", blocks=1, size_bytes=size, seconds=time.perf_counter() - begin)
        with self._counting:
            self._used_bytes += size

    def _is_there(self, block: BlockBuffers) -> bool:
        """Return whether the store has the block; one that this run never saw whole is read through once."""
        try:
            slot = self._head(block.key)
            bodies.check_length(slot, block.size_bytes)
            if block.key not in self._announced:
                self._fetch(block.key, block.size_bytes)
        except Missing:
            return False
        except Damaged as error:
            self._remove_damaged(block.key, error)
            return False
        return True

    # -- load ------------------------------------------------------------------------------------------------

    def load(self, blocks: Sequence[BlockBuffers], *, per_task: int = 0) -> Future[Results]:  # noqa: ARG002 - as the file tier's
        """Fill the blocks' buffers; a buffer is undefined unless its block's result is LOADED.

        Returns:
            A future that always ends, with one result per key: LOADED, MISS, FAILED or CANCELLED.
        """
        job = Gather(len(blocks))
        for block in blocks:
            task = self._task(job, block, self._load_block)
            try:
                self._pool.read(task)
            except ClosedError:
                task.cancel()
        return job.future

    def _load_block(self, block: BlockBuffers) -> Result:
        if self._pause.active:
            self.metrics.count("failed")
            return Result(Outcome.FAILED, "the object store is away")
        begin = time.perf_counter()
        try:
            bodies.fill(block, self._fetch(block.key, block.size_bytes))
        except Missing as error:
            self.metrics.count("misses")
            self._vanished(block.key)
            return Result(Outcome.MISS, str(error))
        except Damaged as error:
            self.metrics.count("misses")
            self._drop_damaged(block.key, error)
            return Result(Outcome.MISS, f"not usable: {error}")
        except ObjectStoreError as error:
            return self._failed(block.key, error)
        self.metrics.moved("object", "load", blocks=1, size_bytes=block.size_bytes, seconds=time.perf_counter() - begin)
        self.metrics.count("hits")
        if block.key not in self._announced:
            with self._announced.lock(block.key):
                self._announced.stored(block.key)
        self._use([block.key])
        return Result(Outcome.LOADED, tier=OffloadTier.OBJECT)

    def _fetch(self, key: bytes, size: int) -> list[memoryview]:
        """Return a block's verified payload, in pieces."""
        path, step, total = self.path(key), self.settings.range_bytes, bodies.object_bytes(size)
        found = self._objects.get(path, step if total > step else None)
        self._answered(key)
        slot = bodies.check_header(found.body[: bodies.HEAD_BYTES], found.size_bytes, self._digest, key)
        bodies.check_length(slot, size)
        pieces = [found.body[bodies.HEAD_BYTES :]]
        if total > step:
            starts = list(range(step, total, step))
            pieces += self._objects.get_ranges(path, starts, [min(step, total - at) for at in starts])
        try:
            return bodies.check_payload(slot, pieces)
        except Damaged:
            if total <= step:
                raise
            # Ranges of two objects look damaged, where another writer stored the block meanwhile: one answer judges.
            whole = self._objects.get(path)
            slot = bodies.check_header(whole.body[: bodies.HEAD_BYTES], whole.size_bytes, self._digest, key)
            return bodies.check_payload(slot, [whole.body[bodies.HEAD_BYTES :]])

    # -- lookup ----------------------------------------------------------------------------------------------

    def lookup(self, keys: Iterable[bytes]) -> dict[bytes, bool]:
        """Return which blocks have an object with a sound header; only a load can promise more.

        Blocks for a round trip or two: the requests go out together.
        """
        listed = list(keys)
        job = Gather(len(listed))
        for key in listed:
            task = self._task(job, BlockBuffers(key, ()), self._look)
            try:
                self._pool.read(task)
            except ClosedError:
                task.cancel()
        found = job.future.result()
        return {key: found[key].ok for key in listed}

    def _look(self, block: BlockBuffers) -> Result:
        key = block.key
        if key in self._distrusted or key in self._absent or self._pause.active:
            return Result(Outcome.MISS, "not asked again yet")
        try:
            self._head(key)
        except Missing as error:
            self._absent.add(key)
            self._vanished(key)
            return Result(Outcome.MISS, str(error))
        except Damaged as error:
            self._drop_damaged(key, error)
            return Result(Outcome.MISS, f"not usable: {error}")
        except ObjectStoreError as error:
            return self._failed(key, error)
        return Result(Outcome.EXISTS, tier=OffloadTier.OBJECT)

    def _head(self, key: bytes) -> layout.Slot:
        """Return what a block's header says; one request for its first page, which tells the object's size as well."""
        found = self._objects.get(self.path(key), bodies.HEAD_BYTES)
        self._answered(key)
        return bodies.check_header(found.body, found.size_bytes, self._digest, key)

    # -- what is known, what goes ----------------------------------------------------------------------------

    def _answered(self, key: bytes) -> None:
        self._pause.answered()
        self._absent.discard(key)

    def _failed(self, key: bytes, error: ObjectStoreError) -> Result:
        self.metrics.count("failed")
        self._distrusted.add(key)
        self._note_failure(error)
        return Result(Outcome.FAILED, str(error))

    def _note_failure(self, error: ObjectStoreError) -> None:
        if error.retriable and self._pause.failed():
            seconds = self.settings.pause_seconds
            log.warning("%s does not answer (%s): nothing is asked of it for %g s", self.settings.url, error, seconds)

    def _vanished(self, key: bytes) -> None:
        if key not in self._announced:
            return
        with self._announced.lock(key):
            if key in self._announced:
                # Stored again meanwhile: what was missing a moment ago is asked for under the lock.
                with contextlib.suppress(Missing, Damaged, ObjectStoreError):
                    self._head(key)
                    return
                self.metrics.count("vanished")
                self._announced.removed(key)

    def _drop_damaged(self, key: bytes, error: Damaged) -> None:
        with self._announced.lock(key), contextlib.suppress(ObjectStoreError):
            self._remove_damaged(key, error)

    def _remove_damaged(self, key: bytes, error: Damaged) -> None:
        """Remove an object that did not verify; its lock is held. A bucket with versions keeps it for a look."""
        self.metrics.count("corrupt")
        log.warning("%s/%s is damaged (%s) and is removed", self.settings.url, self.path(key), error)
        self._distrusted.add(key)
        if not self.read_only:
            self._objects.delete([self.path(key)])
            self._distrusted.discard(key)
        self._announced.removed(key)

    def evict(self, keys: Iterable[bytes]) -> Results:
        """Remove blocks by name; per key MISS (it is not there any more) or FAILED (it could not be removed)."""
        results: Results = {}
        for key in keys:
            try:
                with self._announced.lock(key):
                    self._objects.delete([self.path(key)])
                    self._announced.removed(key)
                results[key] = Result(Outcome.MISS, "evicted")
                self.metrics.count("evicted")
            except ObjectStoreError as error:
                results[key] = self._failed(key, error)
        return results

    # -- use, end --------------------------------------------------------------------------------------------

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note a use without a transfer (a hit in a nearer tier keeps the farther copy young)."""
        self._use(keys)

    def _use(self, keys: Iterable[bytes]) -> None:
        if not self.read_only and self._uses.touch(keys, self._clock_ns()):
            with contextlib.suppress(ClosedError):
                self._pool.write(Task(self._uses.flush, lambda: None, 0), force=True)

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no transfer is queued or running."""
        return self._pool.drain(timeout_seconds)

    def close(self, *, drain: bool = False) -> None:
        """End the threads, transfers that have not begun become CANCELLED unless ``drain``; write the uses."""
        self._pool.close(drain=drain)
        if not self.read_only and not self._pause.active:
            self._uses.flush()

    def __enter__(self) -> ObjectTier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=True)
