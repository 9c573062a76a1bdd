"""The file tier on slow and odd file systems: late answers, stale handles, no links, no direct I/O, one case."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest

from kvatlas.connector.files.fs import O_DIRECT, StrPath
from kvatlas.connector.files.layout import block_path
from kvatlas.connector.outcome import Outcome
from tests.connector.conftest import WAIT, FaultyFileSystem, Fleet, block, fail, key, load, payload, store, target

ESTALE = errno.ESTALE


class Waiting:
    """A fault that lets calls wait until it is released, and says how many were there at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self._lock = threading.Lock()
        self._open = threading.Event()
        self.came = threading.Semaphore(0)

    def __call__(self, *_: object) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.came.release()
        assert self._open.wait(WAIT)
        with self._lock:
            self.inside -= 1

    def release(self) -> None:
        """Let everyone go on."""
        self._open.set()


def once(number: int) -> Callable[..., None]:
    """Return a fault that raises an error number the first time."""
    left = [1]

    def fault(*_: object) -> None:
        if left:
            left.clear()
            raise OSError(number, os.strerror(number))

    return fault


def test_latency_is_waited_for_by_all_threads_at_once(fleet: Fleet) -> None:
    """Where each read takes long, as many wait side by side as the tier has threads, and callers are not held up."""
    tier = fleet.tier(threads=4)
    store(tier, range(8))
    slow = Waiting()
    fleet.fs.faults["preadv"] = slow
    begin = time.monotonic()
    futures = [tier.load([target(number)[0]]) for number in range(8)]
    assert time.monotonic() - begin < WAIT
    for _ in range(4):
        assert slow.came.acquire(timeout=WAIT)
    assert not any(future.done() for future in futures)
    slow.release()
    assert not wait(futures, WAIT).not_done
    assert slow.most >= 4
    assert all(future.result()[key(number)].ok for number, future in enumerate(futures))


def test_slow_stores_never_hold_up_a_load(fleet: Fleet) -> None:
    """While every store waits for the disk, a load goes through."""
    tier = fleet.tier(threads=4, write_threads=2)
    store(tier, [1])
    slow = Waiting()
    fleet.fs.faults["pwritev"] = slow
    stores = tier.store([block(number) for number in range(10, 30)])
    for _ in range(2):
        assert slow.came.acquire(timeout=WAIT)
    assert load(tier, 1)[1] == payload(1)
    slow.release()
    assert all(result.ok for result in stores.result(WAIT).values())


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_stale_handle_is_a_failure_and_the_block_stays(fleet: Fleet, call: str) -> None:
    """ESTALE, as NFS says after its server started anew: the load fails by name, and the file serves again later."""
    tier = fleet.tier(distrust_seconds=30.0)
    store(tier, [1])
    fleet.fs.faults[call] = once(ESTALE)
    result, _ = load(tier, 1)
    assert result.outcome is Outcome.FAILED
    assert "ESTALE" in result.detail
    assert fleet.announced() == {key(1)}
    assert tier.lookup([key(1)]) == {key(1): False}
    fleet.monotonic += 31
    assert tier.lookup([key(1)]) == {key(1): True}
    assert load(tier, 1)[1] == payload(1)


@pytest.mark.parametrize("call", ["open", "pwritev", "replace", "mkdir"])
def test_a_stale_handle_while_storing_leaves_nothing_half(fleet: Fleet, call: str) -> None:
    """A store that meets ESTALE is a failure, announces nothing, and the same store works a moment later."""
    tier = fleet.tier()
    stale = once(ESTALE)
    # A file that is looked for and cannot be opened counts as not there: the store goes on.
    fleet.fs.faults[call] = lambda *args: stale() if call != "open" or args[1] & os.O_CREAT else None
    assert store(tier, [1])[key(1)].outcome is Outcome.FAILED
    assert fleet.announced() == set()
    assert store(tier, [1])[key(1)].outcome is Outcome.STORED
    assert load(tier, 1)[1] == payload(1)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS])
def test_without_hard_links_each_block_has_a_file(fleet: Fleet, number: int) -> None:
    """Where links are refused at the start (FAT, some FUSE and object mounts), blocks have files of their own."""
    fleet.fs.faults["link"] = fail(number)
    tier = fleet.tier(blocks_per_file=4)
    assert tier.blocks_per_file == 1
    store(tier, range(6))
    assert [load(tier, n)[1] for n in range(6)] == [payload(n) for n in range(6)]


def test_links_refused_later_cost_blocks_not_bytes(fleet: Fleet) -> None:
    """A file that may have no more names (EMLINK) leaves its other blocks unstored, and says so."""
    tier = fleet.tier(blocks_per_file=3)
    fleet.fs.faults["link"] = once(errno.EMLINK)
    results = store(tier, range(3))
    stored = {name for name, result in results.items() if result.ok}
    assert len(stored) < 3
    assert fleet.announced() == stored
    for number in range(3):
        result, data = load(tier, number)
        assert result.ok == (key(number) in stored)
        assert not result.ok or data == payload(number)


class NoDirect(FaultyFileSystem):
    """A file system that knows no direct I/O, in one of the ways there are."""

    way = "open"

    def open(self, path: StrPath, flags: int, mode: int = 0o644) -> int:
        if flags & O_DIRECT and self.way == "open":
            raise OSError(errno.EINVAL, "no direct I/O")
        return super().open(path, flags & ~O_DIRECT if self.way == "write" else flags, mode)

    def pwritev(self, fd: int, buffers: Any, offset: int) -> int:
        if self.way == "write" and len(buffers) == 1 and len(buffers[0]) == 4096:
            raise OSError(errno.EINVAL, "no direct I/O")
        return super().pwritev(fd, buffers, offset)


@pytest.mark.parametrize("way", ["open", "write"])
def test_without_direct_io_the_page_cache_serves(fleet: Fleet, way: str) -> None:
    """Refused at opening a file or only at writing: the probe finds it, and buffered calls do the work."""
    fleet.fs = NoDirect()
    fleet.fs.way = way
    tier = fleet.tier(direct=True)
    assert not tier.direct
    store(tier, [1, 2])
    assert load(tier, 2)[1] == payload(2)


class OneCase(FaultyFileSystem):
    """A case-insensitive file system: a name is its lower-case form."""

    def open(self, path: StrPath, flags: int, mode: int = 0o644) -> int:
        return super().open(self._fold(path), flags, mode)

    def stat(self, path: StrPath) -> os.stat_result:
        return super().stat(self._fold(path))

    def replace(self, source: StrPath, target: StrPath) -> None:
        super().replace(self._fold(source), self._fold(target))

    def link(self, source: StrPath, target: StrPath) -> None:
        super().link(self._fold(source), self._fold(target))

    def unlink(self, path: StrPath) -> None:
        super().unlink(self._fold(path))

    def mkdir(self, path: StrPath) -> None:
        super().mkdir(self._fold(path))

    def listdir(self, path: StrPath) -> Any:
        return super().listdir(self._fold(path))

    @staticmethod
    def _fold(path: StrPath) -> str:
        return str(path).lower()


def test_names_that_differ_in_case_alone_do_not_occur(fleet: Fleet) -> None:
    """Blocks' names are lower-case hexadecimal, so that a case-insensitive file system keeps every block apart."""
    assert all(block_path(bytes([number, 0xAB])) == block_path(bytes([number, 0xAB])).lower() for number in range(256))
    fleet.root = type(fleet.root)(str(fleet.root).lower())
    fleet.fs = OneCase()
    tier = fleet.tier(blocks_per_file=2)
    store(tier, range(8))
    assert [load(tier, number)[1] for number in range(8)] == [payload(number) for number in range(8)]
    fleet.tier()
    assert fleet.tier().known() == {key(number) for number in range(8)}
