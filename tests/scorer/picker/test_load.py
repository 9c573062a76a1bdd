"""Load: reports, what was given out since, and what was computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.scorer.picker.load import EngineReport, Load, LoadBook, LoadOptions

A = "10.0.0.1:8000"


def book(**options: float) -> LoadBook:
    return LoadBook(LoadOptions(tokens_per_second=1_000.0, **options))  # type: ignore[arg-type]


def test_stale_load_is_told_apart_from_none() -> None:
    loads = book(stale_seconds=2.0)
    assert loads.load(A, 0.0) == Load(stale=True)
    loads.reported(A, EngineReport(0, 0, 0.0, 1.0))
    assert loads.load(A, 2.0) == Load(0.0, 0.0, 0.0, 0.0, stale=False)
    assert loads.load(A, 3.1).stale


def test_engine_that_was_heard_and_is_no_more_is_silent() -> None:
    """Refused, asleep, or nothing for long; one that was never heard may have no metrics at all."""
    loads = book()
    loads.refused(A)
    loads.given("a", A, 1, 0.0)
    loads.refused(A)
    assert not loads.load(A, 100.0).silent
    loads.reported(A, EngineReport(0, 0, 0.0, 100.0))
    assert [loads.load(A, 100.0 + age).silent for age in (0.0, 9.0, 11.0)] == [False, False, True]
    loads.refused(A)
    assert loads.load(A, 100.1).silent
    loads.reported(A, EngineReport(0, 0, 0.0, 101.0, lasts=60.0))
    assert [loads.load(A, 101.0 + age).silent for age in (0.0, 59.0, 61.0)] == [False, False, True]
    assert not loads.load(A, 160.0).stale
    loads.reported(A, EngineReport(0, 0, 0.0, 102.0, asleep=True))
    assert loads.load(A, 102.0).silent


def test_requests_given_out_since_a_report_are_added_to_it() -> None:
    loads = book()
    loads.given("a", A, 100, 1.0)
    loads.given("b", A, 100, 2.0)
    loads.reported(A, EngineReport(3, 1, 0.5, 1.5))
    assert loads.load(A, 2.0)[1:] == (5.0, 2.0, 0.5, False, False)
    loads.reported(A, EngineReport(4, 1, 0.5, 2.5))
    assert loads.load(A, 2.6).requests == 5.0


def test_unseen_queue_shrinks_at_the_rate() -> None:
    loads = book()
    loads.given("a", A, 3_000, 0.0)
    loads.given("b", A, 1_000, 1.0)
    assert loads.load(A, 1.0).prefill_tokens == pytest.approx(3_000)
    assert loads.load(A, 5.0).prefill_tokens == 0.0


def test_first_token_says_that_all_before_it_is_computed() -> None:
    loads = book()
    for number in range(3):
        loads.given(str(number), A, 1_000, 0.1 * number)
    loads.first_token("1", 0.5)
    left = loads.load(A, 0.5).prefill_tokens
    assert left == pytest.approx(1_000)
    # Without a further sign no more than the prompt at the head of the queue can be done.
    loads.given("3", A, 500, 0.6)
    assert loads.load(A, 60.0 - 30.0).prefill_tokens == pytest.approx(500)


def test_rate_is_learned_from_first_tokens() -> None:
    loads = book()
    loads.given("0", A, 1, 0.0)
    loads.first_token("0", 0.01)
    now = 0.01
    for number in range(1, 100):
        loads.given(str(number), A, 2_000, now)
        now += 1.0
        loads.first_token(str(number), now)
    assert loads.rate(A) == pytest.approx(2_000, rel=0.05)


def test_idle_engine_clears_what_was_given_before() -> None:
    loads = book()
    loads.given("a", A, 50_000, 0.0)
    loads.reported(A, EngineReport(0, 0, 0.0, 1.0))
    assert loads.load(A, 1.0).prefill_tokens == 0.0


def test_request_whose_end_nobody_saw_is_forgotten() -> None:
    loads = book(request_seconds=10.0)
    loads.given("a", A, 100, 0.0)
    loads.expire(9.0)
    assert loads.open_requests(A) == 1
    loads.expire(10.5)
    assert loads.open_requests(A) == 0
    assert loads.address_of("a") == ""


def test_endpoint_that_is_gone_is_forgotten() -> None:
    loads = book()
    loads.given("a", A, 100, 0.0)
    loads.keep(frozenset())
    loads.ended("a")
    assert loads.load(A, 0.0) == Load(stale=True)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["given", "first", "ended", "report", "idle", "expire"]), st.integers(0, 12), st.floats(0, 3)
    ),
    max_size=60,
)


@given(STEPS)
def test_load_is_never_negative_and_bounded_by_what_was_given(steps: list[tuple[str, int, float]]) -> None:
    """However the signs come, also twice, unknown or out of order."""
    loads = book(request_seconds=20.0)
    now = 0.0
    given_out = 0.0
    for kind, number, wait in steps:
        now += wait
        name = str(number)
        if kind == "given":
            loads.given(name, A, 500, now)
            given_out += 500
        elif kind == "first":
            loads.first_token(name, now)
        elif kind == "ended":
            loads.ended(name)
        elif kind == "report":
            loads.reported(A, EngineReport(number, number, 0.5, now))
        elif kind == "idle":
            loads.reported(A, EngineReport(0, 0, 0.0, now))
        else:
            loads.expire(now)
        load = loads.load(A, now)
        assert 0 <= load.prefill_tokens <= given_out + 1e-6
        assert load.requests >= 0
        assert loads.rate(A) > 0
