"""Fixtures: a file tier on a fresh directory, and a file system that fails on request."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvatlas.connector.files import layout
from kvatlas.connector.files.blocks import BlockBuffers
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.fs import PosixFileSystem, Space, StrPath
from kvatlas.connector.files.holdings import Change
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.files.tier import FileTier
from kvatlas.connector.outcome import Result, Results

FINGERPRINT = Fingerprint(
    engine="test",
    engine_version="1",
    model="org/model",
    hash_algorithm="sha256",
    hash_seed="",
    dtype="bfloat16",
    block_size_tokens=(16,),
    layers=(("layer.0", "layer.1"),),
    block_bytes=8192,
)


@dataclass
class FaultyFileSystem(PosixFileSystem):
    """The real file system, with faults armed per call name.

    ``faults[name]`` is called with the call's arguments before the real call; it raises, or returns a value to
    answer in place of the real call, or None to let it through.
    """

    faults: dict[str, Callable[..., Any]] = field(default_factory=dict)
    total_bytes: int | None = None

    def _ask(self, name: str, *args: Any) -> Any:
        fault = self.faults.get(name)
        return fault(*args) if fault else None

    def open(self, path: StrPath, flags: int, mode: int = 0o644) -> int:
        found = self._ask("open", path, flags)
        return super().open(path, flags, mode) if found is None else found

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        found = self._ask("preadv", fd, buffers, offset)
        return super().preadv(fd, buffers, offset) if found is None else found

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        found = self._ask("pwritev", fd, buffers, offset)
        return super().pwritev(fd, buffers, offset) if found is None else found

    def replace(self, source: StrPath, target: StrPath) -> None:
        self._ask("replace", source, target)
        super().replace(source, target)

    def link(self, source: StrPath, target: StrPath) -> None:
        self._ask("link", source, target)
        super().link(source, target)

    def mkdir(self, path: StrPath) -> None:
        self._ask("mkdir", path)
        super().mkdir(path)

    def unlink(self, path: StrPath) -> None:
        self._ask("unlink", path)
        super().unlink(path)

    def fsync(self, fd: int) -> None:
        self._ask("fsync", fd)
        super().fsync(fd)

    def space(self, path: StrPath) -> Space:
        return Space(self.total_bytes, self.total_bytes) if self.total_bytes else super().space(path)


def fail(number: int) -> Callable[..., None]:
    """Return a fault that always raises this error number."""

    def fault(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fault


def believed(changes: Iterable[Change]) -> set[bytes]:
    """Return the blocks that a listener of these changes believes to be there."""
    held: set[bytes] = set()
    for change in list(changes):
        (held.difference_update if change.removed else held.update)(change.keys)
    return held


class Fleet:
    """Makes tiers on one root and remembers what they announced; closes them all at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fs = FaultyFileSystem()
        self.now_ns = 1_700_000_000_000_000_000
        self.monotonic = 0.0
        self.changes: list[Change] = []
        self._tiers: list[FileTier] = []

    def tier(self, *, fingerprint: Fingerprint = FINGERPRINT, scan: bool = True, **settings: Any) -> FileTier:
        settings.setdefault("budget", DiskBudget(max_percent=None))
        settings.setdefault("threads", 3)
        made = FileTier(
            FileTierSettings(root=self.root, **settings),
            fingerprint,
            fs=self.fs,
            clock_ns=lambda: self.now_ns,
            monotonic=lambda: self.monotonic,
            listener=self.changes.append,
        )
        self._tiers.append(made)
        if scan:
            assert made.scanned.wait(60)
        return made

    def announced(self) -> set[bytes]:
        """Blocks that a listener believes to be there."""
        return believed(self.changes)

    def close(self) -> None:
        self.fs.faults.clear()
        for tier in self._tiers:
            tier.close()


@pytest.fixture
def fleet(tmp_path: StrPath) -> Iterator[Fleet]:
    """Tiers on one fresh root."""
    made = Fleet(tmp_path / "root")
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvatlas-io")]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Fleet]:
    """Tiers whose root is on a file system of its own, 4 MiB in memory, mounted at the root's parent."""
    root = tmp_path / "disk"
    root.mkdir()
    try:
        mount(root, "size=4m", "-t", "tmpfs", "tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {error}")
    made = Fleet(root / "root")
    yield made
    made.close()
    subprocess.run(["umount", "--lazy", root], check=True)


def mount(root: Path, options: str, *what: str) -> None:
    """Mount, or with ``remount`` among the options change a mount."""
    subprocess.run(["mount", "-o", options, *what, root], check=True, capture_output=True)


def key(number: int, group: int = 0) -> bytes:
    """Return a block key as vLLM builds them: 32 bytes of hash and 4 of group."""
    return random.Random(number).randbytes(32) + group.to_bytes(4, "big")


def payload(number: int, size: int = 8192, version: int = 0) -> bytes:
    """Return the bytes of a block, different for every number and version."""
    return random.Random(f"{number}.{version}").randbytes(size)


def block(number: int, size: int = 8192, version: int = 0) -> BlockBuffers:
    """Return a block to store."""
    return BlockBuffers(key(number), [memoryview(payload(number, size, version))])


def target(number: int, size: int = 8192) -> tuple[BlockBuffers, bytearray]:
    """Return a block to load and the memory it goes to."""
    memory = bytearray(b"\xaa" * size)
    return BlockBuffers(key(number), [memoryview(memory)]), memory


def aligned_target(number: int, size: int = 8192) -> tuple[BlockBuffers, memoryview]:
    """Return a block to load and the page-aligned memory it goes to, as an engine's host memory is."""
    memory = memoryview(mmap.mmap(-1, size))
    return BlockBuffers(key(number), [memory]), memory


def store(tier: FileTier, numbers: Iterable[int], **kwargs: int) -> Results:
    """Store blocks by number and wait."""
    return tier.store([block(number, **kwargs) for number in numbers]).result(WAIT)


def load(tier: FileTier, number: int, size: int = 8192) -> tuple[Result, bytes]:
    """Load one block and return its result and what is in its memory."""
    wanted, memory = target(number, size)
    return tier.load([wanted]).result(WAIT)[wanted.key], bytes(memory)


def file_of(tier: FileTier, number: int) -> Path:
    """Return the name of a block's file."""
    return tier.directory / layout.block_path(key(number))


#: Seconds after which a future that has not ended counts as hanging.
WAIT = 60
ENOSPC, EIO, EROFS = errno.ENOSPC, errno.EIO, errno.EROFS
