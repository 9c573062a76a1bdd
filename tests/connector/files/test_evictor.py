"""The standalone evictor on a root that engines use."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.evictor import evict_root
from kvatlas.connector.outcome import Outcome
from kvatlas.deploy.commands import evictor as command
from tests.connector.conftest import FINGERPRINT, Fleet, block, key, payload, target

ONE = 12_288


def filled(fleet: Fleet, count: int):
    tier = fleet.tier()
    for number in range(count):
        fleet.now_ns += 1_000_000
        assert tier.store([block(number)]).result(10)[key(number)].ok
    tier._usage.flush()
    return tier


def test_the_longest_unused_go_over_all_fingerprints(fleet: Fleet) -> None:
    """One pass brings the root below its low watermark and a running engine notices as misses."""
    tier = filled(fleet, 8)
    other = fleet.tier(fingerprint=type(FINGERPRINT)(**{**FINGERPRINT.__dict__, "model": "second"}))
    fleet.now_ns += 1_000_000_000_000_000_000
    other.store([block(50)]).result(10)
    other._usage.flush()
    report = evict_root(fleet.root, DiskBudget(max_bytes=6 * ONE, low_watermark=0.67), clock_ns=lambda: fleet.now_ns)
    assert len(report.directories) == 2
    assert report.evicted_blocks == 5
    assert [n for n in range(8) if tier.lookup([key(n)])[key(n)]] == [5, 6, 7]
    assert other.lookup([key(50)]) == {key(50): True}
    wanted, _ = target(0)
    assert tier.load([wanted]).result(10)[key(0)].outcome is Outcome.MISS
    assert key(0) not in fleet.announced()


def test_a_dry_run_removes_nothing(fleet: Fleet) -> None:
    """A dry run reports the same and leaves every block."""
    tier = filled(fleet, 6)
    report = evict_root(fleet.root, DiskBudget(max_bytes=3 * ONE), dry_run=True, clock_ns=lambda: fleet.now_ns)
    assert report.evicted_blocks >= 3
    assert all(tier.lookup([key(n) for n in range(6)]).values())


def test_a_block_stored_again_meanwhile_is_left(fleet: Fleet) -> None:
    """A name that leads to a newer file than the one judged is not taken away."""
    tier = filled(fleet, 3)

    def progress(_: str) -> None:
        path = Path(tier._segments.path(key(0)))
        data = path.read_bytes()
        spare = path.with_suffix(".new")
        spare.write_bytes(data)
        spare.replace(path)

    evict_root(fleet.root, DiskBudget(max_bytes=ONE), clock_ns=lambda: fleet.now_ns, progress=progress)
    wanted, memory = target(0)
    assert tier.load([wanted]).result(10)[key(0)].ok
    assert bytes(memory) == payload(0)


def test_a_root_that_is_not_there_is_an_error(fleet: Fleet) -> None:
    """A missing root is named in the error."""
    with pytest.raises(LayoutError, match="nowhere"):
        evict_root(fleet.root / "nowhere", DiskBudget())


def test_the_command_reports_and_obeys(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """The command evicts to its budget and prints one line."""
    tier = filled(fleet, 6)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(fleet.root), "--max-bytes", "50k", "--progress"])) == 0
    assert "evicted" in capsys.readouterr().out
    assert sum(tier.lookup([key(n) for n in range(6)]).values()) <= 4


def test_a_root_that_is_away_does_not_end_the_service(fleet: Fleet) -> None:
    """With an interval a root that cannot be read is said, and evicted from once it is back."""
    child = subprocess.Popen(
        [sys.executable, "-m", "kvatlas.deploy", "evictor", str(fleet.root), "--max-bytes", "50k", "--interval", "0.1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stderr is not None
        assert "cannot be read" in child.stderr.readline()
        tier = filled(fleet, 6)
        while "evicted 0 blocks" in (line := child.stdout.readline()):
            assert child.poll() is None
        assert "failures" in line
        assert len(list(tier.directory.rglob("*.kv"))) <= 4
    finally:
        child.kill()
        child.communicate()


def test_a_single_run_over_a_missing_root_fails(fleet: Fleet) -> None:
    """Without an interval a root that cannot be read is the command's error."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(LayoutError, match="cannot be read"):
        command.run(parser.parse_args([str(fleet.root)]))
