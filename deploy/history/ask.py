"""Score and explain against a past state, in the output format of the live scorer."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import msgspec

from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.deploy.history.past import view_of
from kvatlas.deploy.history.rebuild import PastIndex
from kvatlas.scorer.scoring.query import PromptTokens, ScoreQuery
from kvatlas.scorer.scoring.scorer import Scorer
from kvatlas.scorer.scoring.strategies import Weighing


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an input file.

    Attributes:
        tokens: token ids of the prompt.
        cache_salt, lora: as the request would carry them.
        pods: pod ids to consider; empty means all.
    """

    tokens: list[Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]]
    cache_salt: str | None = None
    lora: str | None = None
    pods: list[str] = []


async def score(past: PastIndex, model: str, question: Question) -> dict[str, Any]:
    """Return the scores that the state gives, in the form of ``kvatlas score --json``."""
    scored = await _scorer(past).score(_query(model, question), math.inf)
    return {
        "scores": {
            pod: {"score": found.score, "matched_blocks": found.matched_blocks, "matched_tokens": found.matched_tokens}
            for pod, found in scored.scores.items()
        },
        "freshness": {"offsets": {str(part): offset for part, offset in sorted(past.offsets.items())}},
    }


async def explain(past: PastIndex, model: str, question: Question) -> dict[str, Any]:
    """Return who held each block as of the state, whether that counted, and why each pod's match ends where it does."""
    explained = await _scorer(past).explain(_query(model, question), math.inf)
    return {
        "blocks": [
            {"number": block.number, "key": block.key, "holders": msgspec.to_builtins(block.holders)}
            for block in explained.blocks
        ],
        "walks": explained.ends,
    }


def pods(past: PastIndex) -> list[dict[str, Any]]:
    """Return the pods' records as of the state."""
    return [msgspec.to_builtins(record, str_keys=True) for record in past.pods().values()]


def _scorer(past: PastIndex) -> Scorer:
    view = view_of(past)
    return Scorer(lambda: view, Weighing(), clock_ns=time.time_ns, timer=time.perf_counter)


def _query(model: str, question: Question) -> ScoreQuery:
    return ScoreQuery(
        model=model,
        prompt=PromptTokens(pack_tokens(question.tokens)),
        lora=question.lora or "",
        cache_salt=question.cache_salt or "",
        pods=frozenset(question.pods),
    )
