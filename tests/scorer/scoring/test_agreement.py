"""Predictions that never come true are found, and a fleet without shared prefixes is not blamed."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from kvatlas.bridge.model.loads import ASKED, FOUND
from kvatlas.bridge.model.records import DecisionRecord, PodRecord
from kvatlas.scorer.api.disagreements import Disagreements
from kvatlas.scorer.scoring.agreement import LEAST_REQUESTS, WINDOW_REQUESTS, Agreement, Disagreement


def pod(name: str = "a", model: str = "m", sequence: int = 5, state: str = "live") -> PodRecord:
    """Return a pod that has announced blocks."""
    return PodRecord(pod=name, writer="bridge", model=model, last_sequence=sequence, block_size_tokens=16, state=state)


def scored(agreement: Agreement, count: int, *, longest: int = 0, blocks: int = 8, model: str = "m") -> None:
    """Score so many prompts."""
    for _ in range(count):
        agreement.scored(model, blocks, longest)


def kinds(found: list[Disagreement]) -> list[tuple[str, str]]:
    """Return subject and kind of each finding."""
    return [(finding.subject, finding.kind) for finding in found]


def test_a_model_that_never_matches_is_named_with_a_cause() -> None:
    """Its pods announce blocks, its prompts are long enough, and none is ever found."""
    agreement = Agreement()
    scored(agreement, LEAST_REQUESTS)
    (finding,) = agreement.findings([pod()])
    assert (finding.subject, finding.kind, finding.requests) == ("m", "no-match", LEAST_REQUESTS)
    assert "doctor" in finding.cause


@pytest.mark.parametrize("case", ["few", "one match", "short prompts", "no blocks announced", "gone", "other model"])
def test_what_may_be_in_order_is_no_finding(case: str) -> None:
    """Few requests, a match, prompts below a block, pods that have said nothing yet."""
    agreement = Agreement()
    scored(
        agreement, LEAST_REQUESTS - 1 if case == "few" else LEAST_REQUESTS, blocks=0 if case == "short prompts" else 8
    )
    if case == "one match":
        scored(agreement, 1, longest=1)
    one = pod(
        sequence=-1 if case == "no blocks announced" else 5,
        state="gone" if case == "gone" else "live",
        model="other" if case == "other model" else "m",
    )
    assert agreement.findings([one]) == []


def test_a_match_is_forgotten_after_the_window() -> None:
    """What broke an hour after the start is found as well."""
    agreement = Agreement()
    scored(agreement, 1, longest=3)
    scored(agreement, WINDOW_REQUESTS)
    assert kinds(agreement.findings([pod()])) == [("m", "no-match")]


@pytest.mark.parametrize(
    ("predicted", "cached", "expected"),
    [
        (0, 80, [("a", "engine-finds-more")]),
        (80, 0, [("a", "engine-finds-less")]),
        (80, 80, []),
        (80, 60, []),
        (0, 0, []),
        (80, -1, []),
    ],
)
def test_an_engine_that_says_otherwise_is_named(predicted: int, cached: int, expected: list[tuple[str, str]]) -> None:
    """Next to nothing against surely something, over many requests; a difference of some blocks is none."""
    agreement = Agreement()
    for _ in range(LEAST_REQUESTS):
        agreement.served("a", 100, predicted, cached)
    assert kinds(agreement.findings([pod()])) == expected
    assert agreement.findings([pod("b")]) == []  # a pod that is gone is forgotten
    assert agreement.findings([pod()]) == []


class Counting:
    """A pod whose engine counts prompt tokens looked up and found, and a judge that hears of both."""

    def __init__(self) -> None:
        self.agreement = Agreement()
        self.counts = [7_000.0, 3_000.0]
        self.sent(1, 0, 0)  # what was there before is taken from the first look on

    def sent(self, requests: int, predicted: int, found: int, *, asked: int = 100) -> list[tuple[str, str]]:
        """Send prompts of 100 tokens, let the engine count, and return what is found then."""
        for _ in range(requests):
            self.agreement.sent("a", 100, predicted)
        self.counts = [self.counts[0] + requests * asked, self.counts[1] + requests * found]
        self.agreement.measured("a", *self.counts)
        return kinds(self.agreement.findings([pod()]))


@pytest.mark.parametrize(
    ("predicted", "found", "expected"),
    [(0, 80, [("a", "engine-finds-more")]), (80, 0, [("a", "engine-finds-less")]), (80, 70, []), (0, 0, [])],
)
def test_an_engine_that_counts_otherwise_is_named(predicted: int, found: int, expected: list[tuple[str, str]]) -> None:
    """Its own counts stand for the answers that do not tell; once they agree the finding goes."""
    engine = Counting()
    assert engine.sent(LEAST_REQUESTS - 1, predicted, found) == []
    assert engine.sent(1, predicted, found) == expected
    assert engine.sent(LEAST_REQUESTS, 80, 80) == []


def test_counts_that_speak_of_other_requests_are_not_compared() -> None:
    """Traffic past the picker, an engine that was started anew, answers that tell, and a pod that is gone."""
    engine = Counting()
    assert engine.sent(WINDOW_REQUESTS, 0, 80, asked=200) == []
    assert engine.sent(LEAST_REQUESTS - 1, 0, 80) == []
    assert engine.sent(1, 0, 80) == [("a", "engine-finds-more")]
    assert engine.sent(WINDOW_REQUESTS, 0, 80, asked=40) == []
    engine.counts = [0.0, 0.0]
    assert engine.sent(LEAST_REQUESTS, 0, 80) == []
    assert engine.sent(LEAST_REQUESTS, 0, 80) == [("a", "engine-finds-more")]
    engine.agreement.served("a", 100, 80, 80)
    assert engine.sent(0, 0, 0) == []
    assert engine.agreement.findings([pod("b")]) == []
    engine.agreement.measured("unheard", 1.0, 1.0)


def test_disagreements_are_told_by_pods_records() -> None:
    """Decisions on the log, and what the bridge reads off the engine's page."""
    told = Disagreements()
    record = pod()
    for count in (0.0, 5_000.0):
        told.look([msgspec.structs.replace(record, load={ASKED: count, FOUND: count / 2, "running": 1.0})])
        for number in range(LEAST_REQUESTS if not count else 0):
            told.decided(DecisionRecord(request_id=f"r{number}", pod="a", prompt_tokens=100, predicted_tokens=0))
    labels = {"subject": "a", "finding": "engine-finds-more"}
    assert REGISTRY.get_sample_value("kvatlas_scorer_disagreements", labels) == LEAST_REQUESTS
    told.look([])


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=300))
def test_an_engine_that_keeps_its_word_is_never_blamed(requests: list[tuple[int, float]]) -> None:
    """Whatever the prompts are: equal predictions and hits are no finding."""
    agreement = Agreement()
    for tokens, share in requests:
        agreement.served("a", tokens, int(tokens * share), int(tokens * share))
    assert agreement.findings([pod()]) == []


def test_names_from_requests_do_not_fill_the_memory() -> None:
    """A thousand models that nobody serves are forgotten at the next look."""
    agreement = Agreement()
    for number in range(5000):
        agreement.scored(f"model-{number}", 1, 0)
    assert agreement.findings([pod()]) == []
    scored(agreement, LEAST_REQUESTS)
    assert kinds(agreement.findings([pod()])) == [("m", "no-match")]
