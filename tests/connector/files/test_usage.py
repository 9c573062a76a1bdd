"""The sidecar of last use: golden record, damage, restart, and a clock that goes back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.connector.files import layout, usage
from kvatlas.connector.files.usage import UsageLog, usage_key
from kvatlas.connector.outcome import Outcome
from tests.connector.conftest import ENOSPC, WAIT, FaultyFileSystem, Fleet, block, fail, key, load, store

_USES = st.lists(st.tuples(st.integers(0, 5).map(lambda n: usage_key(b"%d" % n)), st.integers(0, 2**63)), max_size=20)


def latest(uses: list[tuple[bytes, int]]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for name, moment in uses:
        found[name] = max(moment, found.get(name, moment))
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


HOUR_NS = 3_600_000_000_000


def age(path: Path, now_ns: int) -> None:
    """Make a file look untouched for two hours."""
    os.utime(path, ns=(now_ns - 2 * HOUR_NS, now_ns - 2 * HOUR_NS))


def test_files_of_silent_writers_become_one(tmp_path: Path) -> None:
    """A merge leaves one file for all silent ones, drops blocks that are gone, and lets running writers' files be."""
    fs, now = FaultyFileSystem(), time.time_ns()
    for number in range(5):
        log = UsageLog(fs, tmp_path, f"dead{number}")
        log.touch([b"x", b"gone", b"%d" % number], 10 + number)
        assert log.flush()
        age(tmp_path / f"dead{number}.use", now)
    (tmp_path / "dead.use.tmp").write_bytes(b"half")
    age(tmp_path / "dead.use.tmp", now)
    alive = UsageLog(fs, tmp_path, "alive")
    alive.touch([b"y"], 50)
    assert alive.flush()
    known = [b"x", b"y", *(b"%d" % number for number in range(5))]
    assert usage.merge(fs, tmp_path, "new", silent_since_ns=now - HOUR_NS, known=lambda: known) == 5
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "alive.use").stat().st_size == 32
    expected = {b"x": 14, b"y": 50, **{b"%d" % number: 10 + number for number in range(5)}}
    assert usage.read_usage(fs, tmp_path) == {usage_key(name): moment for name, moment in expected.items()}
    assert usage.merge(fs, tmp_path, "new", silent_since_ns=now - HOUR_NS, known=lambda: known) == 0


def test_a_merge_overtaken_by_another_or_refused_loses_nothing(tmp_path: Path) -> None:
    """A file that another merge takes first is left to it, and a full disk leaves every record readable."""
    fs, now = FaultyFileSystem(), time.time_ns()
    names = [b"a", b"b", b"c"]
    for number, name in enumerate(names):
        log = UsageLog(fs, tmp_path, name.decode())
        log.touch([name], number)
        assert log.flush()
        age(tmp_path / f"{name.decode()}.use", now)
    everything = {usage_key(name): number for number, name in enumerate(names)}

    def overtake(source: object, _: object) -> None:
        if Path(str(source)).name == "b.use":
            Path(str(source)).rename(tmp_path / "other-taken-0.use")

    fs.faults = {"replace": overtake, "pwritev": fail(ENOSPC)}
    with pytest.raises(OSError, match="No space"):
        usage.merge(fs, tmp_path, "m", silent_since_ns=now - HOUR_NS, known=lambda: names)
    assert usage.read_usage(fs, tmp_path) == everything
    assert not list(tmp_path.glob("*.tmp"))
    del fs.faults["pwritev"]
    assert usage.merge(fs, tmp_path, "m", silent_since_ns=now - HOUR_NS, known=lambda: names) == 3
    assert usage.read_usage(fs, tmp_path) == everything
    assert len(list(tmp_path.iterdir())) == 1


def test_a_writer_whose_file_is_taken_while_it_appends_writes_again(tmp_path: Path) -> None:
    """A writer that was only silent loses no record to a merge that runs at the same moment."""
    fs = FaultyFileSystem()
    log = UsageLog(fs, tmp_path, "slow")
    log.touch([b"old"], 1)
    assert log.flush()

    def merged_now(*_: object) -> None:
        fs.faults.clear()
        (tmp_path / "slow.use").unlink()

    log.touch([b"x"], 7)
    fs.faults["pwritev"] = merged_now
    assert log.flush()
    assert usage.read_usage(fs, tmp_path) == {usage_key(b"x"): 7}


def test_a_writers_own_file_stays_small(tmp_path: Path) -> None:
    """A file that grew is rewritten with a record per block that is there, and what is refused is made up for."""
    fs = FaultyFileSystem()
    log = UsageLog(fs, tmp_path, "a", rewrite_bytes=320, known=lambda: [b"0", b"1", b"2"])
    path = tmp_path / "a.use"
    for moment in range(1, 200):
        log.touch([b"%d" % (moment % 5)], moment)
        if moment == 50:
            fs.faults["replace"] = fail(ENOSPC)
        if moment == 80:
            fs.faults.clear()
        assert log.flush()
        assert path.stat().st_size <= 2048
    assert path.stat().st_size <= 640
    found = usage.read_usage(fs, tmp_path)
    assert {name: found[usage_key(name)] for name in (b"0", b"1", b"2")} == {b"0": 195, b"1": 196, b"2": 197}


def test_a_disk_that_refuses_for_ever_costs_neither_memory_nor_a_call_per_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a refusal flushes are due by time alone, and only the latest uses are kept."""
    monkeypatch.setattr(usage, "_KEPT_RECORDS", 10)
    fs, now = FaultyFileSystem(), [100.0]
    log = UsageLog(fs, tmp_path, "a", flush_records=3, flush_seconds=10.0, monotonic=lambda: now[0])
    fs.faults["open"] = fail(ENOSPC)
    asked = 0
    for moment in range(1000):
        now[0] += 0.1
        if log.touch([b"%d" % moment], moment):
            asked += 1
            assert not log.flush()
    assert 5 <= asked <= 12
    fs.faults.clear()
    assert log.flush()
    found = usage.read_usage(fs, tmp_path)
    assert len(found) <= 10 + 100
    assert found[usage_key(b"999")] == 999
    assert usage_key(b"500") not in found


def test_many_restarts_leave_few_usage_files(fleet: Fleet) -> None:
    """Each start merges what dead engines left, and the order of use outlives it."""
    fleet.now_ns = time.time_ns()
    for number in range(6):
        tier = fleet.tier()
        store(tier, [number])
        assert load(tier, 0)[0].ok
        tier.close(drain=True)
        for path in (tier.directory / layout.USAGE).iterdir():
            age(path, fleet.now_ns)
        fleet.now_ns += 1_000_000_000
    last = fleet.tier()
    assert len(list((last.directory / layout.USAGE).iterdir())) == 1
    found = usage.read_usage(fleet.fs, last.directory / layout.USAGE)
    assert set(found) == {usage_key(key(number)) for number in range(6)}
    assert found[usage_key(key(0))] == max(found.values())
    assert last.store([block(0)]).result(WAIT)[key(0)].outcome is Outcome.EXISTS
