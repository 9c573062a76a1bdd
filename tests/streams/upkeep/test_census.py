"""Blocks per pod and tier, counted from all of an index or from a sample of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.pod_ids import pod_ref, store_ref
from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams.index.holders import HOLDER
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState, Role
from kvatlas.streams.upkeep.census import Census, count, covered

EPOCH = epoch_of(100)
PODS = [
    PodRecord(pod="a", writer="bridge", epoch=EPOCH, valid_from=EPOCH, store="nfs"),
    PodRecord(pod="b", writer="bridge", epoch=EPOCH, valid_from=EPOCH, store="nfs"),
]
VALID = {pod_ref(pod.pod): pod.validity for pod in PODS}


def holder(ref: int, tier: Tier, group: int = 0, epoch: int = EPOCH) -> bytes:
    """One holder as the table keeps it."""
    return HOLDER.pack(ref, group, tier, 0, 0, epoch)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[PartitionState]:
    """An active partition with nothing in it."""
    made = PartitionState(0, tmp_path / "t-0.db", RocksBudget(1 << 20, 8 << 20), 1 << 20)
    made.role = Role.ACTIVE
    yield made
    made.close()


def test_groups_count_once_and_ended_epochs_not_at_all():
    """A block in two groups of a tier is one block; holders of an epoch that ended are none."""
    value = holder(pod_ref("a"), Tier.GPU) + holder(pod_ref("a"), Tier.GPU, group=1) + holder(pod_ref("a"), Tier.CPU)
    ended = holder(pod_ref("b"), Tier.GPU, epoch=EPOCH - 1)
    found = count([(b"k" * 16, value + ended), (b"meta", b"")], VALID)
    assert found == {(pod_ref("a"), Tier.GPU): 1, (pod_ref("a"), Tier.CPU): 1}


def test_the_share_of_a_stretch_of_keys():
    """From the first key to the middle is half of the space, to the end all of it."""
    assert covered(b"", None) == 1
    assert covered(b"", b"\x7f" + b"\xff" * 15) == 0.5
    assert covered(b"\x80", None) == 0.5


async def test_a_small_index_is_counted_exactly(state):
    """Below the sample's size each block counts, wherever the count begins; a shared store has a row of its own."""
    writes = {random.randbytes(16): holder(pod_ref("a"), Tier.GPU) for _ in range(700)}
    writes |= {random.randbytes(16): holder(pod_ref("b"), Tier.DISK) for _ in range(600)}
    writes |= {random.randbytes(16): holder(store_ref("nfs"), Tier.SHARED, epoch=0) for _ in range(5)}
    writes |= {b"\x80" * 20: b"a meta entry"}
    state.write(writes, 1, Meta(1, 0, 0))
    census = Census(lambda: {0: state}, lambda: PODS)
    for _ in range(3):
        await census.take()
        assert census.holdings == {"a": {"gpu": 700}, "b": {"disk": 600}, "store:nfs": {"shared": 5}}


async def test_a_large_index_is_estimated_from_a_sample(state):
    """A sample of a fifteenth tells pods with many blocks from those with few, within a fifth."""
    writes = {random.randbytes(16): holder(pod_ref("a"), Tier.GPU) for _ in range(24_000)}
    writes |= {random.randbytes(16): holder(pod_ref("b"), Tier.GPU) for _ in range(6_000)}
    state.write(writes, 1, Meta(1, 0, 0))
    census = Census(lambda: {0: state}, lambda: PODS, sample_entries=2_000)
    await census.take()
    assert census.holdings["a"]["gpu"] == pytest.approx(24_000, rel=0.2)
    assert census.holdings["b"]["gpu"] == pytest.approx(6_000, rel=0.35)


async def test_partitions_that_are_not_ours_are_not_counted(state):
    """A standby's entries are counted by whoever is active for them."""
    state.write({b"k" * 16: holder(pod_ref("a"), Tier.GPU)}, 1, Meta(1, 0, 0))
    state.role = Role.STANDBY
    census = Census(lambda: {0: state}, lambda: PODS)
    await census.take()
    assert census.holdings == {}
