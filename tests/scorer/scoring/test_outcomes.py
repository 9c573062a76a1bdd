"""What came of decisions: predictions against what the index shows later, by what the data can tell apart."""

from __future__ import annotations

from typing import Any

import pytest

from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import GONE, DecisionRecord, PodRecord, encode
from kvatlas.scorer.scoring.outcomes import HIT, LOST_EVICTION, LOST_STALE, WRONG, judge
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.holders import add_holder, pack_holder
from tests.scorer.rig import KEYS, PARTITIONS, TOKENS, Index, Rig


@pytest.mark.parametrize(
    ("real", "pod", "outcome"),
    [
        (6, {}, HIT),
        (9, {}, HIT),
        (6, {"state": GONE}, HIT),
        (5, {}, LOST_EVICTION),
        (0, {}, WRONG),
        (0, {"valid_from": 8}, LOST_STALE),
        (5, {"valid_from": 8}, LOST_STALE),
        (5, {"gpu_valid_from": 8}, LOST_STALE),
        (5, {"state": GONE}, LOST_STALE),
        (0, None, LOST_STALE),
    ],
)
def test_what_came_of_a_decision(real: int, pod: dict[str, Any] | None, outcome: str) -> None:
    """At least what was predicted is a hit; less is staleness when the pod's epoch ended, else eviction or an error."""
    made = DecisionRecord(request_id="r", pod="a", pod_epoch=7, predicted_blocks=6)
    record = None if pod is None else PodRecord(**{"pod": "a", "writer": "streams", "valid_from": 7, **pod})
    assert judge(made, real, record) == outcome


@pytest.fixture
async def scored(rig: Rig) -> Rig:
    """A rig with one worker and pod ``a``, which holds 6 of 10 blocks."""
    rig.pod("a", 6)
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    return rig


async def _decided(rig: Rig, request_id: str = "r", pod: str = "a") -> DecisionRecord:
    await rig.core.score(pb.ScoreRequest(model="m", tokens=TOKENS, request_id=request_id))
    await rig.core.report(pb.ReportDecisionRequest(request_id=request_id, pod=pod))
    made: DecisionRecord = rig.sent[-1]
    return made


async def _came(rig: Rig, made: DecisionRecord) -> tuple[str, int, int]:
    outcome = await rig.core.judge(made)
    return outcome.outcome, made.predicted_blocks, outcome.real_blocks


async def test_what_stayed_is_a_hit(scored: Rig) -> None:
    """The blocks that were predicted are still there; those computed for the request are there as well."""
    made = await _decided(scored)
    scored.hold("a", KEYS[6:])
    assert await _came(scored, made) == ("hit", 6, 10)


async def test_nothing_predicted_is_no_hit(scored: Rig) -> None:
    """A pod that held nothing and has computed the prompt since was cold."""
    scored.pod("b", 0)
    made = await _decided(scored, pod="b")
    scored.hold("b", KEYS)
    assert await _came(scored, made) == ("cold", 0, 10)


@pytest.mark.parametrize(
    "changed", [{"valid_from": 1}, {"gpu_valid_from": 1}, {"suspect_before": 1}], ids=["restart", "clear", "gap"]
)
async def test_blocks_stored_in_a_later_epoch_are_no_hit(scored: Rig, changed: dict[str, int]) -> None:
    """The pod computed all blocks again and announced them in its new epoch: what was predicted had been lost."""
    made = await _decided(scored)
    record = PodRecord(pod="a", writer="streams", model="m", block_size_tokens=16, epoch=1, **changed)  # type: ignore[arg-type]
    scored.pods.apply(b"streams|a", encode(record))
    for key in KEYS:
        scored.table[key] = add_holder(scored.table.get(key, b""), pack_holder(pod_ref("a"), 0, 1, 0, 0, 1))
    assert await _came(scored, made) == ("lost-stale", 6, 0)


async def test_what_only_a_decision_vouched_for_is_unproven(scored: Rig) -> None:
    """The second of a burst counts on blocks that no event has shown; whether they came in time cannot be told."""
    await _decided(scored, "first")
    made = await _decided(scored, "second")
    assert (made.predicted_blocks, made.speculative_blocks) == (10, 4)
    scored.hold("a", KEYS[6:])
    assert await _came(scored, made) == ("unproven", 10, 10)
