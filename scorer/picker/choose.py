"""The choice: the endpoint of least cost, by rules about ties, hot pods, cold prompts and bursts. Pure.

In order:

1. Endpoints that are not ready, serve another model or role, or are outside the subset hint do not take part.
2. Those past their limits (requests, KV cache in use) do not either; when all are, the request is refused (429). Those
   whose engine was heard and has fallen silent come after all others.
3. An endpoint whose queue is longer than the shortest one by more than the hot limit is taken only when all are:
   the second best is taken instead of a hot pod.
4. Of the rest, the least cost. Costs within ``near_tokens`` of it are equal; among equals the session's pod wins, a
   prompt that nobody holds goes to the pod that got such a prompt longest ago, and else the least cost, or above a
   temperature of 0 a draw: an endpoint that costs ``d`` tokens more than the least has ``exp(-d / temperature)`` of its
   chance.
5. A burst of one new prefix: the first request's pod is its speculative holder. ``cost`` lets the cost decide, in
   which the queue before it counts; ``hold`` keeps the burst there up to the hot limit; ``spread`` gives speculative
   blocks no credit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NamedTuple

from kvatlas.scorer.picker.cost import Cost, CostWeights, cost_of
from kvatlas.scorer.picker.endpoints import NOTHING, Endpoint, Held, in_subset
from kvatlas.scorer.picker.load import Load

BURSTS: Final = ("cost", "hold", "spread")


class Rules(NamedTuple):
    """The rules' figures.

    Attributes:
        near_tokens: costs so close are equal.
        temperature_tokens: of the draw among equals, in prompt tokens; 0 takes the least cost.
        cold_tokens: a prompt of which nobody holds more than this is cold.
        hot_tokens: a pod whose queue is longer than the shortest by more is left out; 0: never.
        burst: one of :data:`BURSTS`.
        most_requests: an endpoint with so many requests takes no more; 0: no limit.
        most_usage: an endpoint whose KV cache is in use to this share, with a queue, takes no more; 0: no limit.
        fallbacks: further endpoints named after the first.
    """

    near_tokens: float = 64.0
    temperature_tokens: float = 0.0
    cold_tokens: int = 0
    hot_tokens: float = 0.0
    burst: str = "cost"
    most_requests: int = 0
    most_usage: float = 0.0
    fallbacks: int = 2


class Ask(NamedTuple):
    """What is asked of the chooser.

    Attributes:
        model: model name; endpoints that name no model serve any.
        prompt_tokens: length of the prompt, an estimate where it was not tokenized.
        held: pod id -> what it holds; pods that hold nothing are absent.
        sticky: address of the session's pod, empty for none.
    """

    model: str
    prompt_tokens: int
    held: Mapping[str, Held] = {}
    sticky: str = ""


class Candidate(NamedTuple):
    """An endpoint with what it would cost."""

    endpoint: Endpoint
    held: Held
    load: Load
    cost: Cost


class Choice(NamedTuple):
    """The outcome.

    Attributes:
        candidates: the chosen one first, the fallbacks next, then the rest by cost; empty when none can serve.
        rule: the rule that decided: ``cost``, ``session``, ``cold``, ``drawn``, ``burst``, ``hot``, ``silent``.
        saturated: endpoints that were left out for their limits.
    """

    candidates: tuple[Candidate, ...]
    rule: str
    saturated: int

    @property
    def best(self) -> Candidate:
        """The chosen one."""
        return self.candidates[0]


def eligible(
    endpoints: Sequence[Endpoint], model: str, roles: Collection[str], subset: Collection[str] | None
) -> list[Endpoint]:
    """Return the endpoints that may serve a request."""
    return [
        one
        for one in endpoints
        if one.ready
        and one.role in roles
        and (not one.model or not model or one.model == model)
        and (subset is None or in_subset(one.address, subset))
    ]


class Chooser:
    """Chooses, and remembers who got cold prompts when.

    Args:
        weights: of the cost.
        rules: see :class:`Rules`.
        draw: a random number in [0, 1).
    """

    def __init__(self, weights: CostWeights, rules: Rules, draw: Callable[[], float] = random.random) -> None:
        self.weights = weights
        self.rules = rules
        self._draw = draw
        self._cold: dict[str, int] = {}
        self._turn = 0

    def choose(self, ask: Ask, endpoints: Sequence[Endpoint], load: Callable[[str], Load]) -> Choice:
        """Choose among endpoints that may serve; see the module's rules."""
        rules = self.rules
        candidates = [self._candidate(ask, endpoint, load(endpoint.address)) for endpoint in endpoints]
        free = [one for one in candidates if not self._past_limit(one.load)]
        saturated = len(candidates) - len(free)
        if not free:
            return Choice((), "saturated" if saturated else "none", saturated)
        cool = self._cool([one for one in free if not one.load.silent] or free)
        ordered = sorted(cool, key=lambda one: (one.cost.total, one.endpoint.address))
        cold = all(one.held.tokens <= rules.cold_tokens for one in free)
        chosen, rule = self._among(ask, ordered, cold=cold)
        if rule == "cost" and len(cool) < len(free) and (least := self._least(free)) is not chosen:
            rule = "silent" if least.load.silent else "hot"
        if cold:
            self._turn += 1
            self._cold[chosen.endpoint.address] = self._turn
        others = sorted((one for one in free if one is not chosen), key=_by_silence)
        return Choice((chosen, *others), rule, saturated)

    def _candidate(self, ask: Ask, endpoint: Endpoint, load: Load) -> Candidate:
        held = ask.held.get(endpoint.pod, NOTHING)
        if held.speculative and self.rules.burst == "spread":
            kept = held.tokens - held.speculative
            share = kept / held.tokens if held.tokens else 0.0
            tiers = {name: int(tokens * share) for name, tokens in held.tiers.items()}
            held = Held(kept, tiers, 0, min(held.suspect, kept))
        return Candidate(endpoint, held, load, cost_of(ask.prompt_tokens, held, load, self.weights))

    def _past_limit(self, load: Load) -> bool:
        rules = self.rules
        if rules.most_requests and load.requests >= rules.most_requests:
            return True
        return 0 < rules.most_usage <= load.usage and load.waiting > 0

    def _cool(self, candidates: list[Candidate]) -> list[Candidate]:
        """Leave hot pods out."""
        if not self.rules.hot_tokens:
            return candidates
        limit = min(one.load.prefill_tokens for one in candidates) + self.rules.hot_tokens
        return [one for one in candidates if one.load.prefill_tokens <= limit]

    @staticmethod
    def _least(candidates: list[Candidate]) -> Candidate:
        return min(candidates, key=lambda one: (one.cost.total, one.endpoint.address))

    def _among(self, ask: Ask, ordered: list[Candidate], *, cold: bool) -> tuple[Candidate, str]:
        rules = self.rules
        best = ordered[0]
        if rules.burst == "hold" and (held := self._burst(ordered)) is not None:
            return held, "burst"
        limit = best.cost.total + rules.near_tokens
        near = [one for one in ordered if one.cost.total <= limit]
        if len(near) == 1:
            return best, "cost"
        if ask.sticky and (mine := next((one for one in near if one.endpoint.address == ask.sticky), None)) is not None:
            return mine, "session"
        if cold:
            return min(near, key=lambda one: (self._cold.get(one.endpoint.address, 0), one.cost.total)), "cold"
        if rules.temperature_tokens > 0:
            return self._drawn(near), "drawn"
        return best, "cost"

    @staticmethod
    def _burst(ordered: list[Candidate]) -> Candidate | None:
        """Return the speculative holder of a prefix that nobody has for certain."""
        most = max(one.held.tokens for one in ordered)
        certain = max(one.held.tokens - one.held.speculative for one in ordered)
        if most <= certain:
            return None
        return next(one for one in ordered if one.held.tokens == most and one.held.speculative)

    def _drawn(self, near: list[Candidate]) -> Candidate:
        temperature, least = self.rules.temperature_tokens, near[0].cost.total
        odds = [math.exp((least - one.cost.total) / temperature) for one in near]
        left = self._draw() * sum(odds)
        for one, share in zip(near, odds, strict=True):
            left -= share
            if left < 0:
                return one
        return near[0]


def _by_silence(one: Candidate) -> tuple[bool, float]:
    return one.load.silent, one.cost.total
