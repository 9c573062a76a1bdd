"""When blocks were last used, kept beside the blocks.

File times cannot say it: access times are off on most mounts, and a read must not cost a metadata write. Each
writer appends fixed records to a file of its own, so that no lock is needed; a reader takes the latest time per
block over all files. A torn or damaged record is skipped; a lost file only means that its blocks count as last
used when they were written::

    0 16  XXH3-128 of the block key     16 8  last use, ns since the epoch     24 8  XXH3-64 of bytes 0..23

A writer rewrites its own file when that has grown, and an engine that starts merges the files of writers that fell
silent (:func:`merge`), each time without blocks that are gone. So the folder holds about a record or two per
block and writer, one file per writer of the last while, and one more.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import xxhash

from kvatlas.connector.files.fs import FileSystem, read_full, write_full

RECORD: Final = struct.Struct("<16sQQ")
SUFFIX: Final = ".use"
_TEMPORARY: Final = ".tmp"
#: A whole number of records, so that each piece read is decoded by itself.
_READ_BYTES: Final = RECORD.size << 15
#: Size of a writer's file below which rewriting it is not worth the trouble.
_REWRITE_BYTES: Final = 2 << 20
#: Uses kept while the file system refuses them; of more, the latest.
_KEPT_RECORDS: Final = 1 << 16

#: Says which blocks there are.
Known = Callable[[], Iterable[bytes]]


def usage_key(key: bytes) -> bytes:
    """Return the 16 bytes under which a block's use is recorded."""
    return xxhash.xxh3_128_digest(key)


def encode(uses: Iterable[tuple[bytes, int]]) -> bytes:
    """Return records for ``(usage key, time in ns)`` pairs."""
    out = bytearray()
    for key, used_ns in uses:
        body = key + used_ns.to_bytes(8, "little")
        out += body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")
    return bytes(out)


def decode(data: bytes) -> dict[bytes, int]:
    """Return the latest time per usage key, leaving out records that do not verify."""
    found: dict[bytes, int] = {}
    for start in range(0, len(data) - RECORD.size + 1, RECORD.size):
        key, used_ns, total = RECORD.unpack_from(data, start)
        if xxhash.xxh3_64_intdigest(data[start : start + 24]) == total and used_ns > found.get(key, -1):
            found[key] = used_ns
    return found


def read_usage(fs: FileSystem, directory: Path) -> dict[bytes, int]:
    """Return the latest use per usage key over every writer's file; what cannot be read is left out."""
    found: dict[bytes, int] = {}
    with contextlib.suppress(OSError):
        for entry in fs.listdir(directory):
            if not entry.is_dir and entry.name.endswith(SUFFIX):
                with contextlib.suppress(OSError):
                    _read_into(found, fs, directory / entry.name)
    return found


def merge(fs: FileSystem, directory: Path, writer: str, *, silent_since_ns: int, known: Known) -> int:
    """Make one file of those that nobody wrote to for a while; returns how many went into it.

    Safe beside running writers and other merges: a file is first renamed, so it has one taker; a writer that was
    only silent notices that its file is away and writes its records again; until the new file has its name, the
    old ones are read as before.

    Args:
        fs: the file system.
        directory: the ``usage`` directory.
        writer: unique among processes, makes the names.
        silent_since_ns: files changed later are left alone.
        known: the blocks there are; uses of others are dropped.

    Raises:
        OSError: the system refused; no record is lost.
    """
    silent: list[str] = []
    for entry in fs.listdir(directory):
        with contextlib.suppress(OSError):
            if entry.is_dir or fs.stat(directory / entry.name).st_mtime_ns >= silent_since_ns:
                continue
            if entry.name.endswith(SUFFIX):
                silent.append(entry.name)
            elif entry.name.endswith(_TEMPORARY):
                fs.unlink(directory / entry.name)
    if len(silent) < 2:
        return 0
    # Names of this one merge: what an earlier one left must not be overwritten.
    stem = f"{writer}-{uuid.uuid4().hex[:12]}"
    taken: list[Path] = []
    for number, name in enumerate(sorted(silent)):
        target = directory / f"{stem}-{number}{SUFFIX}"
        with contextlib.suppress(FileNotFoundError):
            fs.replace(directory / name, target)
            taken.append(target)
    found: dict[bytes, int] = {}
    whole: list[Path] = []
    for path in taken:
        with contextlib.suppress(OSError):
            if _read_into(found, fs, path):
                whole.append(path)
    _publish(fs, directory / f"{stem}{SUFFIX}", _living(found, known()))
    for path in whole:
        with contextlib.suppress(OSError):
            fs.unlink(path)
    return len(whole)


def _living(found: dict[bytes, int], known: Iterable[bytes]) -> dict[bytes, int]:
    return {key: found[key] for key in map(usage_key, known) if key in found}


def _publish(fs: FileSystem, path: Path, uses: dict[bytes, int]) -> int:
    """Write a file of its own under a passing name and rename it; returns its size in bytes."""
    temporary = path.with_name(path.name + _TEMPORARY)
    data = encode(uses.items())
    try:
        fd = fs.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            write_full(fs, fd, [memoryview(data)] if data else [], 0)
            fs.fsync(fd)
        finally:
            fs.close(fd)
        fs.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            fs.unlink(temporary)
        raise
    return len(data)


def _read_into(found: dict[bytes, int], fs: FileSystem, path: Path) -> bool:
    """Add a file's records piece by piece; False when it is gone."""
    try:
        fd = fs.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        memory = memoryview(bytearray(_READ_BYTES))
        for offset in itertools.count(0, _READ_BYTES):
            got = read_full(fs, fd, [memory], offset)
            for key, used_ns in decode(bytes(memory[:got])).items():
                if used_ns > found.get(key, -1):
                    found[key] = used_ns
            if got < _READ_BYTES:
                break
    finally:
        fs.close(fd)
    return True


class UsageLog:
    """Collects uses in memory and appends them to this writer's file.

    Time never goes back inside one log: after the clock jumped back, uses continue from the latest time seen, so
    what was used last stays last.

    Args:
        fs: the file system.
        directory: the fingerprint's ``usage`` directory.
        writer: name of this writer's file, unique among engines and evictors.
        flush_records: a flush is due as soon as this many blocks were used.
        flush_seconds: or when the last one is this long ago.
        monotonic: seconds that never go back.
        rewrite_bytes: size from which the file is rewritten with a record per block that is there.
        known: the blocks there are; None while that is not known yet.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        writer: str,
        *,
        flush_records: int = 4096,
        flush_seconds: float = 10.0,
        monotonic: Callable[[], float] = time.monotonic,
        rewrite_bytes: int = _REWRITE_BYTES,
        known: Callable[[], Iterable[bytes] | None] = lambda: None,
    ) -> None:
        self._fs = fs
        self._path = directory / f"{writer}{SUFFIX}"
        self._pending: dict[bytes, int] = {}
        self._latest_ns = 0
        self._flush_records = flush_records
        self._flush_seconds = flush_seconds
        self._monotonic = monotonic
        self._flush_at = 0.0
        self._asked = False
        self._refused = False
        self._least_rewrite_bytes = self._rewrite_bytes = rewrite_bytes
        self._known = known
        self._lock = threading.Lock()
        self._io = threading.Lock()

    def tick(self, now_ns: int) -> int:
        """Return ``now_ns``, or just after the latest time when the clock went back."""
        with self._lock:
            self._latest_ns = max(now_ns, self._latest_ns + 1)
            return self._latest_ns

    def seen(self, used_ns: int) -> None:
        """Make later times come after ``used_ns`` (found in the files of an earlier run)."""
        with self._lock:
            self._latest_ns = max(self._latest_ns, used_ns)

    def touch(self, keys: Iterable[bytes], used_ns: int) -> bool:
        """Note a use; returns whether a flush is due, once until the next :meth:`flush`."""
        moment = self._monotonic()
        with self._lock:
            for key in keys:
                self._pending[usage_key(key)] = used_ns
            # After a refusal only time makes a flush due, or each use would ask a full disk again.
            many = len(self._pending) >= self._flush_records and not self._refused
            due = many or moment >= self._flush_at
            if not due or self._asked or not self._pending:
                return False
            self._asked = True
            self._flush_at = moment + self._flush_seconds
            return True

    def flush(self) -> bool:
        """Append what was collected; False when the file system refused (the latest is kept for the next time)."""
        with self._io:
            with self._lock:
                pending, self._pending = self._pending, {}
                self._asked = False
            if not pending:
                return True
            data = encode(pending.items())
            try:
                size = self._append(data) or self._append(data)
            except OSError:
                self._keep(pending)
                return False
            self._refused = False
            if size > self._rewrite_bytes:
                self._rewrite(size)
            return True

    def _keep(self, pending: dict[bytes, int]) -> None:
        with self._lock:
            merged = {**pending, **self._pending}
            if len(merged) > _KEPT_RECORDS:
                merged = dict(heapq.nlargest(_KEPT_RECORDS, merged.items(), key=lambda item: item[1]))
            self._pending = merged
            self._refused = True
            self._flush_at = self._monotonic() + self._flush_seconds

    def _append(self, data: bytes) -> int:
        """Append records; returns the file's size, 0 when a merge took the file away meanwhile."""
        # Opened for each flush: a merge may have taken this file away.
        fd = self._fs.open(self._path, os.O_CREAT | os.O_WRONLY)
        try:
            info = self._fs.fstat(fd)
            # A record torn by a crash must not shift those after it.
            end = -(-info.st_size // RECORD.size) * RECORD.size
            write_full(self._fs, fd, [memoryview(data)], end)
        finally:
            self._fs.close(fd)
        try:
            return end + len(data) if self._fs.stat(self._path).st_ino == info.st_ino else 0
        except FileNotFoundError:
            return 0

    def _rewrite(self, size: int) -> None:
        """Leave one record per block that is there; what is refused is tried again when the file has doubled."""
        with contextlib.suppress(OSError):
            found: dict[bytes, int] = {}
            _read_into(found, self._fs, self._path)
            known = self._known()
            size = _publish(self._fs, self._path, found if known is None else _living(found, known))
        self._rewrite_bytes = max(self._least_rewrite_bytes, 2 * size)
