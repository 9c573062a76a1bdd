"""The file tier: blocks in, blocks out, each with an outcome that can be relied on.

Order of a store: room is made, the segment is written and (optionally) brought to the medium, it gets its names,
the catalog learns of it, the listener is told, the outcome is set. So whoever hears of a block can read it, and
nothing is announced that was not published.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kvatlas.connector import layout, scan
from kvatlas.connector.buffers import AlignedPool
from kvatlas.connector.catalog import Budget, Catalog, Found, Victim
from kvatlas.connector.errors import ClosedError, LayoutError
from kvatlas.connector.fs import FileSystem, PosixFileSystem, probe_direct, probe_links, read_full, write_full
from kvatlas.connector.layout import Fingerprint
from kvatlas.connector.metrics import Metrics
from kvatlas.connector.outcome import Outcome, Result, Tier
from kvatlas.connector.pool import IoPool, Task
from kvatlas.connector.segments import Block, Corrupt, Missing, SegmentFiles, Written
from kvatlas.connector.usage import UsageLog

Results = dict[bytes, Result]


class Change(NamedTuple):
    """Blocks that became readable (``removed`` False) or stopped being so."""

    removed: bool
    keys: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class FileTierSettings:
    """Settings of the file tier.

    Attributes:
        root: directory that engines and evictors may share.
        blocks_per_file: blocks of one store that go into one file.
        threads: I/O threads.
        write_threads: how many of them may write at once; 0 means half, at least one.
        queued_write_bytes: stores waiting beyond this are shed.
        bounce_bytes: aligned memory for what direct I/O cannot take as it lies.
        direct: use direct I/O where a probe says that it works.
        fsync: bring each segment to the medium before it is announced. Without it a power cut may lose or tear
            what was stored last; a torn file fails its checksum and is a miss.
        budget: how much the tier may take.
        cpus: CPUs of the I/O threads; empty leaves placement to the system.
        quarantine_files: damaged files kept for inspection.
        stale_seconds: age at which a temporary file counts as abandoned.
        distrust_seconds: how long a block that failed with an I/O error is reported absent.
        usage_flush_seconds: how often uses are written to the sidecar at the least, while there are any.
    """

    root: Path
    blocks_per_file: int = 1
    threads: int = 8
    write_threads: int = 0
    queued_write_bytes: int = 1 << 30
    bounce_bytes: int = 256 << 20
    direct: bool = True
    fsync: bool = False
    budget: Budget = field(default_factory=Budget)
    cpus: tuple[int, ...] = ()
    quarantine_files: int = 64
    stale_seconds: float = 3600.0
    distrust_seconds: float = 30.0
    usage_flush_seconds: float = 10.0


class _Job:
    """Collects per-key results from several tasks into one future."""

    def __init__(self, tasks: int) -> None:
        self.future: Future[Results] = Future()
        self.future.set_running_or_notify_cancel()
        self._results: Results = {}
        self._left = tasks
        self._lock = threading.Lock()
        if not tasks:
            self.future.set_result({})

    def add(self, results: Mapping[bytes, Result]) -> None:
        with self._lock:
            self._results.update(results)
            self._left -= 1
            last = self._left == 0
        if last:
            self.future.set_result(self._results)


class FileTier:
    """Blocks of one fingerprint below one root.

    Args:
        settings: see :class:`FileTierSettings`.
        fingerprint: decides the directory.
        fs: the file system (tests inject faults here).
        clock_ns: wall clock in nanoseconds.
        monotonic: seconds that never go back, for waiting periods.
        listener: told of every change in the order they happened, from I/O threads and under the tier's lock: it
            must return quickly, must not raise and must not call the tier.
        metrics: where to count; its own when None.

    Raises:
        LayoutError: the directory says that it belongs to another fingerprint.
    """

    def __init__(
        self,
        settings: FileTierSettings,
        fingerprint: Fingerprint,
        *,
        fs: FileSystem | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
        listener: Callable[[Change], None] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.settings = settings
        self.fingerprint = fingerprint
        self.directory = settings.root / fingerprint.directory()
        self.metrics = metrics or Metrics()
        self._fs = fs or PosixFileSystem()
        self._clock_ns = clock_ns
        self._monotonic = monotonic
        self._listener = listener
        self._writer = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._catalog = Catalog()
        self._lock = threading.Lock()
        self._distrusted: dict[bytes, float] = {}
        self._evicting = threading.Lock()
        self._flush_due = 0.0
        self._flush_queued = False
        self.read_only = not self._prepare()
        direct = settings.direct and not self.read_only
        staging = self.directory / layout.STAGING
        self.direct = direct and probe_direct(self._fs, staging, self._writer)
        links = settings.blocks_per_file > 1 and not self.read_only
        #: Without hard links a segment can only have one name, so it holds one block.
        self.blocks_per_file = settings.blocks_per_file if links and probe_links(self._fs, staging, self._writer) else 1
        self._segments = SegmentFiles(
            self._fs,
            self.directory,
            fingerprint.digest(),
            direct=self.direct,
            fsync=settings.fsync,
            pool=AlignedPool(settings.bounce_bytes),
            writer=self._writer,
        )
        self._usage = UsageLog(self._fs, self.directory / layout.USAGE, self._writer)
        self._pool = IoPool(
            threads=settings.threads,
            write_threads=settings.write_threads or max(1, settings.threads // 2),
            queued_write_bytes=settings.queued_write_bytes,
            cpus=settings.cpus,
        )
        self.metrics.gauges["queued_reads"] = lambda: float(self._pool.queued[0])
        self.metrics.gauges["queued_writes"] = lambda: float(self._pool.queued[1])
        self.metrics.gauges["file_used_bytes"] = lambda: float(self._catalog.used_bytes)
        #: Set once the first scan of the directory ended.
        self.scanned = threading.Event()
        self._pool.read(Task(self.rescan, self.scanned.set, 0))

    # -- opening ---------------------------------------------------------------------------------------------

    def _prepare(self) -> bool:
        """Make the directories and the manifest; False when the root cannot be written."""
        manifest = self.directory / layout.MANIFEST_NAME
        try:
            for name in (layout.BLOCKS, layout.STAGING, layout.QUARANTINE, layout.USAGE):
                self._fs.mkdir(self.directory / name)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise LayoutError(f"{self.directory}: cannot be made ({error}); check the root") from error
            self._check_manifest(manifest)
            return False
        if self._check_manifest(manifest):
            return True
        temporary = self.directory / layout.STAGING / f"{self._writer}-manifest.tmp"
        try:
            fd = self._fs.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            try:
                write_full(self._fs, fd, [memoryview(layout.encode_manifest(self.fingerprint))], 0)
                self._fs.fsync(fd)
            finally:
                self._fs.close(fd)
            self._fs.replace(temporary, manifest)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._fs.unlink(temporary)
            if error.errno in _REFUSED:
                return False
            raise LayoutError(f"{manifest}: cannot be written ({error})") from error
        return True

    def _check_manifest(self, path: Path) -> bool:
        """Return whether a manifest is there; it is this fingerprint's then."""
        try:
            fd = self._fs.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            memory = bytearray(self._fs.fstat(fd).st_size)
            got = read_full(self._fs, fd, [memoryview(memory)], 0) if memory else 0
        except OSError as error:
            raise LayoutError(f"{path}: cannot be read ({error})") from error
        finally:
            self._fs.close(fd)
        layout.check_manifest(bytes(memory[:got]), self.fingerprint, str(path))
        return True

    # -- store -----------------------------------------------------------------------------------------------

    def store(self, blocks: Sequence[Block]) -> Future[Results]:
        """Write blocks; their buffers must stay unchanged until the future is done.

        Returns:
            A future that always ends, with one result per key: STORED, EXISTS, SHED, FAILED or CANCELLED.
        """
        step = self.blocks_per_file
        pieces = [tuple(blocks[at : at + step]) for at in range(0, len(blocks), step)]
        job = _Job(len(pieces))
        for piece in pieces:
            self._submit_store(job, piece)
        return job.future

    def _submit_store(self, job: _Job, piece: Sequence[Block]) -> None:
        cancelled = {block.key: Result(Outcome.CANCELLED, "the tier closed") for block in piece}
        task = Task(
            lambda: job.add(self._guarded(self._store_piece, piece)),
            lambda: job.add(cancelled),
            sum(block.size_bytes for block in piece),
        )
        try:
            accepted = self._pool.write(task)
        except ClosedError:
            job.add(cancelled)
            return
        if not accepted:
            self.metrics.count("shed", len(piece))
            job.add({block.key: Result(Outcome.SHED, "too many stores are waiting") for block in piece})

    def _guarded(self, work: Callable[[Sequence[Block]], Results], piece: Sequence[Block]) -> Results:
        """Do the work of one task; whatever goes wrong becomes a result, so that a future always ends."""
        try:
            return work(piece)
        except Exception as error:  # noqa: BLE001 - the outcome carries it
            self.metrics.count("failed", len(piece))
            return {block.key: Result(Outcome.FAILED, repr(error)) for block in piece}

    def _store_piece(self, piece: Sequence[Block]) -> Results:
        results: Results = {}
        fresh: list[Block] = []
        for block in piece:
            if self._already_there(block.key):
                results[block.key] = Result(Outcome.EXISTS, tier=Tier.FILE)
            else:
                fresh.append(block)
        if results:
            self._note_use(results)
        if fresh:
            results.update(self._write_fresh(fresh))
        return results

    def _already_there(self, key: bytes) -> bool:
        if self._is_distrusted(key):
            return False
        try:
            written = self._segments.probe(key)
        except (Missing, OSError):
            return False
        except Corrupt as error:
            self._drop_corrupt(key, error)
            return False
        self._note_found(key, written)
        return True

    def _note_found(self, key: bytes, written: Written) -> None:
        """Learn of a block that another process published."""
        now = self._usage.tick(self._clock_ns())
        with self._lock:
            if self._catalog.inode_of(key) != written.inode:
                self._catalog.add(Found(key, written.inode, written.size_bytes, now))

    def _write_fresh(self, fresh: Sequence[Block]) -> Results:
        keys = [block.key for block in fresh]
        size = sum(block.size_bytes for block in fresh)
        if self.read_only:
            self.metrics.count("failed", len(fresh))
            return dict.fromkeys(keys, Result(Outcome.FAILED, "the root is read-only"))
        if not self._make_room(size + layout.header_bytes(len(fresh))):
            self.metrics.count("shed", len(fresh))
            return dict.fromkeys(keys, Result(Outcome.SHED, "the budget is used up"))
        begin = time.perf_counter()
        try:
            written = self._segments.write(fresh)
        except OSError as error:
            published: tuple[bytes, ...] = getattr(error, "published", ())
            return self._failed_write(error, keys, published)
        self.metrics.moved("file", "store", blocks=len(fresh), size_bytes=size, seconds=time.perf_counter() - begin)
        admitted = self._admit(written)
        return {
            key: Result(Outcome.STORED, tier=Tier.FILE)
            if key in admitted
            else Result(Outcome.FAILED, "removed right after it was written")
            for key in keys
        }

    def _failed_write(self, error: OSError, keys: Sequence[bytes], published: Sequence[bytes]) -> Results:
        """Report a failed segment; the blocks that got their names before the failure are whole and stay."""
        results: Results = {}
        for key in published:
            with contextlib.suppress(Missing, Corrupt, OSError):
                if self._admit(self._segments.probe(key)._replace(keys=(key,))):
                    results[key] = Result(Outcome.STORED, tier=Tier.FILE)
        failed = [key for key in keys if key not in results]
        self.metrics.count("failed", len(failed))
        results.update(dict.fromkeys(failed, Result(Outcome.FAILED, _text(error))))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._queue_eviction()
        return results

    def _admit(self, written: Written) -> frozenset[bytes]:
        """Make a published segment known, as far as its names still lead to it; returns those blocks."""
        now = self._usage.tick(self._clock_ns())
        admitted: list[bytes] = []
        with self._lock:
            # Under the lock, so that an eviction of the same block comes wholly before or wholly after: whoever
            # hears "stored" last finds the block.
            for key in written.keys:
                with contextlib.suppress(OSError):
                    found = self._fs.stat(self._segments.path(key))
                    self._catalog.add(Found(key, found.st_ino, found.st_size, now))
                    self._distrusted.pop(key, None)
                    admitted.append(key)
            self._announce(removed=False, keys=tuple(admitted))
            used = self._catalog.used_bytes
        self._touch(admitted, now)
        if self._excess(used):
            self._queue_eviction()
        return frozenset(admitted)

    # -- load ------------------------------------------------------------------------------------------------

    def load(self, blocks: Sequence[Block], *, per_task: int = 1) -> Future[Results]:
        """Fill the blocks' buffers; a buffer is undefined unless its block's result is LOADED.

        Args:
            blocks: where each block is to go.
            per_task: blocks that one thread reads in a row.

        Returns:
            A future that always ends, with one result per key: LOADED, MISS, FAILED or CANCELLED.
        """
        pieces = [tuple(blocks[at : at + per_task]) for at in range(0, len(blocks), per_task)]
        job = _Job(len(pieces))
        for piece in pieces:
            cancelled = {block.key: Result(Outcome.CANCELLED, "the tier closed") for block in piece}
            task = Task(
                lambda piece=piece: job.add(self._guarded(self.read_now, piece)),  # type: ignore[misc]
                lambda cancelled=cancelled: job.add(cancelled),  # type: ignore[misc]
                sum(block.size_bytes for block in piece),
            )
            try:
                self._pool.read(task)
            except ClosedError:
                job.add(cancelled)
        return job.future

    def read_now(self, piece: Sequence[Block]) -> Results:
        """Read blocks on the calling thread."""
        keys = [block.key for block in piece]
        with self._lock:
            pinned = self._catalog.pin(keys)
        try:
            results = {block.key: self._read_block(block) for block in piece}
        finally:
            with self._lock:
                self._catalog.unpin(pinned)
        self._note_use(key for key, result in results.items() if result.ok)
        return results

    def _read_block(self, block: Block) -> Result:
        begin = time.perf_counter()
        try:
            self._segments.read(block)
        except Missing as error:
            self.metrics.count("misses")
            self._vanished(block.key)
            return Result(Outcome.MISS, str(error))
        except Corrupt as error:
            self.metrics.count("misses")
            self._drop_corrupt(block.key, error)
            return Result(Outcome.MISS, f"not usable: {error}")
        except OSError as error:
            self.metrics.count("failed")
            with self._lock:
                self._distrust(block.key)
            return Result(Outcome.FAILED, _text(error))
        seconds = time.perf_counter() - begin
        self.metrics.moved("file", "load", blocks=1, size_bytes=block.size_bytes, seconds=seconds)
        self.metrics.count("hits")
        return Result(Outcome.LOADED, tier=Tier.FILE)

    def lookup(self, keys: Iterable[bytes]) -> dict[bytes, bool]:
        """Return which blocks have a file with a sound header; only a load can promise more.

        Blocks, on a remote file system for as long as that takes to answer.
        """
        found: dict[bytes, bool] = {}
        for key in keys:
            found[key] = self._already_there(key)
            if not found[key]:
                self._vanished(key)
        return found

    def lookup_async(self, keys: Sequence[bytes]) -> Future[dict[bytes, bool]]:
        """Do :meth:`lookup` on an I/O thread; the future always ends, with False for what was not answered."""
        future: Future[dict[bytes, bool]] = Future()
        absent = dict.fromkeys(keys, False)

        def run() -> None:
            try:
                future.set_result(self.lookup(keys))
            except Exception:  # noqa: BLE001 - an unanswered lookup is a miss
                future.set_result(absent)

        try:
            self._pool.read(Task(run, lambda: future.set_result(absent), 0))
        except ClosedError:
            future.set_result(absent)
        return future

    def _is_distrusted(self, key: bytes) -> bool:
        with self._lock:
            until = self._distrusted.get(key)
            if until is None:
                return False
            if self._monotonic() < until:
                return True
            del self._distrusted[key]
            return False

    def _vanished(self, key: bytes) -> None:
        """Announce a block that was known and whose file is gone."""
        if self._is_distrusted(key):
            return
        with self._lock:
            if key not in self._catalog:
                return
            try:
                self._fs.stat(self._segments.path(key))
            except FileNotFoundError:
                self._catalog.remove(key)
                self.metrics.count("vanished")
                self._announce(removed=True, keys=(key,))
            except OSError:
                return

    def _drop_corrupt(self, key: bytes, error: Corrupt) -> None:
        self.metrics.count("corrupt")
        with self._lock:
            try:
                if self.read_only:
                    self._distrust(key)
                elif not self._segments.quarantine(key, error.inode):
                    return  # another writer has replaced it meanwhile
            except OSError:
                self._distrust(key)
            self._catalog.remove(key)
            # An earlier run may have announced the file, so its end is announced even if this one did not.
            self._announce(removed=True, keys=(key,))

    def _distrust(self, key: bytes) -> None:
        self._distrusted[key] = self._monotonic() + self.settings.distrust_seconds

    # -- use, capacity ---------------------------------------------------------------------------------------

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note a use without a transfer (a hit in a nearer tier keeps the farther copy young)."""
        self._note_use(keys)

    def _note_use(self, keys: Iterable[bytes]) -> None:
        listed = list(keys)
        if listed:
            now = self._usage.tick(self._clock_ns())
            with self._lock:
                self._catalog.touch(listed, now)
            self._touch(listed, now)

    def _touch(self, keys: Iterable[bytes], now: int) -> None:
        due = self._usage.touch(keys, now)
        with self._lock:
            moment = self._monotonic()
            if self.read_only or self._flush_queued or not (due or moment >= self._flush_due):
                return
            self._flush_due = moment + self.settings.usage_flush_seconds
            self._flush_queued = True
        with contextlib.suppress(ClosedError):
            self._pool.write(Task(self._flush_usage, lambda: None, 0), force=True)

    def _flush_usage(self) -> None:
        with self._lock:
            self._flush_queued = False
        self._usage.flush()

    @property
    def used_bytes(self) -> int:
        """Bytes of the files known, the directory's own scan and our stores together."""
        with self._lock:
            return self._catalog.used_bytes

    def known(self) -> frozenset[bytes]:
        """Return the blocks that the last scan and our own stores found."""
        with self._lock:
            return frozenset(self._catalog.keys())

    def _limit(self) -> int:
        try:
            total = self._fs.space(self.directory).total
        except OSError:
            return self.settings.budget.max_bytes or 1 << 62
        return self.settings.budget.limit_bytes(total)

    def _excess(self, used: int, incoming: int = 0) -> int:
        return self.settings.budget.excess_bytes(used, self._limit(), incoming)

    def _make_room(self, incoming: int) -> bool:
        """Return whether ``incoming`` bytes fit the budget, after evicting if they would not."""
        limit = self._limit()
        if self.used_bytes + incoming <= limit:
            return True
        self.evict_excess(incoming)
        return self.used_bytes + incoming <= limit

    def _queue_eviction(self) -> None:
        with contextlib.suppress(ClosedError):
            self._pool.write(Task(lambda: _ignore(self.evict_excess(0)), lambda: None, 0), force=True)

    def evict_excess(self, incoming: int = 0) -> int:
        """Evict what was longest unused until the low watermark is met; returns the bytes freed."""
        freed = 0
        with self._evicting:
            with self._lock:
                excess = self._excess(self._catalog.used_bytes, incoming)
                victims = self._catalog.victims(excess)
            if excess:
                scan.empty_quarantine(self._fs, self.directory, self.settings.quarantine_files)
            for victim in victims:
                freed += self._evict_victim(victim)
        return freed

    def _evict_victim(self, victim: Victim) -> int:
        gone: list[bytes] = []
        with self._lock:
            for key in victim.keys:
                with contextlib.suppress(OSError):
                    self._segments.remove(key, victim.inode)
                    if self._catalog.inode_of(key) == victim.inode:
                        self._catalog.remove(key)
                        gone.append(key)
            self._announce(removed=True, keys=tuple(gone))
        self.metrics.count("evicted", len(gone))
        if len(gone) < len(victim.keys):
            return 0
        self.metrics.count("evicted_bytes", victim.size_bytes)
        return victim.size_bytes

    def evict(self, keys: Iterable[bytes]) -> Results:
        """Remove blocks by name.

        Returns:
            Per key MISS (it is not there any more, or was not) or FAILED (it could not be removed).
        """
        results: Results = {}
        with self._lock:
            gone: list[bytes] = []
            for key in keys:
                try:
                    removed = self._segments.remove(key)
                except OSError as error:
                    results[key] = Result(Outcome.FAILED, _text(error))
                    continue
                removed = self._catalog.remove(key) or removed
                if removed:
                    gone.append(key)
                results[key] = Result(Outcome.MISS, "evicted" if removed else "was not there")
            self._announce(removed=True, keys=tuple(gone))
        self.metrics.count("evicted", len(gone))
        return results

    def rescan(self) -> None:
        """Rebuild the catalog from the directory; stores that run meanwhile are kept."""
        try:
            with self._lock:
                before = frozenset(self._catalog.keys())
            now = self._clock_ns()
            on_disk: set[bytes] = set()
            for found in scan.scan_blocks(self._fs, self.directory, now):
                on_disk.add(found.key)
                self._usage.seen(found.last_use_ns)
                with self._lock:
                    self._catalog.add(found)
            for key in before - on_disk:
                self._vanished(key)
            if not self.read_only:
                scan.remove_stale_staging(self._fs, self.directory, now, self.settings.stale_seconds)
        except OSError:
            self.metrics.count("scan_failed")
        finally:
            self.scanned.set()
        if self._excess(self.used_bytes):
            self._queue_eviction()

    # -- end -------------------------------------------------------------------------------------------------

    def _announce(self, *, removed: bool, keys: tuple[bytes, ...]) -> None:
        if self._listener is not None and keys:
            self._listener(Change(removed, keys))

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no transfer is queued or running."""
        return self._pool.drain(timeout_seconds)

    def close(self, *, drain: bool = False) -> None:
        """End the threads, transfers that have not begun become CANCELLED unless ``drain``; write the uses."""
        self._pool.close(drain=drain)
        if not self.read_only:
            self._usage.flush()

    def __enter__(self) -> FileTier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=True)


_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def _text(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}"


def _ignore(_: object) -> None:
    return None
