"""The file system as the connector uses it: the seam where tests inject faults.

Nothing here relies on access times or on locks, so tmpfs, ext4, overlay and NFS behave alike. Every call may raise
``OSError``; callers translate it into an outcome.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from kvatlas.connector.files.layout import ALIGNMENT

#: Buffers that one call takes on Linux; more are an error there, not a short transfer.
IOV_MAX: Final = 1024
O_DIRECT: Final = getattr(os, "O_DIRECT", 0)

Buffer = memoryview
#: Names of blocks' files are plain text: making and joining paths costs more than the calls they are for.
StrPath = str | Path


class Space(NamedTuple):
    """Size of a file system in bytes."""

    total: int
    free: int


class Entry(NamedTuple):
    """One name found while listing a directory."""

    name: str
    is_dir: bool


class FileSystem(Protocol):
    """Calls the file tier makes; sizes and offsets are bytes."""

    def open(self, path: StrPath, flags: int, mode: int = 0o644) -> int:
        """Open a file and return its descriptor."""

    def close(self, fd: int) -> None:
        """Close a descriptor."""

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Read into ``buffers`` and return how many bytes arrived."""

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write ``buffers`` and return how many bytes were taken."""

    def fsync(self, fd: int) -> None:
        """Bring a file's data to the medium."""

    def fstat(self, fd: int) -> os.stat_result:
        """Return what an open file is."""

    def stat(self, path: StrPath) -> os.stat_result:
        """Return what a name stands for."""

    def replace(self, source: StrPath, target: StrPath) -> None:
        """Give ``source`` the name ``target``, atomically."""

    def link(self, source: StrPath, target: StrPath) -> None:
        """Give a file a second name."""

    def unlink(self, path: StrPath) -> None:
        """Remove a name."""

    def mkdir(self, path: StrPath) -> None:
        """Create a directory and its parents; an existing one is fine."""

    def listdir(self, path: StrPath) -> Iterator[Entry]:
        """Yield the names in a directory; a missing directory has none."""

    def space(self, path: StrPath) -> Space:
        """Return the size of the file system that holds ``path``."""


class PosixFileSystem:
    """The operating system's own calls."""

    def open(self, path: StrPath, flags: int, mode: int = 0o644) -> int:  # noqa: D102
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:  # noqa: D102
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:  # noqa: D102
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:  # noqa: D102
        return os.pwritev(fd, buffers, offset)

    def fsync(self, fd: int) -> None:  # noqa: D102
        os.fsync(fd)

    def fstat(self, fd: int) -> os.stat_result:  # noqa: D102
        return os.fstat(fd)

    def stat(self, path: StrPath) -> os.stat_result:  # noqa: D102
        return os.lstat(path)

    def replace(self, source: StrPath, target: StrPath) -> None:  # noqa: D102
        os.replace(source, target)  # noqa: PTH105 - see StrPath

    def link(self, source: StrPath, target: StrPath) -> None:  # noqa: D102
        os.link(source, target)

    def unlink(self, path: StrPath) -> None:  # noqa: D102
        os.unlink(path)  # noqa: PTH108 - see StrPath

    def mkdir(self, path: StrPath) -> None:  # noqa: D102
        Path(path).mkdir(parents=True, exist_ok=True)

    def listdir(self, path: StrPath) -> Iterator[Entry]:  # noqa: D102
        try:
            with os.scandir(path) as names:
                yield from (Entry(item.name, item.is_dir(follow_symlinks=False)) for item in names)
        except (FileNotFoundError, NotADirectoryError):
            return

    def space(self, path: StrPath) -> Space:  # noqa: D102
        found = os.statvfs(path)
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def read_full(fs: FileSystem, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Read until ``buffers`` are full or the file ends; returns the bytes read.

    A read that stops early is asked again from where it stopped, so a short read is never taken for data.
    """
    done = 0
    rest = list(buffers)
    wanted = sum(len(part) for part in rest)
    while done < wanted:
        got = fs.preadv(fd, rest[:IOV_MAX], offset + done)
        if got <= 0:
            break
        done += got
        rest = _advance(rest, got)
    return done


def write_full(fs: FileSystem, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all of ``buffers``.

    Raises:
        OSError: the system refused, or took nothing (a full disk without an error).
    """
    done = 0
    rest = list(buffers)
    while rest:
        taken = fs.pwritev(fd, rest[:IOV_MAX], offset + done)
        if taken <= 0:
            raise OSError(5, "write made no progress")
        done += taken
        rest = _advance(rest, taken)


def _advance(buffers: list[Buffer], count: int) -> list[Buffer]:
    for number, part in enumerate(buffers):
        if count < len(part):
            return [part[count:], *buffers[number + 1 :]]
        count -= len(part)
    return []


def probe_direct(fs: FileSystem, directory: Path, token: str) -> bool:
    """Return whether ``directory`` takes direct I/O, tried with a real write and read of one page.

    Args:
        fs: the file system.
        directory: where the probe file is made and removed.
        token: makes the probe's name unique among engines that share the directory.
    """
    if not O_DIRECT:
        return False
    path = directory / f"probe-{token}.tmp"
    page = memoryview(mmap.mmap(-1, ALIGNMENT))
    try:
        fd = fs.open(path, os.O_CREAT | os.O_RDWR | O_DIRECT)
    except OSError:
        return False
    try:
        return fs.pwritev(fd, [page], 0) == ALIGNMENT and fs.preadv(fd, [page], 0) == ALIGNMENT
    except OSError:
        return False
    finally:
        fs.close(fd)
        with contextlib.suppress(OSError):
            fs.unlink(path)


def probe_links(fs: FileSystem, directory: Path, token: str) -> bool:
    """Return whether ``directory`` lets one file have several names."""
    first, second = directory / f"probe-{token}-a.tmp", directory / f"probe-{token}-b.tmp"
    try:
        fs.close(fs.open(first, os.O_CREAT | os.O_WRONLY))
        fs.link(first, second)
    except OSError:
        return False
    else:
        return True
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                fs.unlink(path)
