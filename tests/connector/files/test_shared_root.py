"""Several engines on one store: processes that load each other's blocks under an evictor, and shares of a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.evictor import evict_root
from kvatlas.connector.files.fs import PosixFileSystem, Space, StrPath
from kvatlas.connector.files.layout import Fingerprint
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.files.tier import FileTier
from kvatlas.connector.outcome import Outcome
from tests.connector.conftest import FINGERPRINT, WAIT, block, payload, target

#: Stores its half of the blocks and loads any, until it is told to end; says what became of the loads.
ENGINE = """
import json, random, sys, threading
from collections import Counter
from pathlib import Path
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.files.tier import FileTier
from tests.connector.conftest import FINGERPRINT, block, key, payload, target
half = int(sys.argv[2])
held, ends, loads = set(), threading.Event(), Counter()
def hear(change):
    (held.difference_update if change.removed else held.update)(change.keys)
tier = FileTier(FileTierSettings(root=Path(sys.argv[1]), blocks_per_file=int(sys.argv[3]), threads=2,
    budget=DiskBudget(max_percent=None)), FINGERPRINT, listener=hear)
threading.Thread(target=lambda: (sys.stdin.read(), ends.set()), daemon=True).start()
chosen = random.Random(half)
while not ends.is_set():
    first = chosen.randrange(100) * 2
    tier.store([block(2 * n + half) for n in range(first // 2, first // 2 + 3)]).result()
    for number in chosen.sample(range(200), 6):
        wanted, memory = target(number)
        result = tier.load([wanted]).result()[wanted.key]
        right = bytes(memory) == payload(number)
        loads[f"{'other' if number % 2 != half else 'own'} {result.outcome.value} {right if result.ok else ''}"] += 1
    if sum(loads.values()) % 60 == 0:
        print(json.dumps(loads), flush=True)
tier.drain()
for number in range(206):  # what is gone is told as it is asked for
    tier.load([target(number)[0]]).result()
on_disk = {key(n) for n in range(206) if tier.lookup([key(n)])[key(n)]}
tier.close()
print(json.dumps({**loads, "ghosts": len(held - on_disk)}), flush=True)
"""


class Process:
    """An engine in a process of its own."""

    def __init__(self, root: Path, half: int, per_file: int) -> None:
        project = Path(__file__).parents[3]
        self._child = subprocess.Popen(
            [sys.executable, "-c", ENGINE, str(root), str(half), str(per_file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=project,
            env={**os.environ, "PYTHONPATH": str(project)},
        )  # fmt: skip
        self.lines: list[dict[str, int]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.lines.append(json.loads(line))

    def seen(self, what: str) -> int:
        """Return a count as the process told it last."""
        return self.lines[-1].get(what, 0) if self.lines else 0

    def alive(self) -> bool:
        """Whether it runs."""
        return self._child.poll() is None

    def end(self) -> dict[str, int]:
        """Let it end, and return what it counted."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        assert self._child.wait(WAIT) == 0
        self._reader.join(WAIT)
        return self.lines[-1]

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self._child.kill()
        self._child.wait(WAIT)


@pytest.mark.parametrize("per_file", [1, 3])
def test_two_processes_and_the_evictor_on_one_root(tmp_path: Path, per_file: int) -> None:
    """Each process loads what the other stored; what the evictor takes under them is a miss, never wrong bytes."""
    root = tmp_path / "root"
    engines = [Process(root, half, per_file) for half in (0, 1)]
    evicted = passes = 0
    enough = 30
    budget = DiskBudget(max_bytes=60 * 12_288, max_percent=None, high_watermark=0.9, low_watermark=0.6)
    try:
        wanted = ("other loaded True", "other miss ")
        while evicted < 200 or any(engine.seen(what) < enough for engine in engines for what in wanted):
            assert all(engine.alive() for engine in engines), "an engine ended by itself"
            if root.is_dir():
                report = evict_root(root, budget)
                assert report.failed == 0
                evicted += report.evicted_blocks
                passes += 1
        counted = [engine.end() for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
    assert passes > 1
    for counts in counted:
        assert counts.pop("ghosts") == 0
        assert set(counts) <= {"own loaded True", "own miss ", "other loaded True", "other miss "}


class SmallDisk(PosixFileSystem):
    """A file system with a size of its own that several engines fill: writes beyond it are ENOSPC."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._lock = threading.Lock()
        self.used = self.refused = 0

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write while there is room."""
        with self._lock:
            size = sum(map(len, buffers))
            if self.used + size > self._total:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.used += size
            return super().pwritev(fd, buffers, offset)

    def unlink(self, path: StrPath) -> None:
        """Remove a file and give its bytes back."""
        with self._lock:
            size = Path(path).stat().st_size
            super().unlink(path)
            self.used -= size

    def space(self, path: StrPath) -> Space:
        """Return the size and what is free of it."""
        return Space(self._total, self._total - self.used)


def test_engines_whose_budgets_exceed_the_disk_share_it(tmp_path: Path) -> None:
    """Four engines may take the whole disk each, one filled it first: no storm of ENOSPC, and shares become even."""
    now, size, chosen = [0.0], 400 * 12_288, random.Random(1)
    disk = SmallDisk(size)

    def engine(rank: int) -> FileTier:
        fingerprint = Fingerprint(**{**FINGERPRINT.__dict__, "rank": str(rank)})
        settings = FileTierSettings(root=tmp_path, threads=1, checksum_threads=0, budget=DiskBudget(max_percent=100.0))
        return FileTier(settings, fingerprint, fs=disk, monotonic=lambda: now[0])

    outcomes: Counter[Outcome] = Counter()
    with contextlib.ExitStack() as held:
        tiers = [held.enter_context(engine(rank)) for rank in range(4)]

        def fill(tier: FileTier, numbers: range) -> None:
            results = tier.store([block(number) for number in numbers]).result(WAIT)
            outcomes.update(result.outcome for result in results.values())
            assert tier.drain(WAIT)

        for step in range(50):
            fill(tiers[0], range(step * 10, step * 10 + 10))
            now[0] += 1.0
        assert tiers[0].used_bytes > 0.8 * size
        outcomes.clear()
        disk.refused = 0
        for step in range(400):
            for tier in chosen.sample(tiers, len(tiers)):
                fill(tier, range(1000 + step * 2, 1002 + step * 2))
            now[0] += 0.25
        shares = [tier.used_bytes for tier in tiers]
        assert sum(shares) > 0.8 * size
        assert max(shares) < 1.5 * min(shares)
        assert outcomes[Outcome.STORED] > 400
        assert disk.refused < 0.02 * outcomes.total()
        latest = range(1780, 1800)
        for tier in tiers:
            for number in latest:
                wanted, memory = target(number)
                result = tier.load([wanted]).result(WAIT)[wanted.key]
                assert result.ok == (wanted.key in tier.known())
                assert not result.ok or bytes(memory) == payload(number)
