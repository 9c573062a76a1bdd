"""What the file tier says that it holds: the catalog, what was announced of it, and what is not trusted for now.

One lock covers a change of names on disk, of the catalog and its announcement, so that whoever hears "stored" last
finds the block, and whoever hears "removed" last does not.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kvatlas.connector.files import scan
from kvatlas.connector.files.blocks import Corrupt, Missing, Written
from kvatlas.connector.files.catalog import Catalog, Found, Victim
from kvatlas.connector.files.fs import FileSystem
from kvatlas.connector.files.recent import Recent
from kvatlas.connector.files.segments import SegmentFiles
from kvatlas.connector.metrics import Metrics
from kvatlas.connector.outcome import Outcome, Result, Results


class Change(NamedTuple):
    """Blocks that became readable (``removed`` False) or stopped being so."""

    removed: bool
    keys: tuple[bytes, ...]


def error_text(error: OSError) -> str:
    """Return an error's name and text, for people."""
    return f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}"


class Holdings:
    """The blocks of one directory as the tier knows them. Thread-safe.

    Args:
        fs: the file system.
        segments: the directory's files.
        metrics: where to count.
        read_only: nothing can be moved or removed; what does not verify is not trusted instead.
        distrust_seconds: how long a block that failed is reported absent.
        trim_quarantine: called after a file came to the quarantine.
        monotonic: seconds that never go back.
        listener: told of every change in the order they happened, under the lock: it must return quickly, must not
            raise and must not call back.

    Attributes:
        distrusted: blocks that are reported absent for a while; their files stay.
    """

    def __init__(
        self,
        fs: FileSystem,
        segments: SegmentFiles,
        metrics: Metrics,
        *,
        read_only: bool,
        distrust_seconds: float,
        monotonic: Callable[[], float],
        trim_quarantine: Callable[[], object],
        listener: Callable[[Change], None] | None,
    ) -> None:
        self._fs = fs
        self._segments = segments
        self._metrics = metrics
        self._read_only = read_only
        self._trim_quarantine = trim_quarantine
        self._listener = listener
        self._catalog = Catalog()
        self.distrusted = Recent(distrust_seconds, monotonic)
        self._told: set[bytes] = set()
        self._lock = threading.Lock()

    # -- what is known ---------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes of the files known."""
        with self._lock:
            return self._catalog.used_bytes

    def known(self) -> frozenset[bytes]:
        """Return the blocks known."""
        with self._lock:
            return frozenset(self._catalog.keys())

    def touch(self, keys: Iterable[bytes], used_ns: int) -> None:
        """Note a use of the blocks that are known."""
        with self._lock:
            self._catalog.touch(keys, used_ns)

    @contextlib.contextmanager
    def pinned(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Keep blocks from being evicted meanwhile."""
        with self._lock:
            pinned = self._catalog.pin(keys)
        try:
            yield
        finally:
            with self._lock:
                self._catalog.unpin(pinned)

    def victims(self, excess: Callable[[int], int]) -> list[Victim]:
        """Return the files longest unused; ``excess`` says from the bytes in use how many must go."""
        with self._lock:
            return self._catalog.victims(excess(self._catalog.used_bytes))

    # -- what comes ------------------------------------------------------------------------------------------

    def admit(self, written: Written, now_ns: int) -> frozenset[bytes]:
        """Make a published segment known, as far as its names still lead to a file; returns those blocks."""
        admitted: list[bytes] = []
        with self._lock:
            for key in written.keys:
                with contextlib.suppress(OSError):
                    found = self._fs.stat(self._segments.path(key))
                    self._catalog.add(Found(key, found.st_ino, found.st_size, now_ns))
                    self.distrusted.discard(key)
                    admitted.append(key)
            self._announce(removed=False, keys=tuple(admitted))
        return frozenset(admitted)

    def confirm(self, keys: Iterable[bytes], now_ns: int) -> None:
        """Announce verified blocks not announced by this process yet: an earlier run's, or a neighbour's.

        A restarted engine counts as empty, so what its files still hold must be told again, when it is known best:
        as the engine stores or loads the block.
        """
        fresh: list[bytes] = []
        with self._lock:
            for key in keys:
                if key in self._told:
                    continue
                with contextlib.suppress(OSError):
                    found = self._fs.stat(self._segments.path(key))
                    self._catalog.add(Found(key, found.st_ino, found.st_size, now_ns))
                    fresh.append(key)
            self._announce(removed=False, keys=tuple(fresh))

    def find(self, key: bytes, now_ns: int, size: int | None = None) -> bool:
        """Return whether a block's file is there with a sound header.

        Args:
            key: the block.
            now_ns: the clock.
            size: also ask for this payload, and verify it unless this run told of the block: its bytes were right
                once in this run then. What :meth:`confirm` announces must have been found in this way or loaded.
        """
        if key in self.distrusted:
            return False
        try:
            written = self._segments.probe(key)
            with self._lock:
                if self._catalog.inode_of(key) != written.inode:  # another process published it
                    self._catalog.add(Found(key, written.inode, written.size_bytes, now_ns))
                told = key in self._told
            if size is not None and not told:
                self._segments.verify(key, size)
        except (Missing, OSError):
            return False
        except Corrupt as error:
            self.drop_corrupt(key, error)
            return False
        return True

    def rescan(self, directory: Path, now_ns: int, seen: Callable[[int], None]) -> None:
        """Rebuild the catalog from the directory; what is stored meanwhile is kept.

        Args:
            directory: the fingerprint's directory.
            now_ns: the clock.
            seen: told the last use of each block found.

        Raises:
            OSError: the directory cannot be read.
        """
        before = self.known()
        on_disk: set[bytes] = set()
        for found in scan.scan_blocks(self._fs, directory, now_ns):
            on_disk.add(found.key)
            seen(found.last_use_ns)
            with self._lock:
                self._catalog.add(found)
        for key in before - on_disk:
            self.vanished(key)

    # -- what goes -------------------------------------------------------------------------------------------

    def vanished(self, key: bytes) -> None:
        """Announce a block that was known and whose file is gone."""
        if key in self.distrusted:
            return
        with self._lock:
            if key not in self._catalog:
                return
            try:
                self._fs.stat(self._segments.path(key))
            except FileNotFoundError:
                self._catalog.remove(key)
                self._metrics.count("vanished")
                self._announce(removed=True, keys=(key,))
            except OSError:
                return

    def drop_corrupt(self, key: bytes, error: Corrupt) -> None:
        """Move a file that did not verify out of the way and announce its end."""
        self._metrics.count("corrupt")
        with self._lock:
            try:
                if self._read_only:
                    self.distrusted.add(key)
                elif not self._segments.quarantine(key, error.inode):
                    return  # another writer has replaced it meanwhile
            except OSError:
                self.distrusted.add(key)
            self._catalog.remove(key)
            # An earlier run may have announced the file, so its end is announced even if this one did not.
            self._announce(removed=True, keys=(key,))
        if not self._read_only:
            self._trim_quarantine()

    def evict_file(self, victim: Victim) -> int:
        """Take a chosen file's names away; returns the bytes freed, 0 while a name remains."""
        gone: list[bytes] = []
        with self._lock:
            for key in victim.keys:
                with contextlib.suppress(OSError):
                    self._segments.remove(key, victim.inode)
                    if self._catalog.inode_of(key) == victim.inode:
                        self._catalog.remove(key)
                        gone.append(key)
            self._announce(removed=True, keys=tuple(gone))
        self._metrics.count("evicted", len(gone))
        if len(gone) < len(victim.keys):
            return 0
        self._metrics.count("evicted_bytes", victim.size_bytes)
        return victim.size_bytes

    def evict(self, keys: Iterable[bytes]) -> Results:
        """Remove blocks by name; per key MISS (it is gone, or was) or FAILED (it could not be removed)."""
        results: Results = {}
        with self._lock:
            gone: list[bytes] = []
            for key in keys:
                try:
                    removed = self._segments.remove(key)
                except OSError as error:
                    results[key] = Result(Outcome.FAILED, error_text(error))
                    continue
                removed = self._catalog.remove(key) or removed
                if removed:
                    gone.append(key)
                results[key] = Result(Outcome.MISS, "evicted" if removed else "was not there")
            self._announce(removed=True, keys=tuple(gone))
        self._metrics.count("evicted", len(gone))
        return results

    def _announce(self, *, removed: bool, keys: tuple[bytes, ...]) -> None:
        if removed:
            self._told.difference_update(keys)
        else:
            self._told.update(keys)
        if self._listener is not None and keys:
            self._listener(Change(removed, keys))
