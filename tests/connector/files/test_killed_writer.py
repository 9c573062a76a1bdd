"""A process killed while writing leaves whole blocks or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.connector.conftest import Fleet, key, payload, target

WRITER = """
import itertools, sys
from pathlib import Path
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.settings import FileTierSettings
from kvatlas.connector.files.tier import FileTier
from tests.connector.conftest import FINGERPRINT, block
tier = FileTier(
    FileTierSettings(root=Path(sys.argv[1]), blocks_per_file=4, threads=4, budget=DiskBudget(max_bytes=4_000_000)),
    FINGERPRINT,
)
tier.scanned.wait()
for first in itertools.count(0, 4):
    numbers = [(first + n) % 800 for n in range(4)]
    results = tier.store([block(n) for n in numbers]).result()
    print(*(n for n in numbers if results[block(n).key].ok), flush=True)
"""


@pytest.mark.parametrize("after_seconds", [0.05, 0.3])
def test_kill_while_writing(fleet: Fleet, tmp_path: Path, after_seconds: float) -> None:
    """After kill -9 every block found is byte-equal, and what is found includes nothing half written."""
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(fleet.root)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip()
    time.sleep(after_seconds)
    child.send_signal(signal.SIGKILL)
    reported = {int(word) for line in child.stdout for word in line.split() if line.endswith("\n")}
    child.wait(60)
    child.stdout.close()
    tier = fleet.tier(blocks_per_file=4)
    loaded = 0
    for number in range(800):
        promised = tier.lookup([key(number)])[key(number)]
        wanted, memory = target(number)
        result = tier.load([wanted]).result(60)[wanted.key]
        assert result.ok == promised
        if result.ok:
            assert bytes(memory) == payload(number)
            loaded += 1
    assert loaded >= min(len(reported), 100)
    assert tier.metrics.counts.get("corrupt", 0) == 0
