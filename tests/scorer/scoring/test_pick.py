"""Pick: the cached share against load, for every strategy, and how ties go."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvatlas.bridge.model.loads import LOAD_STALE_SECONDS
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.client import score_request
from kvatlas.scorer.errors import InputError, NotReadyError
from kvatlas.scorer.scoring.answers import PodScore, Scored
from kvatlas.scorer.scoring.pick import PickQuery, choose
from kvatlas.scorer.scoring.strategies import STRATEGIES
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig

NOW_NS = 10**18


def _pod(name: str, **fields: Any) -> PodRecord:
    return PodRecord(pod=name, writer="streams", model="m", **{"load_ns": NOW_NS, **fields})


def _choose(
    scores: dict[str, float], pods: list[PodRecord], draw: int = 0, **fields: Any
) -> tuple[str, list[tuple[str, float]]]:
    found = {name: PodScore(score=score, matched_blocks=0, matched_tokens=0) for name, score in scores.items()}
    scored = Scored(prompt_tokens=160, block_size_tokens=16, blocks=10, scores=found)
    query = PickQuery(model="m", request_id="r", **fields)
    answer = choose(query, scored, pods, full=10.0, now_ns=NOW_NS, draw=lambda _most: draw)
    assert answer.candidates[0].pod == answer.pod
    assert answer.pod in answer.reason
    return answer.pod, [(c.pod, round(c.total, 6)) for c in answer.candidates]


def test_cached_share_and_load_of_caller_and_pods_add_up() -> None:
    """Loads are relative to the busiest; the caller's replace what a pod reports; shares end at 1."""
    pods = [_pod("a", load={"waiting": 4.0}), _pod("b", load={"waiting": 2.0, "cache_usage": 0.5}), _pod("c")]
    assert _choose({"a": 10.0, "b": 20.0}, pods) == ("b", [("b", 0.625), ("a", 0.5), ("c", 0.0)])
    found = _choose({"a": 10.0, "b": 20.0}, pods, load={"b": {"waiting": 8, "running": 1}})
    assert found == ("a", [("a", 0.75), ("b", 0.25), ("c", 0.0)])
    assert _choose({"a": 10.0}, pods, weights={"cache": 0.0})[0] == "c"


def test_stale_load_is_not_no_load() -> None:
    """A pod whose load is too old counts as the busiest, one that never reported any as idle."""
    old = NOW_NS - int((LOAD_STALE_SECONDS + 1) * 1e9)
    busy = _pod("b", load={"waiting": 2.0, "cache_usage": 0.5})
    stale = _pod("a", load={"running": 1.0}, load_ns=old)
    assert _choose({}, [stale, busy]) == ("a", [("a", -0.625), ("b", -0.625)])
    assert _choose({}, [stale, busy, _pod("c")])[1][0] == ("c", 0.0)
    assert _choose({}, [stale]) == ("a", [("a", 0.0)])
    assert _choose({}, [stale, busy], load={"a": {"waiting": 1.0}}) == ("a", [("a", -0.25), ("b", -0.625)])


def test_ties() -> None:
    """Equal totals go to the least loaded, to a draw, or by the request's id, as asked for."""
    pods = [_pod("a", load={"running": 3.0}), _pod("b", load={"running": 1.0}), _pod("c", load={"running": 3.0})]
    level = {"weights": {"running": 0.0}}
    assert _choose({}, pods, **level)[0] == "b"
    assert [_choose({}, pods, draw, tie_break="random", **level)[0] for draw in range(3)] == ["a", "b", "c"]
    assert len({_choose({}, pods, draw, tie_break="hash", **level)[0] for draw in range(3)}) == 1


def test_pods_that_are_live_come_before_stale_ones() -> None:
    """A stale pod is chosen only where no pod is live; without any pod there is nothing to choose."""
    assert _choose({"a": 10.0}, [_pod("a", state="stale"), _pod("b")])[0] == "b"
    assert _choose({"a": 10.0}, [_pod("a", state="stale")])[0] == "a"
    with pytest.raises(NotReadyError, match="'m'"):
        _choose({}, [])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    """Weights and loads of a request must be finite; what a pod reports is left out where it is not."""
    with pytest.raises(InputError, match="weights: waiting"):
        _choose({}, [_pod("a")], weights={"waiting": number})
    with pytest.raises(InputError, match="load of 'a': running"):
        _choose({}, [_pod("a")], load={"a": {"running": number}})
    assert _choose({"a": 5.0}, [_pod("a", load={"waiting": number}), _pod("b")])[0] == "a"
    for wrong in ({"weights": {"speed": 1.0}}, {"tie_break": "never"}):
        with pytest.raises(InputError, match=r"speed|never"):
            _choose({}, [_pod("a")], **wrong)


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
async def test_the_cached_share_is_the_same_whatever_the_strategy(rig: Rig, strategy: str) -> None:
    """All of a prompt is a share of 1 and half of it one of 0.5, also where scores are tokens or normalised."""
    rig.pod("a", 10)
    rig.pod("b", 5)
    await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
    client = await rig.client()
    answer = await client.pick(score_request("m", tokens=TOKENS, strategy=strategy))
    assert [(c.pod, round(c.terms["cache"], 6)) for c in answer.candidates] == [("a", 1.0), ("b", 0.5)]
