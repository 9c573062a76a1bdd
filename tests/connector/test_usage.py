"""The sidecar of last use: golden record, damage, restart, and a clock that goes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.connector import usage
from kvatlas.connector.usage import UsageLog, usage_key
from tests.connector.conftest import ENOSPC, FaultyFileSystem, fail

_USES = st.lists(st.tuples(st.integers(0, 5).map(lambda n: usage_key(b"%d" % n)), st.integers(0, 2**63)), max_size=20)


def latest(uses: list[tuple[bytes, int]]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for key, moment in uses:
        found[key] = max(moment, found.get(key, moment))
    return found


def test_golden_record() -> None:
    """A record's bytes are fixed: 16 of key, 8 of time, 8 of checksum."""
    assert usage.encode([(usage_key(b"k"), 5)]).hex() == (
        "04c37d9993e28be6a921e3704fda881d" "0500000000000000" "2af7b078b38e364e"
    )  # fmt: skip


@given(uses=_USES)
def test_the_latest_use_comes_back(uses: list[tuple[bytes, int]]) -> None:
    """Of several uses of a block the latest counts, whatever their order in the file."""
    assert usage.decode(usage.encode(uses)) == latest(uses)


@given(uses=_USES, at=st.integers(0), bit=st.integers(0, 7), cut=st.integers(0, 31))
def test_damage_costs_one_record(uses: list[tuple[bytes, int]], at: int, bit: int, cut: int) -> None:
    """A flipped bit loses its own record, a torn end the last one, and nothing else."""
    data = bytearray(usage.encode(uses))
    kept = list(uses)
    if data:
        data[at % len(data)] ^= 1 << bit
        del kept[at % len(data) // 32]
    assert usage.decode(bytes(data)) == latest(kept)
    torn = usage.encode([*uses, (usage_key(b"torn"), 1)])
    assert usage.decode(torn[: len(torn) - 32 + cut]) == latest(uses)


@given(moments=st.lists(st.integers(0, 10**18), min_size=1, max_size=50))
def test_time_never_goes_back(moments: list[int]) -> None:
    """Whatever the clock says, each use is later than the one before."""
    log = UsageLog(FaultyFileSystem(), Path("nowhere"), "w")
    ticks = [log.tick(moment) for moment in moments]
    assert ticks == sorted(set(ticks))
    log.seen(10**19 - 10**18)
    assert log.tick(0) > 10**19 - 10**18


def test_several_writers_are_merged(tmp_path: Path) -> None:
    """Each writer has a file of its own, and a reader takes the latest of all."""
    fs = FaultyFileSystem()
    first, second = UsageLog(fs, tmp_path, "a"), UsageLog(fs, tmp_path, "b")
    first.touch([b"x", b"y"], 10)
    second.touch([b"x"], 20)
    assert first.flush()
    assert second.flush()
    (tmp_path / "note.txt").write_bytes(usage.encode([(usage_key(b"x"), 99)]))
    assert usage.read_usage(fs, tmp_path) == {usage_key(b"x"): 20, usage_key(b"y"): 10}
    assert usage.read_usage(fs, tmp_path / "missing") == {}


def test_a_refused_flush_is_made_up_for(tmp_path: Path) -> None:
    """Uses that the disk refused are written with the next flush, without overwriting newer ones."""
    fs = FaultyFileSystem()
    log = UsageLog(fs, tmp_path, "a")
    log.touch([b"x", b"y"], 1)
    log.touch([b"y"], 2)
    fs.faults["pwritev"] = fail(ENOSPC)
    assert not log.flush()
    log.touch([b"x"], 3)
    fs.faults.clear()
    assert log.flush()
    assert usage.read_usage(fs, tmp_path) == {usage_key(b"x"): 3, usage_key(b"y"): 2}


def test_a_flush_is_due_by_number_or_by_time_and_asked_for_once(tmp_path: Path) -> None:
    """Many uses or a long time make a flush due; until it happened it is not asked for again."""
    now = [100.0]
    log = UsageLog(FaultyFileSystem(), tmp_path, "a", flush_records=3, flush_seconds=10.0, monotonic=lambda: now[0])
    assert not log.touch([], 1)
    assert log.touch([b"0"], 1)
    assert not log.touch([b"1", b"2", b"3"], 2)
    assert log.flush()
    now[0] += 9
    assert not log.touch([b"4", b"5"], 3)
    assert log.touch([b"6"], 4)
    assert log.flush()
    assert not log.touch([b"7"], 5)
    now[0] += 10
    assert log.touch([b"8"], 6)


@pytest.mark.parametrize("torn", [1, 31, 33])
def test_a_torn_record_does_not_shift_those_after_it(tmp_path: Path, torn: int) -> None:
    """A record cut off by a crash leaves later appends readable."""
    fs = FaultyFileSystem()
    (tmp_path / "a.use").write_bytes(usage.encode([(usage_key(b"old"), 7), (usage_key(b"cut"), 8)])[: 32 + torn % 32])
    log = UsageLog(fs, tmp_path, "a")
    log.touch([b"new"], 9)
    assert log.flush()
    assert usage.read_usage(fs, tmp_path) == {usage_key(b"old"): 7, usage_key(b"new"): 9}
