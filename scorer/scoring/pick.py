"""Pick: cached share of the prompt combined with load. Pure.

``total = w_cache * cached share - sum over load terms (w_term * term relative to the busiest candidate)``, where the
cached share is the pod's score over that of a pod with the whole prompt, whatever the strategy.
Ties go by the tie-break.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import xxhash

from kvatlas.bridge.model.records import LIVE, PodRecord
from kvatlas.scorer.errors import InputError, NotReadyError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

CACHE: Final = "cache"
LOAD_TERMS: Final = ("waiting", "running", "cache_usage")
_TIE: Final = 1e-9


def choose(
    request: pb.PickRequest,
    scored: pb.ScoreResponse,
    pods: Sequence[PodRecord],
    settings: ScorerSettings,
    *,
    full: float,
    draw: Callable[[int], int] = random.randrange,
) -> pb.PickResponse:
    """Choose a pod.

    Args:
        request: loads, weights and tie-break of the caller.
        scored: scores of the prompt.
        pods: pods that may be chosen.
        settings: weights and tie-break where the caller names none.
        full: score of a pod that holds the whole prompt, by the strategy that made the scores.
        draw: random number below its argument, for ties.

    Raises:
        InputError: a weight or tie-break that does not exist, or a weight or load that is no finite number.
        NotReadyError: there is no pod to choose.
    """
    weights = _weights(request.weights, settings)
    tie_break = request.tie_break or settings.pick_tie_break
    if tie_break not in ("random", "least_loaded", "hash"):
        raise InputError(f"tie_break: {tie_break!r} is not one of random, least_loaded, hash")
    live = [record for record in pods if record.state == LIVE] or list(pods)
    if not live:
        raise NotReadyError(f"no pod serves model {request.request.model!r}")
    loads = {record.pod: _load(request, record) for record in live}
    most = {term: max(load[term] for load in loads.values()) for term in LOAD_TERMS}
    candidates = []
    for record in live:
        entry = scored.scores[record.pod] if record.pod in scored.scores else None  # noqa: SIM401 - a map field, get() copies none
        terms = {CACHE: weights[CACHE] * (min(entry.score / full, 1.0) if entry and full > 0 else 0.0)}
        for term in LOAD_TERMS:
            share = loads[record.pod][term] if term == "cache_usage" else _share(loads[record.pod][term], most[term])
            terms[term] = -weights[term] * share
        candidates.append(
            pb.Candidate(
                pod=record.pod,
                total=sum(terms.values()),
                terms=terms,
                matched_tokens=entry.matched_tokens if entry else 0,
            )
        )
    candidates.sort(key=lambda candidate: (-candidate.total, candidate.pod))
    tied = [c for c in candidates if candidates[0].total - c.total <= _TIE]
    winner = tied[_break(tie_break, tied, loads, request.request.request_id, draw)]
    candidates.remove(winner)
    candidates.insert(0, winner)
    return pb.PickResponse(
        pod=winner.pod,
        candidates=candidates,
        reason=_reason(winner, scored.prompt_tokens, loads[winner.pod], len(candidates))
        + (f", by {tie_break} among {len(tied)} equal ones" if len(tied) > 1 else ""),
        scored=scored,
    )


def _weights(given: Mapping[str, float], settings: ScorerSettings) -> dict[str, float]:
    weights = {
        CACHE: settings.pick_weight_cache,
        "waiting": settings.pick_weight_waiting,
        "running": settings.pick_weight_running,
        "cache_usage": settings.pick_weight_cache_usage,
    }
    for term, weight in given.items():
        if term not in weights:
            raise InputError(f"weights: {term!r} is not one of {', '.join(weights)}")
        if not math.isfinite(weight):
            raise InputError(f"weights: {term} is {weight}; a finite number is wanted")
        weights[term] = weight
    return weights


def _load(request: pb.PickRequest, record: PodRecord) -> dict[str, float]:
    if record.pod in request.load:
        given = request.load[record.pod]
        load = {term: float(getattr(given, term)) for term in LOAD_TERMS}
        if wrong := [term for term, value in load.items() if not math.isfinite(value)]:
            raise InputError(f"load of {record.pod!r}: {wrong[0]} is {load[wrong[0]]}; a finite number is wanted")
    else:
        load = {term: record.load.get(term, 0.0) for term in LOAD_TERMS}
    return {term: max(value, 0.0) if math.isfinite(value) else 0.0 for term, value in load.items()}


def _share(value: float, most: float) -> float:
    return value / most if most > 0 else 0.0


def _break(
    how: str,
    tied: Sequence[pb.Candidate],
    loads: Mapping[str, Mapping[str, float]],
    request_id: str,
    draw: Callable[[int], int],
) -> int:
    if len(tied) == 1:
        return 0
    if how == "hash":
        return xxhash.xxh3_64_intdigest(request_id.encode()) % len(tied)
    if how == "least_loaded":
        busy = [loads[c.pod]["waiting"] + loads[c.pod]["running"] for c in tied]
        least = [number for number, value in enumerate(busy) if value == min(busy)]
        return least[draw(len(least))]
    return draw(len(tied))


def _reason(winner: pb.Candidate, tokens: int, load: Mapping[str, float], candidates: int) -> str:
    return (
        f"{winner.pod} has {winner.matched_tokens} of {tokens} tokens cached, {load['waiting']:g} waiting and "
        f"{load['running']:g} running; highest total of {candidates} pods"
    )
