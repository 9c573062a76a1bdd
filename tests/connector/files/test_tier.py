"""The file tier: round trips, segments, capacity, restart."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout
from kvatlas.connector.files.blocks import BlockBuffers
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.outcome import Outcome
from tests.connector.conftest import (
    EIO,
    FINGERPRINT,
    WAIT,
    Fleet,
    aligned_target,
    block,
    fail,
    file_of,
    key,
    load,
    payload,
    store,
    target,
)


@pytest.mark.parametrize("size", [1, 4095, 4096, 8192, 100_000])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("per_file", [1, 3])
def test_what_was_stored_comes_back(fleet: Fleet, size: int, direct: bool, per_file: int) -> None:
    """Blocks of any size come back byte for byte, one or several per file, direct or buffered."""
    tier = fleet.tier(direct=direct, blocks_per_file=per_file)
    assert {r.outcome for r in store(tier, range(5), size=size).values()} == {Outcome.STORED}
    for number in range(5):
        result, data = load(tier, number, size)
        assert result.outcome is Outcome.LOADED
        assert data == payload(number, size)
    assert fleet.announced() == {key(number) for number in range(5)}


def test_a_block_may_lie_in_several_buffers(fleet: Fleet) -> None:
    """Parts are written and filled in order, without being joined by the caller."""
    tier = fleet.tier()
    data = payload(1, 10_000)
    parts = [memoryview(data[:3]), memoryview(data[3:5000]), memoryview(data[5000:])]
    assert tier.store([BlockBuffers(key(1), parts)]).result(WAIT)[key(1)].ok
    out = [bytearray(7000), bytearray(3000)]
    assert tier.load([BlockBuffers(key(1), [memoryview(part) for part in out])]).result(WAIT)[key(1)].ok
    assert b"".join(out) == data


def test_storing_again_says_that_it_exists(fleet: Fleet) -> None:
    """A second store of a block writes nothing and says so."""
    tier = fleet.tier()
    store(tier, [1])
    before = file_of(tier, 1).stat().st_ino
    assert store(tier, [1])[key(1)].outcome is Outcome.EXISTS
    assert file_of(tier, 1).stat().st_ino == before


def test_an_unknown_block_is_a_miss(fleet: Fleet) -> None:
    """Loading what was never stored is a miss and leaves the destination alone."""
    tier = fleet.tier()
    result, data = load(tier, 9)
    assert result.outcome is Outcome.MISS
    assert data == b"\xaa" * 8192


def test_asking_for_another_size_is_a_miss_and_keeps_the_file(fleet: Fleet) -> None:
    """A block asked for in the wrong size is not filled, and stays for those who ask rightly."""
    tier = fleet.tier()
    store(tier, [1])
    assert load(tier, 1, 4096)[0].outcome is Outcome.MISS
    assert load(tier, 1, 12_288)[0].outcome is Outcome.MISS
    assert load(tier, 1)[1] == payload(1)


@pytest.mark.parametrize(
    "change",
    [{"tensor_parallel": 2}, {"rank": "1"}, {"hash_seed": "7"}, {"dtype": "fp8"}, {"engine_version": "2"}],
)
def test_another_set_up_never_sees_the_files(fleet: Fleet, change: dict) -> None:
    """Any difference in the fingerprint is another directory: nothing is reused."""
    store(fleet.tier(), [1])
    other = fleet.tier(fingerprint=type(FINGERPRINT)(**{**FINGERPRINT.__dict__, **change}))
    assert load(other, 1)[0].outcome is Outcome.MISS
    assert other.lookup([key(1)]) == {key(1): False}


def test_a_manifest_that_says_something_else_refuses_to_open(fleet: Fleet) -> None:
    """A directory whose manifest names another set-up is not used, and the error names the field."""
    tier = fleet.tier()
    manifest = tier.directory / layout.MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace("bfloat16", "float8"))
    with pytest.raises(LayoutError, match="dtype"):
        fleet.tier()


def test_a_restart_finds_everything(fleet: Fleet) -> None:
    """A second tier on the same root knows sizes and blocks, and loads them."""
    store(fleet.tier(blocks_per_file=4), range(8))
    again = fleet.tier(blocks_per_file=4)
    assert again.known() == {key(number) for number in range(8)}
    assert again.used_bytes == 2 * (4096 + 4 * 8192)
    assert load(again, 5)[1] == payload(5)


def test_memory_file_systems_are_roots_too() -> None:
    """On tmpfs blocks come back, are evicted within the budget, and a restart finds them."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        fleet = Fleet(Path(folder))
        tier = fleet.tier(blocks_per_file=3, budget=DiskBudget(max_bytes=30 * 12_288))
        for first in range(0, 60, 3):
            assert all(result.ok for result in store(tier, range(first, first + 3)).values())
        tier.drain(WAIT)
        assert tier.used_bytes <= 30 * 12_288
        held = fleet.announced()
        assert held == tier.known()
        assert load(tier, 59)[1] == payload(59)
        assert fleet.tier(blocks_per_file=3).known() == held
        fleet.close()


def test_what_an_earlier_run_left_is_told_once_when_it_is_met(fleet: Fleet) -> None:
    """After a restart a block is announced as the engine stores or loads it again, once, until it goes."""
    store(fleet.tier(blocks_per_file=2), range(6))
    fleet.changes.clear()
    again = fleet.tier(blocks_per_file=2)
    assert fleet.announced() == set()
    assert store(again, [0])[key(0)].outcome is Outcome.EXISTS
    load(again, 1)
    load(again, 0)
    store(again, [1])
    again.touch([key(5)])
    assert again.lookup([key(4)]) == {key(4): True}
    assert [change.keys for change in fleet.changes] == [(key(0),), (key(1),)]
    again.evict([key(0)])
    store(again, [0])
    assert [(change.removed, change.keys) for change in fleet.changes[2:]] == [(True, (key(0),)), (False, (key(0),))]


@pytest.mark.parametrize("per_file", [1, 2])
def test_damage_since_an_earlier_run_is_found_before_it_is_told(fleet: Fleet, per_file: int) -> None:
    """A block whose bytes were damaged before a restart is not announced as there: it is written anew."""
    first = fleet.tier(blocks_per_file=per_file)
    store(first, [0, 1], size=3_000_001)
    path = file_of(first, 0)
    with path.open("r+b") as file:
        file.seek(4096 + 3_000_000)
        last = file.read(1)
        file.seek(4096 + 3_000_000)
        file.write(bytes([last[0] ^ 1]))
    fleet.changes.clear()
    again = fleet.tier(blocks_per_file=per_file)
    results = store(again, [0, 1], size=3_000_001)
    assert [results[key(number)].outcome for number in (0, 1)] == [Outcome.STORED, Outcome.EXISTS]
    assert again.metrics.counts["corrupt"] == 1
    assert fleet.announced() == {key(0), key(1)}
    for number in (0, 1):
        assert load(again, number, 3_000_001)[1] == payload(number, 3_000_001)


def test_a_stored_block_of_another_size_is_not_told_of(fleet: Fleet) -> None:
    """A block that an earlier run stored in another size is not the one that is stored now."""
    store(fleet.tier(), [1])
    again = fleet.tier()
    assert store(again, [1], size=4096)[key(1)].outcome is Outcome.STORED
    assert load(again, 1, 4096)[1] == payload(1, 4096)


def test_what_was_told_is_not_read_again_by_a_store(fleet: Fleet) -> None:
    """A block that verified in this run costs a second store its header alone."""
    tier = fleet.tier()
    store(fleet.tier(), [1])
    assert store(tier, [1])[key(1)].outcome is Outcome.EXISTS
    reads: list[int] = []
    fleet.fs.faults["preadv"] = lambda fd, buffers, offset: reads.append(offset)
    assert store(tier, [1])[key(1)].outcome is Outcome.EXISTS
    assert reads == [0]


def test_a_stored_block_that_cannot_be_read_is_written_anew(fleet: Fleet) -> None:
    """A disk that does not give an earlier run's block back gets it again rather than a promise."""
    store(fleet.tier(), [1])
    fleet.changes.clear()
    again = fleet.tier()
    fleet.fs.faults["preadv"] = lambda fd, buffers, offset: fail(EIO)() if offset else None
    assert store(again, [1])[key(1)].outcome is Outcome.STORED
    fleet.fs.faults.clear()
    assert fleet.announced() == {key(1)}
    assert load(again, 1)[1] == payload(1)


# -- pressure and the end ----------------------------------------------------------------------------------------


def test_closing_answers_every_future(fleet: Fleet) -> None:
    """Transfers that have not begun when the tier closes end as cancelled, later ones too."""
    tier = fleet.tier(threads=1)
    gate = threading.Event()
    real = os.preadv

    def slow(fd, buffers, offset):
        gate.wait(WAIT)
        return real(fd, buffers, offset)

    store(tier, [1])
    fleet.fs.faults["preadv"] = slow
    futures = [tier.load([target(1)[0]]) for _ in range(4)]
    closing = threading.Thread(target=tier.close)
    closing.start()
    time.sleep(0.05)
    gate.set()
    closing.join(WAIT)
    outcomes = [future.result(WAIT)[key(1)].outcome for future in futures]
    assert set(outcomes) <= {Outcome.LOADED, Outcome.CANCELLED}
    assert Outcome.CANCELLED in outcomes
    assert tier.store([block(2)]).result(WAIT)[key(2)].outcome is Outcome.CANCELLED


def test_stores_are_shed_when_too_many_wait_and_loads_are_not(fleet: Fleet) -> None:
    """Under pressure stores are dropped with an outcome while loads still get in."""
    tier = fleet.tier(threads=1, queued_write_bytes=3 * 8192)
    gate = threading.Event()
    store(tier, [100])
    fleet.fs.faults["pwritev"] = lambda *_: gate.wait(WAIT) and None
    futures = [tier.store([block(number)]) for number in range(10)]
    reading = tier.load([target(100)[0]])
    gate.set()
    outcomes = [future.result(WAIT)[key(number)].outcome for number, future in enumerate(futures)]
    # Three wait at most, and as many are in the hands of the one thread and its two for checksums, or fewer yet.
    assert 4 <= outcomes.count(Outcome.SHED) <= 7
    assert 3 <= outcomes.count(Outcome.STORED) <= 6
    assert reading.result(WAIT)[key(100)].ok
    assert fleet.announced() == {
        key(100),
        *(key(number) for number, outcome in enumerate(outcomes) if outcome is Outcome.STORED),
    }


# -- capacity ------------------------------------------------------------------------------------------------


def test_the_budget_holds_and_the_oldest_go_first(fleet: Fleet) -> None:
    """Stores beyond the budget evict what was longest unused; the budget is never exceeded."""
    tier = fleet.tier(budget=DiskBudget(max_bytes=10 * 12_288, high_watermark=0.9, low_watermark=0.5))
    for number in range(30):
        fleet.now_ns += 1_000_000
        assert store(tier, [number])[key(number)].ok
        assert tier.used_bytes <= 10 * 12_288
    tier.drain(WAIT)
    held = {number for number in range(30) if tier.lookup([key(number)])[key(number)]}
    assert held == set(range(30 - len(held), 30))
    assert 5 <= len(held) <= 9
    assert fleet.announced() == {key(number) for number in held}


def test_a_block_that_can_never_fit_is_shed(fleet: Fleet) -> None:
    """A block larger than the whole budget is refused with an outcome."""
    tier = fleet.tier(budget=DiskBudget(max_bytes=8192))
    assert store(tier, [1])[key(1)].outcome is Outcome.SHED


def test_a_percentage_of_the_file_system_is_a_budget_too(fleet: Fleet) -> None:
    """A percentage limits the tier by the size of the file system."""
    fleet.fs.total_bytes = 100 * 12_288
    tier = fleet.tier(budget=DiskBudget(max_percent=5.0, high_watermark=1.0, low_watermark=0.8))
    store(tier, range(20))
    tier.drain(WAIT)
    assert tier.used_bytes <= 5 * 12_288


def test_last_use_survives_a_restart(fleet: Fleet) -> None:
    """After a restart eviction still goes by use, not by when a block was written."""
    first = fleet.tier()
    for number in range(6):
        fleet.now_ns = time.time_ns() + number * 1_000_000
        store(first, [number])
    fleet.now_ns = time.time_ns() + 3_600_000_000_000
    load(first, 0)
    first.close(drain=True)
    again = fleet.tier(budget=DiskBudget(max_bytes=6 * 12_288, high_watermark=1.0, low_watermark=0.7))
    fleet.now_ns += 1_000_000
    store(again, [7])
    again.drain(WAIT)
    assert again.lookup([key(0)]) == {key(0): True}
    assert again.lookup([key(1)]) == {key(1): False}


def test_a_lost_sidecar_is_rebuilt_from_a_scan(fleet: Fleet) -> None:
    """Without its usage files a tier still opens, knows its blocks and keeps to its budget."""
    first = fleet.tier()
    store(first, range(6))
    first.close(drain=True)
    for path in (first.directory / layout.USAGE).iterdir():
        path.write_bytes(b"garbage" * 13)
    again = fleet.tier(budget=DiskBudget(max_bytes=4 * 12_288))
    again.drain(WAIT)
    assert 0 < again.used_bytes <= 4 * 12_288
    assert len(again.known()) == again.used_bytes // 12_288


def test_abandoned_temporary_files_are_removed(fleet: Fleet) -> None:
    """What a killed writer left half written is removed once it is old, and never read."""
    tier = fleet.tier()
    staging = tier.directory / layout.STAGING
    old, young = staging / "dead-0.tmp", staging / "alive-0.tmp"
    fleet.now_ns = time.time_ns()
    for path in (old, young):
        path.write_bytes(b"x" * 5000)
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    tier.rescan()
    assert not old.exists()
    assert young.exists()


def test_without_hard_links_each_block_has_a_file(fleet: Fleet) -> None:
    """A file system that refuses links gets one block per file and loses nothing."""
    fleet.fs.faults["link"] = fail(1)
    tier = fleet.tier(blocks_per_file=4)
    assert tier.blocks_per_file == 1
    store(tier, range(4))
    assert load(tier, 3)[1] == payload(3)


def test_a_failure_between_two_names_keeps_the_whole_blocks(fleet: Fleet) -> None:
    """When a segment gets only some of its names, those blocks are stored and the others are failures."""
    tier = fleet.tier(blocks_per_file=3)
    real = fleet.fs.faults
    last = file_of(tier, 2)

    def refuse(source, destination):
        if Path(destination) == last:
            raise OSError(EIO, "injected")

    real["replace"] = refuse
    results = store(tier, [0, 1, 2])
    real.clear()
    assert [results[key(number)].outcome for number in range(3)] == [
        Outcome.STORED,
        Outcome.STORED,
        Outcome.FAILED,
    ]
    assert fleet.announced() == {key(0), key(1)}
    assert load(tier, 1)[1] == payload(1)


def test_evicting_by_name_removes_and_announces(fleet: Fleet) -> None:
    """An explicit eviction removes a block and tells it; an unknown one is not told."""
    tier = fleet.tier()
    store(tier, [1, 2])
    results = tier.evict([key(1), key(9)])
    assert {result.outcome for result in results.values()} == {Outcome.MISS}
    assert fleet.announced() == {key(2)}
    assert fleet.changes[-1].keys == (key(1),)


def test_blocks_of_one_file_come_with_one_call(fleet: Fleet) -> None:
    """Loads of a whole file's blocks open it once and read it once, and every byte is right."""
    tier = fleet.tier(blocks_per_file=4, threads=2)
    store(tier, range(8))
    reads: list[int] = []
    fleet.fs.faults["preadv"] = lambda fd, buffers, offset: reads.append(offset)
    wanted = [aligned_target(number) for number in range(8)]
    results = tier.load([one for one, _ in wanted]).result(WAIT)
    assert reads == [0, 0]
    assert {result.outcome for result in results.values()} == {Outcome.LOADED}
    assert [bytes(memory) for _, memory in wanted] == [payload(number) for number in range(8)]
    assert tier.metrics.counts["hits"] == 8
