"""When blocks were last used, kept beside the blocks.

File times cannot say it: access times are off on most mounts, and a read must not cost a metadata write. Each
writer appends fixed records to a file of its own, so that no lock is needed; a reader takes the latest time per
block over all files. A torn or damaged record is skipped; a lost file only means that its blocks count as last
used when they were written::

    0 16  XXH3-128 of the block key     16 8  last use, ns since the epoch     24 8  XXH3-64 of bytes 0..23
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import xxhash

from kvatlas.connector.fs import FileSystem, read_full, write_full

RECORD: Final = struct.Struct("<16sQQ")
SUFFIX: Final = ".use"
_READ_BYTES: Final = 1 << 20


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
            if entry.is_dir or not entry.name.endswith(SUFFIX):
                continue
            with contextlib.suppress(OSError):
                for key, used_ns in decode(_read_file(fs, directory / entry.name)).items():
                    if used_ns > found.get(key, -1):
                        found[key] = used_ns
    return found


def _read_file(fs: FileSystem, path: Path) -> bytes:
    fd = fs.open(path, os.O_RDONLY)
    try:
        chunks: list[bytes] = []
        offset = 0
        while True:
            chunk = bytearray(_READ_BYTES)
            got = read_full(fs, fd, [memoryview(chunk)], offset)
            chunks.append(bytes(chunk[:got]))
            offset += got
            if got < _READ_BYTES:
                return b"".join(chunks)
    finally:
        fs.close(fd)


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
            due = len(self._pending) >= self._flush_records or moment >= self._flush_at
            if not due or self._asked or not self._pending:
                return False
            self._asked = True
            self._flush_at = moment + self._flush_seconds
            return True

    def flush(self) -> bool:
        """Append what was collected; False when the file system refused (it is kept for the next time)."""
        with self._io:
            with self._lock:
                pending, self._pending = self._pending, {}
                self._asked = False
            if not pending:
                return True
            try:
                # Opened for each flush: whoever merges usage files may have taken this one away.
                fd = self._fs.open(self._path, os.O_CREAT | os.O_WRONLY)
                try:
                    # A record torn by a crash must not shift those after it.
                    end = -(-self._fs.fstat(fd).st_size // RECORD.size) * RECORD.size
                    write_full(self._fs, fd, [memoryview(encode(pending.items()))], end)
                finally:
                    self._fs.close(fd)
            except OSError:
                with self._lock:
                    self._pending = {**pending, **self._pending}
                return False
            return True
