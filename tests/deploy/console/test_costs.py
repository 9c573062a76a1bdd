"""What the picker reckons, on the page: the same figures as the picker's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.records import DecisionRecord, PodRecord
from kvatlas.deploy.console.costs import Costs
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.picker.affinity import sessions_of
from kvatlas.scorer.picker.cost import cost_of
from kvatlas.scorer.picker.endpoints import NOTHING, Held
from kvatlas.scorer.picker.load import Load
from kvatlas.scorer.v1 import scorer_pb2 as pb

SETTINGS = PickerSettings()
SECOND = 1_000_000_000


def pod(name: str, **load: float) -> PodRecord:
    """A pod that reports its load."""
    return PodRecord(pod=name, writer="bridge", model="m", load=load, load_ns=10 * SECOND)


@given(st.integers(0, 20), st.integers(0, 20), st.floats(0, 1), st.integers(0, 8))
def test_a_cost_is_the_picker_s(running: int, waiting: int, usage: float, blocks: int) -> None:
    """Each part as `cost_of` gives it for what the pod holds and reports."""
    costs = Costs(SETTINGS, clock=lambda: 10.0, clock_ns=lambda: 10 * SECOND)
    costs.look({"a": pod("a", running=running, waiting=waiting, cache_usage=usage), "b": pod("b")})
    scored = pb.ScoreResponse(prompt_tokens=200, block_size_tokens=16)
    if blocks:
        scored.scores["a"].CopyFrom(
            pb.PodScore(matched_blocks=blocks, matched_tokens=16 * blocks, tiers={"cpu": blocks})
        )
    rows = {row["pod"]: row for row in costs.of("m", scored)["pods"]}
    held = Held(16 * blocks, {"cpu": 16 * blocks}) if blocks else NOTHING
    expected = cost_of(200, held, Load(0.0, running + waiting, waiting, usage, stale=False), SETTINGS.weights())
    assert [rows["a"][part] for part in ("compute", "queued", "decode", "full", "total")] == [*expected, expected.total]
    assert rows["b"]["compute"] == 200
    assert not rows["b"]["load_known"]


def test_what_pickers_gave_out_is_load_and_a_session_stays() -> None:
    """A decision on `kv-decisions` counts as queue at its pod until its end; what was there before does not."""
    now = [10.0]
    costs = Costs(SETTINGS, clock=lambda: now[0], clock_ns=lambda: 10 * SECOND)
    made = {"endpoint": "1.2.3.4:8000", "pod": "a", "scorer": "picker-1", "compute_tokens": 1_000.0, "model": "m"}
    costs.take(DecisionRecord(request_id="old", decided_ns=SECOND, **made))
    costs.take(DecisionRecord(request_id="new", decided_ns=11 * SECOND, session=sessions_of({}, "chat")[0], **made))
    costs.look({"a": pod("a"), "b": pod("b")})
    scored = pb.ScoreResponse(prompt_tokens=100, block_size_tokens=16)
    rows = {row["pod"]: row for row in costs.of("m", scored, "chat")["pods"]}
    assert (rows["a"]["requests"], rows["a"]["waiting_tokens"]) == (1, 1_000.0)
    assert rows["a"]["queued"] == SETTINGS.weights().queue * 1_000.0
    assert (rows["a"]["session"], rows["b"]["session"]) == (True, False)
    costs.take(DecisionRecord(request_id="new", decided_ns=12 * SECOND, kind="served", pod="a", scorer="picker-1"))
    assert {row["requests"] for row in costs.of("m", scored)["pods"]} == {0}
