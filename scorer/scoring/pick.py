"""Pick: cached share of the prompt combined with load. Pure.

``total = w_cache * cached share - sum over load terms (w_term * term relative to the busiest candidate)``, where the
cached share is the pod's score over that of a pod with the whole prompt, whatever the strategy.
Ties go by the tie-break. A pod whose reported load is stale counts as the busiest of the others: it may be so busy
that it does not answer. One that never reported any counts as idle.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import xxhash

from kvatlas.bridge.model.loads import CACHE_USAGE, RUNNING, WAITING, fresh_load
from kvatlas.bridge.model.records import LIVE, PodRecord
from kvatlas.scorer.errors import InputError, NotReadyError
from kvatlas.scorer.scoring.answers import Scored

CACHE: Final = "cache"
LOAD_TERMS: Final = (WAITING, RUNNING, CACHE_USAGE)
_TIE: Final = 1e-9
#: Of terms whose weight the caller does not give: the cache counts as much as all load together.
_WEIGHTS: Final = {CACHE: 1.0, WAITING: 0.5, RUNNING: 0.25, CACHE_USAGE: 0.25}


class PickQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller says beside the prompt.

    Attributes:
        model: model name, for the refusal.
        request_id: decides ties by hash.
        load: pod id -> load term -> value; pods that are not in it count with what they report.
        weights: term -> weight, in place of the setting.
        tie_break: ``random``, ``least_loaded`` or ``hash``; empty takes the setting.
    """

    model: str
    request_id: str = ""
    load: Mapping[str, Mapping[str, float]] = {}
    weights: Mapping[str, float] = {}
    tie_break: str = ""


class PodTotal(NamedTuple):
    """A pod that could be chosen: its total, the terms that add up to it, and its match."""

    pod: str
    total: float
    terms: dict[str, float]
    matched_tokens: int


class PodChoice(NamedTuple):
    """The pod chosen, all candidates with it first, and why, for people."""

    pod: str
    candidates: list[PodTotal]
    reason: str


def choose(
    query: PickQuery,
    scored: Scored,
    pods: Sequence[PodRecord],
    *,
    full: float,
    now_ns: int,
    draw: Callable[[int], int] = random.randrange,
) -> PodChoice:
    """Choose a pod.

    Args:
        query: loads, weights and tie-break of the caller.
        scored: scores of the prompt.
        pods: pods that may be chosen.
        now_ns: wall clock in ns, for the age of loads.
        full: score of a pod that holds the whole prompt, by the strategy that made the scores.
        draw: random number below its argument, for ties.

    Raises:
        InputError: a weight or tie-break that does not exist, or a weight or load that is no finite number.
        NotReadyError: there is no pod to choose.
    """
    weights = _weights(query.weights)
    tie_break = query.tie_break or "least_loaded"
    if tie_break not in ("random", "least_loaded", "hash"):
        raise InputError(f"tie_break: {tie_break!r} is not one of random, least_loaded, hash")
    live = [record for record in pods if record.state == LIVE] or list(pods)
    if not live:
        raise NotReadyError(f"no pod serves model {query.model!r}")
    told = {record.pod: _load(query, record, now_ns) for record in live}
    most = {term: max((load[term] for load in told.values() if load is not None), default=0.0) for term in LOAD_TERMS}
    loads = {pod: most if load is None else load for pod, load in told.items()}
    candidates = []
    for record in live:
        entry = scored.scores.get(record.pod)
        terms = {CACHE: weights[CACHE] * (min(entry.score / full, 1.0) if entry and full > 0 else 0.0)}
        for term in LOAD_TERMS:
            share = loads[record.pod][term] if term == CACHE_USAGE else _share(loads[record.pod][term], most[term])
            terms[term] = -weights[term] * share
        candidates.append(PodTotal(record.pod, sum(terms.values()), terms, entry.matched_tokens if entry else 0))
    candidates.sort(key=lambda candidate: (-candidate.total, candidate.pod))
    tied = [c for c in candidates if candidates[0].total - c.total <= _TIE]
    winner = tied[_break(tie_break, tied, loads, query.request_id, draw)]
    candidates.remove(winner)
    candidates.insert(0, winner)
    return PodChoice(
        winner.pod,
        candidates,
        _reason(winner, scored.prompt_tokens, told[winner.pod], len(candidates))
        + (f", by {tie_break} among {len(tied)} equal ones" if len(tied) > 1 else ""),
    )


def _weights(given: Mapping[str, float]) -> dict[str, float]:
    weights = dict(_WEIGHTS)
    for term, weight in given.items():
        if term not in weights:
            raise InputError(f"weights: {term!r} is not one of {', '.join(weights)}")
        if not math.isfinite(weight):
            raise InputError(f"weights: {term} is {weight}; a finite number is wanted")
        weights[term] = weight
    return weights


def _load(query: PickQuery, record: PodRecord, now_ns: int) -> dict[str, float] | None:
    """Return a pod's load, None for one that is stale."""
    if (given := query.load.get(record.pod)) is not None:
        load = {term: float(given.get(term, 0.0)) for term in LOAD_TERMS}
        if wrong := [term for term, value in load.items() if not math.isfinite(value)]:
            raise InputError(f"load of {record.pod!r}: {wrong[0]} is {load[wrong[0]]}; a finite number is wanted")
    elif (reported := fresh_load(record, now_ns)) is not None:
        load = {term: reported.get(term, 0.0) for term in LOAD_TERMS}
    else:
        return None
    return {term: max(value, 0.0) if math.isfinite(value) else 0.0 for term, value in load.items()}


def _share(value: float, most: float) -> float:
    return value / most if most > 0 else 0.0


def _break(
    how: str,
    tied: Sequence[PodTotal],
    loads: Mapping[str, Mapping[str, float]],
    request_id: str,
    draw: Callable[[int], int],
) -> int:
    if len(tied) == 1:
        return 0
    if how == "hash":
        return xxhash.xxh3_64_intdigest(request_id.encode()) % len(tied)
    if how == "least_loaded":
        busy = [loads[c.pod][WAITING] + loads[c.pod][RUNNING] for c in tied]
        least = [number for number, value in enumerate(busy) if value == min(busy)]
        return least[draw(len(least))]
    return draw(len(tied))


def _reason(winner: PodTotal, tokens: int, load: Mapping[str, float] | None, candidates: int) -> str:
    said = "a stale load" if load is None else f"{load[WAITING]:g} waiting and {load[RUNNING]:g} running"
    cached = f"{winner.matched_tokens} of {tokens} tokens cached"
    return f"{winner.pod} has {cached}, {said}; highest total of {candidates} pods"
