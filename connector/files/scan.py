"""Reading a fingerprint's directory back into a catalog."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from kvatlas.connector.files import layout
from kvatlas.connector.files.catalog import Found
from kvatlas.connector.files.fs import FileSystem
from kvatlas.connector.files.usage import Known, merge, read_usage, usage_key


def scan_blocks(
    fs: FileSystem, directory: Path, now_ns: int, progress: Callable[[int], None] | None = None
) -> Iterator[Found]:
    """Yield every block name below ``directory`` with its file and last use.

    Args:
        fs: the file system.
        directory: the fingerprint's directory.
        now_ns: the clock; a file "from the future" (the clock jumped back) counts as used now.
        progress: told the number of blocks found so far, once per subdirectory.

    Names that vanish while the scan runs are left out; what is not a block's name is not touched.
    """
    usage = read_usage(fs, directory / layout.USAGE)
    count = 0
    blocks = directory / layout.BLOCKS
    for fan in fs.listdir(blocks):
        if not fan.is_dir:
            continue
        for entry in fs.listdir(blocks / fan.name):
            key = None if entry.is_dir else layout.key_of(entry.name)
            if key is None:
                continue
            try:
                found = fs.stat(blocks / fan.name / entry.name)
            except OSError:
                continue
            used = max(min(found.st_mtime_ns, now_ns), usage.get(usage_key(key), 0))
            count += 1
            yield Found(key, found.st_ino, found.st_size, used)
        if progress is not None:
            progress(count)


def remove_stale_staging(fs: FileSystem, directory: Path, now_ns: int, stale_seconds: float) -> int:
    """Remove temporary files that no writer can still be filling; returns how many."""
    removed = 0
    staging = directory / layout.STAGING
    with contextlib.suppress(OSError):
        for entry in fs.listdir(staging):
            with contextlib.suppress(OSError):
                age_ns = now_ns - fs.stat(staging / entry.name).st_mtime_ns
                if age_ns > stale_seconds * 1e9:
                    fs.unlink(staging / entry.name)
                    removed += 1
    return removed


def tidy(fs: FileSystem, directory: Path, now_ns: int, *, writer: str, stale_seconds: float, known: Known) -> None:
    """Remove what dead writers left half written and merge what they noted of use; what is refused stays."""
    remove_stale_staging(fs, directory, now_ns, stale_seconds)
    with contextlib.suppress(OSError):
        silent = now_ns - int(stale_seconds * 1e9)
        merge(fs, directory / layout.USAGE, writer, silent_since_ns=silent, known=known)


def empty_quarantine(fs: FileSystem, directory: Path, keep_files: int, keep_bytes: int) -> int:
    """Remove what was quarantined first beyond ``keep_files`` or ``keep_bytes``; returns the bytes freed."""
    quarantine = directory / layout.QUARANTINE
    found: list[tuple[int, int, Path]] = []
    with contextlib.suppress(OSError):
        for entry in fs.listdir(quarantine):
            with contextlib.suppress(OSError):
                path = quarantine / entry.name
                info = fs.stat(path)
                # The move itself set this time; the time of the last write says when the block was stored.
                found.append((info.st_ctime_ns, info.st_size, path))
    freed = kept = 0
    for number, (_, size, path) in enumerate(sorted(found, reverse=True)):
        kept += size
        if number >= keep_files or kept > keep_bytes:
            with contextlib.suppress(OSError):
                fs.unlink(path)
                freed += size
    return freed
