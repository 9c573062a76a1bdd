"""A disk that is full, refuses writes, or holds damaged files: reported, bounded, and over as soon as it may be."""

from __future__ import annotations

import pytest

from kvatlas.connector.files import layout
from kvatlas.connector.files.fs import PosixFileSystem
from kvatlas.connector.outcome import Outcome
from tests.connector.conftest import (
    ENOSPC,
    EROFS,
    WAIT,
    Fleet,
    fail,
    file_of,
    key,
    load,
    mount,
    payload,
    store,
)


def test_no_space_is_a_reported_failure(fleet: Fleet) -> None:
    """ENOSPC: the store fails, nothing is announced, nothing is left behind, and a second later a store works."""
    tier = fleet.tier()
    fleet.fs.faults["pwritev"] = fail(ENOSPC)
    result = store(tier, [1])[key(1)]
    assert result.outcome is Outcome.FAILED
    assert "ENOSPC" in result.detail
    fleet.fs.faults.clear()
    assert fleet.announced() == set()
    assert not list((tier.directory / layout.STAGING).iterdir())
    assert tier.lookup([key(1)]) == {key(1): False}
    assert tier.drain(WAIT)
    shed = store(tier, [1])[key(1)]
    assert (shed.outcome, shed.detail) == (Outcome.SHED, "the disk is full")
    fleet.monotonic += 2
    assert store(tier, [1])[key(1)].outcome is Outcome.STORED


def test_each_time_of_no_space_costs_a_bounded_share(fleet: Fleet) -> None:
    """A full disk under an unused budget: the longest unused go, once in a while only, and what stays is told right."""
    tier = fleet.tier()
    for number in range(40):
        assert store(tier, [number])[key(number)].ok
    load(tier, 0)
    for wait in (3.0, 1.5, 3.0, 1.5):
        fleet.monotonic += wait
        fleet.fs.faults["pwritev"] = fail(ENOSPC)
        outcomes = {result.outcome for result in store(tier, range(50, 55)).values()}
        assert Outcome.FAILED in outcomes
        assert outcomes <= {Outcome.FAILED, Outcome.SHED}
        assert tier.drain(WAIT)
        fleet.fs.faults.clear()
    # A twentieth of 40 blocks is two, a twentieth of 38 one and a bit.
    assert tier.known() == {key(number) for number in range(40) if number not in {1, 2, 3, 4}}
    assert fleet.announced() == tier.known()
    fleet.monotonic += 2
    assert store(tier, [50])[key(50)].outcome is Outcome.STORED


def test_a_disk_that_others_filled_takes_stores_again(mounted: Fleet) -> None:
    """Real ENOSPC that our budget knows nothing of: reported, nothing announced, and a later store gets in."""
    disk, size = mounted.root.parent, 96 << 10
    tier = mounted.tier()
    assert all(result.ok for result in store(tier, range(20), size=size).values())
    load(tier, 0, size)
    (disk / "ballast").write_bytes(bytes(PosixFileSystem().space(disk).free))
    result = store(tier, [30], size=size)[key(30)]
    assert result.outcome is Outcome.FAILED
    assert "ENOSPC" in result.detail
    assert key(30) not in mounted.announced()
    assert not list((tier.directory / layout.STAGING).iterdir())
    assert tier.drain(WAIT)
    assert len(tier.known()) >= 18
    assert key(0) in tier.known()
    assert store(tier, [30], size=size)[key(30)].outcome is Outcome.STORED
    assert mounted.announced() == tier.known()
    for number in range(31):
        result, data = load(tier, number, size)
        assert result.ok == (key(number) in tier.known())
        assert not result.ok or data == payload(number, size)


def test_a_read_only_root_serves_and_refuses(fleet: Fleet) -> None:
    """On a read-only root loads work, stores fail with a reason, and damage is reported without moving it."""
    store(fleet.tier(), [1, 2])
    fleet.changes.clear()
    for call in ("mkdir", "replace", "unlink", "link"):
        fleet.fs.faults[call] = fail(EROFS)
    tier = fleet.tier()
    assert tier.read_only
    assert load(tier, 1)[1] == payload(1)
    assert store(tier, [5])[key(5)].outcome is Outcome.FAILED
    assert store(tier, [1])[key(1)].outcome is Outcome.EXISTS
    data = bytearray(file_of(tier, 2).read_bytes())
    data[9000] ^= 1
    file_of(tier, 2).write_bytes(data)
    assert load(tier, 2)[0].outcome is Outcome.MISS
    assert tier.lookup([key(2)]) == {key(2): False}
    assert fleet.announced() == {key(1)}


def test_a_mount_that_is_read_only_serves_and_refuses(mounted: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """A real read-only mount: one warning, loads go on, stores are refused, nothing piles up."""
    disk = mounted.root.parent
    with mounted.tier(blocks_per_file=2) as first:
        store(first, [1, 2])
    mount(disk, "remount,ro")
    mounted.changes.clear()
    tier = mounted.tier(blocks_per_file=2)
    assert tier.read_only
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("kvatlas")]
    assert str(tier.directory) in warning
    assert "Read-only" in warning
    assert store(tier, [1])[key(1)].outcome is Outcome.EXISTS
    assert load(tier, 2)[1] == payload(2)
    refused = store(tier, [5])[key(5)]
    assert (refused.outcome, refused.detail) == (Outcome.FAILED, "the root is read-only")
    tier.touch([key(number) for number in range(100)])
    assert not tier._usage._pending
    assert mounted.announced() == {key(1), key(2)}
    tier.close()
    mount(disk, "remount,rw")
    assert store(mounted.tier(), [5])[key(5)].outcome is Outcome.STORED


def test_a_mount_that_becomes_read_only_serves_and_refuses(mounted: Fleet) -> None:
    """A mount that turns read-only under a running tier fails stores, serves loads and takes stores once it is back."""
    disk = mounted.root.parent
    tier = mounted.tier()
    store(tier, [1, 2])
    assert tier.drain(WAIT)
    mount(disk, "remount,ro")
    refused = store(tier, [5])[key(5)]
    assert refused.outcome is Outcome.FAILED
    assert "EROFS" in refused.detail
    assert load(tier, 1)[1] == payload(1)
    assert {result.outcome for result in tier.evict([key(2)]).values()} == {Outcome.FAILED}
    assert mounted.announced() == {key(1), key(2)}
    mount(disk, "remount,rw")
    assert store(tier, [5])[key(5)].outcome is Outcome.STORED
    assert mounted.announced() == {key(1), key(2), key(5)}


@pytest.mark.parametrize("limits", [{"quarantine_files": 2}, {"quarantine_bytes": 2 * 12_288}])
def test_the_quarantine_keeps_to_its_bound(fleet: Fleet, limits: dict[str, int]) -> None:
    """Each damaged file makes the first ones go, without any eviction; a start and a full disk trim it too."""
    tier = fleet.tier(**limits)
    store(tier, range(6))
    quarantine, clock = tier.directory / layout.QUARANTINE, fleet.root / "clock"
    clock.touch()
    for number in range(5):
        path = file_of(tier, number)
        data = bytearray(path.read_bytes())
        data[9000] ^= 1
        path.write_bytes(data)
        assert load(tier, number)[0].outcome is Outcome.MISS
        kept = {name.name.partition(".")[0] for name in quarantine.iterdir()}
        assert kept == {key(n).hex() for n in range(max(0, number - 1), number + 1)}
        # The kernel's clock of files moves in ticks: two files must not seem to have come at once.
        came = next(quarantine.glob(f"{key(number).hex()}*")).stat().st_ctime_ns
        while clock.stat().st_ctime_ns <= came:
            clock.touch()
    for number in range(4):
        (quarantine / f"old{number}").write_bytes(bytes(100))
    fleet.tier(quarantine_files=1)
    assert len(list(quarantine.iterdir())) == 1
    fleet.fs.faults["pwritev"] = fail(ENOSPC)
    assert store(tier, [9])[key(9)].outcome is Outcome.FAILED
    assert tier.drain(WAIT)
    assert not list(quarantine.iterdir())
