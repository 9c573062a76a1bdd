"""The rule of what counts, and the places that work it out on their own for speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import GONE, PodRecord
from kvatlas.bridge.model.validity import SPECULATIVE, Validity
from kvatlas.scorer.scoring.fleet import Fleet, Weights
from kvatlas.streams.index.apply import live_holders
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.resolve.engine_blocks import SCHEMA_VERSION, PodState

EPOCHS = st.integers(0, 4)
TIERS = st.sampled_from([*map(int, Tier), SPECULATIVE, 9])
BOUNDS = st.fixed_dictionaries({"valid_from": EPOCHS, "gpu_valid_from": EPOCHS, "suspect_before": EPOCHS})


@pytest.mark.parametrize(
    ("tier", "epoch", "state"),
    [
        (Tier.CPU, 1, "dead"),
        (Tier.CPU, 2, "suspect"),
        (Tier.CPU, 4, "live"),
        (Tier.GPU, 2, "dead"),
        (Tier.GPU, 3, "suspect"),
        (Tier.SHARED, 0, "live"),
        (SPECULATIVE, 2, "dead"),
        (SPECULATIVE, 3, "dead"),
        (SPECULATIVE, 4, "speculative"),
    ],
)
def test_what_an_entry_is(tier: int, epoch: int, state: str) -> None:
    """Epochs end entries, a clear of the GPU ends guesses too, a gap makes the rest suspect, stores have no epochs."""
    assert Validity(valid_from=2, gpu_valid_from=3, suspect_before=4).state(tier, epoch) == state


def test_nothing_of_a_gone_pod_counts() -> None:
    """Removed pods hold nothing, whatever the epoch; a store that they mounted goes on without them."""
    gone = PodRecord(pod="a", writer="bridge", state=GONE).validity
    assert [gone.state(tier, 9) for tier in (Tier.GPU, Tier.CPU, SPECULATIVE)] == ["dead"] * 3
    assert gone.state(Tier.SHARED, 0) == "live"


@given(bounds=BOUNDS, tier=TIERS, epoch=EPOCHS)
def test_the_walk_grades_what_the_rule_counts(bounds: dict[str, int], tier: int, epoch: int) -> None:
    """The scorer's own comparison gives a grade exactly to what counts, and calls suspect what is."""
    record = PodRecord(pod="a", writer="streams", model="m", **bounds)
    scene = Fleet([record], 16).scene("m", Weights())
    cell = scene.cells(pack_holder(pod_ref("a"), 0, tier, 0, 0, epoch)).get(0)
    grade = cell.grade if cell else None
    state = record.validity.state(tier, epoch)
    assert scene.fleet.pods[0].validity == record.validity
    assert (grade is not None) == record.validity.counts(tier, epoch) == (state != "dead")
    if grade is not None:
        assert grade.suspect == (state == "suspect")
        assert (grade.tier == SPECULATIVE) == (state == "speculative")


@given(bounds=BOUNDS, tier=TIERS, epoch=EPOCHS)
def test_resolve_and_the_sweep_keep_what_the_rule_counts(bounds: dict[str, int], tier: int, epoch: int) -> None:
    """What the resolver believes, and what a sweep leaves, is what counts; no sweep removes what is only suspect."""
    validity = Validity(**bounds)
    state = PodState(v=SCHEMA_VERSION, pod="a", **bounds)
    assert state.live(tier, epoch) == validity.counts(tier, epoch)
    if state.live(tier, epoch) and tier != SPECULATIVE:
        assert state.suspect(tier, epoch) == (validity.state(tier, epoch) == "suspect")
    held = pack_holder(7, 0, tier, 0, 0, epoch)
    assert bool(live_holders(held, {7: validity})) == validity.counts(tier, epoch)
    assert live_holders(held, {}) == held


@given(bounds=BOUNDS, tier=st.sampled_from(list(map(int, Tier))), epoch=EPOCHS)
def test_what_may_be_removed_never_counts(bounds: dict[str, int], tier: int, epoch: int) -> None:
    """What has ended by a pod's record is dead; that it is gone ends nothing, since the record may be late."""
    record = PodRecord(pod="a", writer="bridge", state=GONE, **bounds)
    if not record.ended.counts(tier, epoch):
        assert record.validity.state(tier, epoch) == "dead"
    assert record.ended.counts(tier, record.valid_from + record.gpu_valid_from)
