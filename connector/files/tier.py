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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Final

from kvatlas.connector.errors import ClosedError
from kvatlas.connector.files import directory, layout, scan
from kvatlas.connector.files.blocks import BlockBuffers, Corrupt, Missing, Written
from kvatlas.connector.files.buffers import AlignedPool
from kvatlas.connector.files.capacity import Capacity
from kvatlas.connector.files.fs import FileSystem, PosixFileSystem, probe_direct, probe_links
from kvatlas.connector.files.gate import IoGate
from kvatlas.connector.files.gather import Gather
from kvatlas.connector.files.holdings import Change, Holdings, error_text
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.files.pool import IoPool, Task
from kvatlas.connector.files.segments import SegmentFiles
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.files.usage import UsageLog
from kvatlas.connector.metrics import Metrics
from kvatlas.connector.outcome import OffloadTier, Outcome, Result, Results


class FileTier:
    """Blocks of one fingerprint below one root.

    Args:
        settings: see :class:`FileTierSettings`.
        fingerprint: decides the directory.
        fs: the file system (tests inject faults here).
        clock_ns: wall clock in nanoseconds.
        monotonic: seconds that never go back, for waiting periods.
        listener: told of every change in order, from I/O threads under the tier's lock: it must be quick, must not
            raise and must not call the tier.
        metrics: where to count; its own when None.

    Raises:
        LayoutError: the directory says that it belongs to another fingerprint.
    """

    kind: Final = "file"

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
        self._writer = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self.read_only = not directory.prepare(self._fs, self.directory, fingerprint, self._writer)
        writes = settings.write_threads or max(1, settings.threads // 2)
        staging = self.directory / layout.STAGING
        direct = settings.direct and not self.read_only
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
            gate=IoGate(settings.threads, writes),
            writer=self._writer,
        )
        self._usage = UsageLog(
            self._fs,
            self.directory / layout.USAGE,
            self._writer,
            flush_seconds=settings.usage_flush_seconds,
            monotonic=monotonic,
            known=lambda: self._holdings.known() if self.scanned.is_set() else None,
        )
        self._holdings = Holdings(
            self._fs,
            self._segments,
            self.metrics,
            read_only=self.read_only,
            distrust_seconds=settings.distrust_seconds,
            monotonic=monotonic,
            trim_quarantine=self._trim_quarantine,
            listener=listener,
        )
        self._capacity = Capacity(self._fs, self.directory, settings.budget, self._holdings, monotonic=monotonic)
        self._pool = IoPool(
            threads=settings.threads + settings.checksum_threads,
            write_threads=writes + settings.checksum_threads,
            queued_write_bytes=settings.queued_write_bytes,
            cpus=settings.cpus,
        )
        self.metrics.gauges["queued_reads"] = lambda: float(self._pool.queued[0])
        self.metrics.gauges["queued_writes"] = lambda: float(self._pool.queued[1])
        self.metrics.gauges["file_used_bytes"] = lambda: float(self._holdings.used_bytes)
        #: Set once the first scan of the directory ended.
        self.scanned = threading.Event()
        self._pool.read(Task(self.rescan, self.scanned.set, 0))

    # -- store -----------------------------------------------------------------------------------------------

    def store(self, blocks: Sequence[BlockBuffers]) -> Future[Results]:
        """Write blocks; their buffers must stay unchanged until the future is done.

        Returns:
            A future that always ends, with one result per key: STORED, EXISTS, SHED, FAILED or CANCELLED.
        """
        step = self.blocks_per_file
        pieces = [tuple(blocks[at : at + step]) for at in range(0, len(blocks), step)]
        job = Gather(len(pieces))
        for piece in pieces:
            self._submit_store(job, piece)
        return job.future

    def _submit_store(self, job: Gather, piece: Sequence[BlockBuffers]) -> None:
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

    def _guarded(self, work: Callable[[Sequence[BlockBuffers]], Results], piece: Sequence[BlockBuffers]) -> Results:
        """Do the work of one task; whatever goes wrong becomes a result, so that a future always ends."""
        try:
            return work(piece)
        except Exception as error:  # noqa: BLE001 - the outcome carries it
            self.metrics.count("failed", len(piece))
            return {block.key: Result(Outcome.FAILED, repr(error)) for block in piece}

    def _store_piece(self, piece: Sequence[BlockBuffers]) -> Results:
        results: Results = {}
        fresh: list[BlockBuffers] = []
        for block in piece:
            if self._holdings.find(block.key, self._now(), block.size_bytes):
                results[block.key] = Result(Outcome.EXISTS, tier=OffloadTier.FILE)
            else:
                fresh.append(block)
        self._note_use(results)
        if fresh:
            results.update(self._write_fresh(fresh))
        return results

    def _write_fresh(self, fresh: Sequence[BlockBuffers]) -> Results:
        keys = [block.key for block in fresh]
        size = sum(block.size_bytes for block in fresh)
        if self.read_only:
            self.metrics.count("failed", len(fresh))
            return dict.fromkeys(keys, Result(Outcome.FAILED, "the root is read-only"))
        if not self._capacity.make_room(size + layout.header_bytes(len(fresh))):
            self.metrics.count("shed", len(fresh))
            why = "the disk is full" if self._capacity.full else "the budget is used up"
            return dict.fromkeys(keys, Result(Outcome.SHED, why))
        begin = time.perf_counter()
        try:
            written = self._segments.write(fresh)
        except OSError as error:
            published: tuple[bytes, ...] = getattr(error, "published", ())
            return self._failed_write(error, keys, published, size + layout.header_bytes(len(fresh)))
        self.metrics.moved("file", "store", blocks=len(fresh), size_bytes=size, seconds=time.perf_counter() - begin)
        admitted = self._admit(written)
        return {
            key: Result(Outcome.STORED, tier=OffloadTier.FILE)
            if key in admitted
            else Result(Outcome.FAILED, "removed right after it was written")
            for key in keys
        }

    def _failed_write(self, error: OSError, keys: Sequence[bytes], published: Sequence[bytes], needed: int) -> Results:
        """Report a failed segment; the blocks that got their names before the failure are whole and stay."""
        results: Results = {}
        for key in published:
            with contextlib.suppress(Missing, Corrupt, OSError):
                if self._admit(self._segments.probe(key)._replace(keys=(key,))):
                    results[key] = Result(Outcome.STORED, tier=OffloadTier.FILE)
        failed = [key for key in keys if key not in results]
        self.metrics.count("failed", len(failed))
        results.update(dict.fromkeys(failed, Result(Outcome.FAILED, error_text(error))))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._queue(lambda: self._capacity.refused(needed))
        return results

    def _admit(self, written: Written) -> frozenset[bytes]:
        now = self._now()
        admitted = self._holdings.admit(written, now)
        self._use(admitted, now)
        if self._capacity.exceeded():
            self._queue(self.evict_excess)
        return admitted

    # -- load ------------------------------------------------------------------------------------------------

    def load(self, blocks: Sequence[BlockBuffers], *, per_task: int = 0) -> Future[Results]:
        """Fill the blocks' buffers; a buffer is undefined unless its block's result is LOADED.

        Args:
            blocks: where each block is to go.
            per_task: blocks that one thread reads, with one call where they are one file's; 0 takes as many as a
                file holds when every thread gets some then, else one, so that few blocks come from all threads.

        Returns:
            A future that always ends, with one result per key: LOADED, MISS, FAILED or CANCELLED.
        """
        if not per_task:
            per_task = self.blocks_per_file if len(blocks) >= self.blocks_per_file * self.settings.threads else 1
        pieces = [tuple(blocks[at : at + per_task]) for at in range(0, len(blocks), per_task)]
        job = Gather(len(pieces))
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

    def read_now(self, piece: Sequence[BlockBuffers]) -> Results:
        """Read blocks on the calling thread."""
        keys = [block.key for block in piece]
        with self._holdings.pinned(keys):
            results = self._read_together(piece) if len(piece) > 1 else {}
            for block in piece:
                if block.key not in results:
                    results[block.key] = self._read_block(block)
        self._note_use(key for key, result in results.items() if result.ok)
        return results

    def _read_together(self, piece: Sequence[BlockBuffers]) -> Results:
        """Read blocks that share a file with one call; what is left out is for :meth:`_read_block` to judge."""
        begin = time.perf_counter()
        try:
            good = self._segments.read_whole(piece)
        except (Missing, Corrupt, OSError):
            return {}
        size = sum(block.size_bytes for block in piece if block.key in good)
        if good:
            self._moved(len(good), size, begin)
        return dict.fromkeys(good, Result(Outcome.LOADED, tier=OffloadTier.FILE))

    def _moved(self, blocks: int, size: int, begin: float) -> None:
        seconds = time.perf_counter() - begin
        self.metrics.moved("file", "load", blocks=blocks, size_bytes=size, seconds=seconds)
        self.metrics.count("hits", blocks)

    def _read_block(self, block: BlockBuffers) -> Result:
        begin = time.perf_counter()
        try:
            self._segments.read(block)
        except Missing as error:
            self.metrics.count("misses")
            self._holdings.vanished(block.key)
            return Result(Outcome.MISS, str(error))
        except Corrupt as error:
            self.metrics.count("misses")
            self._holdings.drop_corrupt(block.key, error)
            return Result(Outcome.MISS, f"not usable: {error}")
        except OSError as error:
            self.metrics.count("failed")
            self._holdings.distrusted.add(block.key)
            return Result(Outcome.FAILED, error_text(error))
        self._moved(1, block.size_bytes, begin)
        return Result(Outcome.LOADED, tier=OffloadTier.FILE)

    def lookup(self, keys: Iterable[bytes]) -> dict[bytes, bool]:
        """Return which blocks have a file with a sound header; only a load can promise more.

        Blocks, on a remote file system for as long as that takes to answer.
        """
        found: dict[bytes, bool] = {}
        for key in keys:
            found[key] = self._holdings.find(key, self._now())
            if not found[key]:
                self._holdings.vanished(key)
        return found

    # -- use, capacity ---------------------------------------------------------------------------------------

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note a use without a transfer (a hit in a nearer tier keeps the farther copy young)."""
        self._note_use(keys, here=False)

    def _note_use(self, keys: Iterable[bytes], *, here: bool = True) -> None:
        listed = list(keys)
        if listed:
            now = self._now()
            self._holdings.touch(listed, now)
            self._use(listed, now)
            if here:
                self._holdings.confirm(listed, now)

    def _now(self) -> int:
        return self._usage.tick(self._clock_ns())

    def _use(self, keys: Iterable[bytes], now: int) -> None:
        # On a read-only root uses could only pile up in memory.
        if not self.read_only and self._usage.touch(keys, now):
            self._queue(self._usage.flush)
            if self._capacity.exceeded():  # an engine that only loads gives room back too, on a disk that it shares
                self._queue(self.evict_excess)

    @property
    def used_bytes(self) -> int:
        """Bytes of the files known, the directory's own scan and our stores together."""
        return self._holdings.used_bytes

    def known(self) -> frozenset[bytes]:
        """Return the blocks that the last scan and our own stores found."""
        return self._holdings.known()

    def _queue(self, upkeep: Callable[[], object]) -> None:
        with contextlib.suppress(ClosedError):
            self._pool.write(Task(upkeep, lambda: None, 0), force=True)

    def _trim_quarantine(self) -> None:
        kept = self.settings
        scan.empty_quarantine(self._fs, self.directory, kept.quarantine_files, kept.quarantine_bytes)

    def evict_excess(self, incoming: int = 0) -> int:
        """Evict what was longest unused until the low watermark is met; returns the bytes freed."""
        return self._capacity.evict_excess(incoming)

    def evict(self, keys: Iterable[bytes]) -> Results:
        """Remove blocks by name.

        Returns:
            Per key MISS (it is not there any more, or was not) or FAILED (it could not be removed).
        """
        return self._holdings.evict(keys)

    def rescan(self) -> None:
        """Rebuild the catalog from the directory; stores that run meanwhile are kept."""
        try:
            now = self._clock_ns()
            self._holdings.rescan(self.directory, now, self._usage.seen)
            if not self.read_only:
                stale, known = self.settings.stale_seconds, self._holdings.known
                scan.tidy(self._fs, self.directory, now, writer=self._writer, stale_seconds=stale, known=known)
                self._trim_quarantine()
        except OSError:
            self.metrics.count("scan_failed")
        finally:
            self.scanned.set()
        if self._capacity.exceeded():
            self._queue(self.evict_excess)

    # -- end -------------------------------------------------------------------------------------------------

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
