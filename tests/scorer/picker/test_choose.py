"""The choice by cost and its rules."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.scorer.picker.choose import Ask, Chooser, Rules, eligible
from kvatlas.scorer.picker.cost import CostWeights, cost_of
from kvatlas.scorer.picker.endpoints import Endpoint, Held, in_subset
from kvatlas.scorer.picker.load import Load

PODS = [Endpoint(f"10.0.0.{n}:8000", f"pod-{n}") for n in range(4)]
IDLE = Load(stale=False)


def choose(chooser: Chooser, held: dict[str, Held], loads: dict[str, Load] | None = None, **ask: object):  # type: ignore[no-untyped-def]
    found = loads or {}
    asked = Ask("m", 10_000, held, **ask)  # type: ignore[arg-type]
    return chooser.choose(asked, PODS, lambda address: found.get(address, IDLE))


def gpu(tokens: int, speculative: int = 0) -> Held:
    return Held(tokens, {"gpu": tokens}, speculative)


def test_request_goes_where_its_prefix_is() -> None:
    choice = choose(Chooser(CostWeights(), Rules()), {"pod-2": gpu(9_000), "pod-1": gpu(4_000)})
    assert [one.endpoint.pod for one in choice.candidates[:2]] == ["pod-2", "pod-1"]
    assert choice.rule == "cost"


def test_queue_outweighs_a_prefix_that_saves_less() -> None:
    busy = {PODS[2].address: Load(prefill_tokens=50_000, stale=False)}
    assert choose(Chooser(CostWeights(queue=0.2), Rules()), {"pod-2": gpu(9_000)}, busy).best.endpoint.pod != "pod-2"
    assert choose(Chooser(CostWeights(queue=0.1), Rules()), {"pod-2": gpu(9_000)}, busy).best.endpoint.pod == "pod-2"


def test_slower_tiers_count_for_less() -> None:
    held = {"pod-1": Held(9_000, {"disk": 9_000}), "pod-3": gpu(8_000)}
    assert choose(Chooser(CostWeights(), Rules()), held).best.endpoint.pod == "pod-3"


def test_hot_pod_is_left_for_the_second_best() -> None:
    loads = {PODS[2].address: Load(prefill_tokens=9_000, stale=False)}
    choice = choose(Chooser(CostWeights(queue=0.0), Rules(hot_tokens=8_000)), {"pod-2": gpu(9_000)}, loads)
    assert (choice.best.endpoint.pod != "pod-2", choice.rule) == (True, "hot")


def test_silent_pod_comes_after_all_others() -> None:
    """Its prefix does not help a request that nobody answers; alone it is still better than a refusal."""
    silent = {PODS[2].address: Load(silent=True)}
    choice = choose(Chooser(CostWeights(), Rules()), {"pod-2": gpu(9_000)}, silent)
    assert choice.rule == "silent"
    assert choice.candidates[-1].endpoint.pod == "pod-2"
    all_silent = {pod.address: Load(silent=True) for pod in PODS}
    assert choose(Chooser(CostWeights(), Rules()), {"pod-2": gpu(9_000)}, all_silent).best.endpoint.pod == "pod-2"


def test_cold_prompts_take_turns() -> None:
    chooser = Chooser(CostWeights(), Rules())
    pods = [choose(chooser, {}).best.endpoint.pod for _ in range(8)]
    assert sorted(pods[:4]) == sorted(pods[4:]) == [pod.pod for pod in PODS]
    assert pods[:4] == pods[4:]


def test_session_breaks_ties_and_no_more() -> None:
    chooser = Chooser(CostWeights(), Rules())
    assert choose(chooser, {}, sticky=PODS[3].address).best.endpoint.pod == "pod-3"
    choice = choose(chooser, {"pod-0": gpu(9_000)}, sticky=PODS[3].address)
    assert choice.best.endpoint.pod == "pod-0"


def test_burst_is_held_together_or_spread_by_rule() -> None:
    held = {"pod-1": gpu(9_984, speculative=9_984)}
    loads = {PODS[1].address: Load(prefill_tokens=90_000, stale=False)}
    assert choose(Chooser(CostWeights(), Rules(burst="hold")), held, loads).best.endpoint.pod == "pod-1"
    assert choose(Chooser(CostWeights(), Rules(burst="cost")), held, loads).best.endpoint.pod != "pod-1"
    assert choose(Chooser(CostWeights(), Rules(burst="spread")), held).rule == "cold"
    assert choose(Chooser(CostWeights(), Rules(burst="cost")), held).best.endpoint.pod == "pod-1"
    hot = Rules(burst="hold", hot_tokens=50_000)
    assert choose(Chooser(CostWeights(), hot), held, loads).best.endpoint.pod != "pod-1"


def test_all_past_their_limit_is_saturated_and_none_is_not() -> None:
    loads = {pod.address: Load(requests=9, stale=False) for pod in PODS}
    choice = choose(Chooser(CostWeights(), Rules(most_requests=9)), {}, loads)
    assert (choice.candidates, choice.saturated) == ((), 4)
    assert Chooser(CostWeights(), Rules()).choose(Ask("m", 1), [], lambda _: IDLE) == ((), "none", 0)


def test_temperature_draws_among_equals_only() -> None:
    draws = iter([0.0, 0.3, 0.6, 0.99] * 10)
    chooser = Chooser(CostWeights(), Rules(temperature_tokens=1e6), lambda: next(draws))
    held = {"pod-0": gpu(5_000), "pod-1": gpu(5_000), "pod-2": gpu(5_016)}
    choices = [choose(chooser, held) for _ in range(8)]
    assert {choice.best.endpoint.pod for choice in choices} == {"pod-0", "pod-1", "pod-2"}
    assert {choice.rule for choice in choices} == {"drawn"}


@pytest.mark.parametrize("temperature", [4.0, 16.0, 64.0])
def test_temperature_is_of_a_softmax_over_cost_in_prompt_tokens(temperature: float) -> None:
    """A pod that costs d tokens more is drawn exp(-d / temperature) times as often; one outside the band never."""
    held = {"pod-0": gpu(5_000), "pod-1": gpu(5_016), "pod-2": gpu(5_064), "pod-3": gpu(4_999)}
    draws = iter((number + 0.5) / 10_000 for number in range(10_000))
    chooser = Chooser(CostWeights(), Rules(temperature_tokens=temperature), lambda: next(draws))
    drawn = Counter(choose(chooser, held).best.endpoint.pod for _ in range(10_000))
    odds = {"pod-2": 1.0, "pod-1": math.exp(-48 / temperature), "pod-0": math.exp(-64 / temperature)}
    for pod, share in odds.items():
        assert drawn[pod] == pytest.approx(10_000 * share / sum(odds.values()), abs=2)
    assert drawn["pod-3"] == 0


def test_temperature_does_not_come_before_the_session_or_turns_of_cold_prompts() -> None:
    chooser = Chooser(CostWeights(), Rules(temperature_tokens=1e9))
    held = {pod.pod: gpu(5_000) for pod in PODS}
    assert {choose(chooser, held, sticky=PODS[3].address).best.endpoint.pod for _ in range(20)} == {"pod-3"}
    assert {choose(chooser, {}).rule for _ in range(20)} == {"cold"}


def test_without_temperature_and_at_nearly_none_the_least_cost_is_taken() -> None:
    held = {"pod-1": gpu(5_000), "pod-2": gpu(5_001)}
    for temperature, rule in ((0.0, "cost"), (5e-324, "drawn")):
        choice = choose(Chooser(CostWeights(), Rules(temperature_tokens=temperature)), held)
        assert (choice.best.endpoint.pod, choice.rule) == ("pod-2", rule)


def test_subset_matches_address_or_ip() -> None:
    assert in_subset("10.0.0.1:8000", {"10.0.0.1:8000"})
    assert in_subset("10.0.0.1:8000", {"10.0.0.1"})
    assert not in_subset("10.0.0.1:8000", {"10.0.0.1:8001", "10.0.0.2"})
    assert in_subset("[fd00::1]:8000", {"fd00::1"})
    assert eligible(PODS, "m", ("both",), set()) == []
    assert eligible(PODS, "m", ("both",), {"10.0.0.3"}) == [PODS[3]]
    assert eligible([PODS[0]._replace(ready=False), PODS[1]._replace(model="n")], "m", ("both",), None) == []


HELD = st.builds(
    lambda gpu, cpu, spec: Held(gpu + cpu, {"gpu": gpu, "cpu": cpu}, min(spec, gpu)),
    st.integers(0, 8_000),
    st.integers(0, 8_000),
    st.integers(0, 8_000),
)
LOAD = st.builds(
    Load, st.floats(0, 1e6), st.floats(0, 500), st.floats(0, 100), st.floats(0, 1), st.booleans(), st.booleans()
)


@given(st.integers(1, 20_000), HELD, LOAD)
def test_cost_is_never_negative_and_never_less_for_more_load(prompt: int, held: Held, load: Load) -> None:
    cost = cost_of(prompt, held, load, CostWeights())
    more = cost_of(
        prompt, held, load._replace(prefill_tokens=load.prefill_tokens + 1, requests=load.requests + 1), CostWeights()
    )
    assert 0 <= cost.total <= more.total
    assert cost.compute <= max(prompt, held.tokens)


@given(
    st.dictionaries(st.sampled_from([pod.pod for pod in PODS]), HELD),
    st.lists(LOAD, min_size=4, max_size=4),
    st.sampled_from(["cost", "hold", "spread"]),
    st.floats(0, 2),
)
def test_choice_names_each_endpoint_once_and_stays_near_the_least_cost(
    held: dict[str, Held], loads: list[Load], burst: str, temperature: float
) -> None:
    rules = Rules(burst=burst, temperature_tokens=temperature, most_usage=1.0)
    by_address = dict(zip((pod.address for pod in PODS), loads, strict=True))
    choice = Chooser(CostWeights(), rules, lambda: 0.5).choose(Ask("m", 9_000, held), PODS, by_address.__getitem__)
    free = [pod for pod in PODS if not (by_address[pod.address].usage >= 1.0 and by_address[pod.address].waiting > 0)]
    assert sorted(one.endpoint for one in choice.candidates) == sorted(free)
    if free and burst != "hold":
        heard = [one for one in choice.candidates if not one.load.silent] or choice.candidates
        least = min(one.cost.total for one in heard)
        assert choice.best.cost.total <= least + rules.near_tokens
