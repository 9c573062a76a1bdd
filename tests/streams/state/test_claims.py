"""Tests of claims: which writer's records count, in the order of the changelog."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvatlas.bridge.kafka.lease import Lease
from kvatlas.streams.errors import FencedError
from kvatlas.streams.state.changelog import META_KEY, Meta, Placed, encode_meta
from kvatlas.streams.state.claims import examine
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState

OLD, NEW = Meta(10, 0, 1, epoch=1, owner=7), Meta(10, 0, 1, epoch=2, owner=8)

Records = list[tuple[bytes, bytes | None]]


def meta(of: Meta) -> tuple[bytes, bytes | None]:
    return META_KEY, encode_meta(of)


def batch(of: Meta, **writes: str) -> Records:
    return [meta(of), *((key.encode(), value.encode() or None) for key, value in writes.items()), meta(of)]


@pytest.fixture
def state(tmp_path: Path) -> PartitionState:
    return PartitionState(0, tmp_path / "t-0.db", RocksBudget(1 << 20, 8 << 20), 1 << 20)


def test_batches_of_a_replaced_writer_are_dropped(state: PartitionState) -> None:
    """What an older owner wrote after a newer one's claim does not count, and its keys are remembered."""
    log = [*batch(OLD, a="1", b="1"), meta(NEW), *batch(OLD, a="2", c="2"), *batch(NEW, b="3")]
    state.load(log, 20)
    assert dict(state.items()) == {b"a": b"1", b"b": b"3"}
    assert state.foreign == {b"a", b"c"}
    assert (state.meta, state.changelog_offset) == (NEW, 20)


def test_of_two_equal_claims_the_first_counts(state: PartitionState) -> None:
    """Two workers that claim the same epoch at once: the order of the changelog decides."""
    other = NEW._replace(owner=9)
    state.load([meta(NEW), meta(other), *batch(other, a="2"), *batch(NEW, a="1")], 10)
    assert dict(state.items()) == {b"a": b"1"}
    assert state.meta == NEW


def test_however_the_log_is_cut_into_fetches_the_state_is_the_same(tmp_path: Path) -> None:
    """Cuts within batches, and a restart at any cut, change nothing."""
    log = [*batch(OLD, a="1", b="1"), meta(NEW), *batch(OLD, a="2", c="2", d="2"), *batch(NEW, b="3", d="4")]
    dice = random.Random(5)
    for number in range(30):
        path = tmp_path / f"t-{number}.db"
        state = PartitionState(0, path, RocksBudget(1 << 20, 8 << 20), 1 << 20)
        at = 0
        while at < len(log):
            end = min(len(log), at + dice.randint(1, 5))
            state.load(log[at:end], end - 1)
            at = end
            if dice.random() < 0.3:
                state.close()
                state = PartitionState(0, path, RocksBudget(1 << 20, 8 << 20), 1 << 20)
                at = -1 if state.changelog_offset is None else state.changelog_offset
                at += 1
        assert dict(state.items()) == {b"a": b"1", b"b": b"3", b"d": b"4"}
        state.close()


def test_a_writer_that_was_replaced_finds_out() -> None:
    """A higher claim between two batches of ours ends this worker; older writers' keys are to be written again."""
    with pytest.raises(FencedError, match="t/0"):
        examine([meta(NEW), *batch(OLD, a="1")], OLD, "t/0")
    assert examine([*batch(OLD, a="1", b="2"), *batch(NEW, b="3")], NEW, "t/0") == {b"a", b"b"}
    assert examine([*batch(NEW, b="3"), *batch(NEW, b="3")], NEW, "t/0") == set()


def test_a_gap_before_a_batch_is_seen() -> None:
    """Offsets tell whether somebody else wrote in between."""
    assert Placed(last=4, records=5).follows(None)
    assert Placed(last=9, records=3).follows(6)
    assert not Placed(last=9, records=3).follows(5)
    assert not Placed(last=9, records=3).follows(None)


def test_the_lease_ends_a_session_after_the_heartbeat_was_sent() -> None:
    """Time that passes while a heartbeat is on its way, or the process stands still, counts."""
    now = 100.0
    lease = Lease(6.0, lambda: now)
    assert not lease.valid
    began = lease.now()
    now = 103.0
    lease.renew(began)
    now = 105.9
    assert lease.valid
    now = 106.1
    assert not lease.valid
    lease.renew(began - 50)
    assert not lease.valid
