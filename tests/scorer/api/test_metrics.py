"""What an answer leaves in the metrics: how complete it was, how much was cached, how old what it rests on is."""

from __future__ import annotations

import msgspec
from prometheus_client import REGISTRY

from kvatlas.scorer.api import metrics
from kvatlas.scorer.scoring.answers import PodFreshness, PodScore, Scored
from kvatlas.scorer.scoring.lookup import ACTIVE, STANDBY, Seen


def _value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"kvatlas_scorer_{name}", labels) or 0.0


def _answer(*matched: int, blocks: int = 10, partial: bool = False, role: str = ACTIVE) -> Scored:
    scores = {
        f"p{number}": PodScore(score=1.0, matched_blocks=count, matched_tokens=count * 16)
        for number, count in enumerate(matched)
    }
    partitions = {0: Seen(role, "w0", 0, 0)}
    return Scored(
        prompt_tokens=0, block_size_tokens=16, blocks=blocks, scores=scores, partitions=partitions, partial=partial
    )


def test_answers_by_kind_and_hits_by_model() -> None:
    """Partial beats standby beats complete; the longest match counts against the blocks of the prompt."""
    kinds = ("complete", "standby", "partial")
    before = {kind: _value("answers_total", kind=kind) for kind in kinds}
    metrics.answered("hits", _answer(4, 7))
    metrics.answered("hits", _answer(1, blocks=5, role=STANDBY))
    metrics.answered("hits", _answer(partial=True, role=STANDBY))
    assert {kind: _value("answers_total", kind=kind) - value for kind, value in before.items()} == dict.fromkeys(
        kinds, 1
    )
    assert (_value("prompt_blocks_total", model="hits"), _value("cached_blocks_total", model="hits")) == (25, 8)


def test_models_that_nobody_holds_get_no_label_of_their_own() -> None:
    """A caller that invents models adds to `other` alone."""
    before = _value("prompt_blocks_total", model="other")
    for number in range(300):
        metrics.answered(f"invented-{number}", _answer())
    assert _value("prompt_blocks_total", model="other") - before == 3_000
    assert REGISTRY.get_sample_value("kvatlas_scorer_prompt_blocks_total", {"model": "invented-0"}) is None


def test_ages() -> None:
    """The oldest pod and the oldest partition of an answer count; what was never heard of does not."""
    pods, index = _value("pod_age_seconds_sum"), _value("index_age_seconds_count")
    freshness = {
        name: PodFreshness(last_sequence=0, age_ms=age, state="live", epoch=0)
        for name, age in (("a", 2_000.0), ("b", 3_000.0), ("c", -1.0))
    }
    partitions = {number: Seen(ACTIVE, "w0", 0, at) for number, at in enumerate((0, 5))}
    empty = Scored(prompt_tokens=0, block_size_tokens=16, blocks=0)
    metrics.answered("ages", msgspec.structs.replace(empty, freshness=freshness, partitions=partitions))
    metrics.answered("ages", empty)
    assert (_value("pod_age_seconds_sum") - pods, _value("index_age_seconds_count") - index) == (3.0, 1)
