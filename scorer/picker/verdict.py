"""Was a decision right: the engine's cached tokens beside those predicted, and why they differ. Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

EXACT: Final = "exact"
OVER: Final = "over"
UNDER: Final = "under"
UNKNOWN: Final = "unknown"

#: Why prediction and engine differ, in the order in which they are looked for.
CAUSES: Final = (
    "degraded",  # the prompt was not scored: load alone decided
    "elsewhere",  # another pod answered than the one picked
    "partial",  # the index did not answer for some blocks
    "tokenizer",  # the engine counts other prompt tokens than we made
    "restarted",  # the pod began a new epoch meanwhile
    "speculative",  # blocks that only decisions vouched for were not there
    "suspect",  # blocks seen before an unrepaired gap were not there
    "evicted",  # blocks went between the decision and the request's turn
    "stored",  # blocks came between the decision and the request's turn
)


class Prediction(NamedTuple):
    """What a decision predicted, and what was already doubtful then.

    Attributes:
        address, pod: what was picked.
        prompt_tokens, cached_tokens: of the prompt, and those expected to be found there.
        speculative_tokens, suspect_tokens: those of the latter that only decisions vouched for, or that may be gone.
        degraded: why the prompt was not scored, empty when it was.
        partial: the index did not answer for some blocks.
        best_other_tokens: cost of the best other pod, in tokens; -1 for none.
        waiting_tokens: what the chosen pod's queue and decoding cost, in tokens.
    """

    address: str
    pod: str
    prompt_tokens: int
    cached_tokens: int
    speculative_tokens: int = 0
    suspect_tokens: int = 0
    degraded: str = ""
    partial: bool = False
    best_other_tokens: float = -1.0
    waiting_tokens: float = 0.0


class PredictionVerdict(NamedTuple):
    """The outcome.

    Attributes:
        kind: ``exact``, ``over`` (predicted more than there was), ``under``, ``unknown`` (the engine did not say).
        cause: one of :data:`CAUSES`, empty when exact or unknown.
        regret_tokens: how much less the best other pod would have cost, 0 when this was the best.
    """

    kind: str
    cause: str
    regret_tokens: float


def judge(
    prediction: Prediction, *, cached_tokens: int, prompt_tokens: int, served: str, restarted: bool = False
) -> PredictionVerdict:
    """Compare a prediction with the engine's word.

    Args:
        prediction: of the decision.
        cached_tokens: the engine's, -1 where it does not say.
        prompt_tokens: the same.
        served: address that answered, empty when it is not known.
        restarted: whether the picked pod has begun a new epoch since.
    """
    if cached_tokens < 0:
        return PredictionVerdict(UNKNOWN, "", 0.0)
    regret = 0.0
    if prediction.best_other_tokens >= 0:
        cost = prediction.prompt_tokens - cached_tokens + prediction.waiting_tokens
        regret = max(0.0, cost - prediction.best_other_tokens)
    difference = prediction.cached_tokens - cached_tokens
    if not difference:
        return PredictionVerdict(EXACT, "", regret)
    kind = OVER if difference > 0 else UNDER
    return PredictionVerdict(kind, _cause(prediction, difference, prompt_tokens, served, restarted=restarted), regret)


def _cause(prediction: Prediction, difference: int, prompt_tokens: int, served: str, *, restarted: bool) -> str:
    found = "suspect" if prediction.suspect_tokens else "evicted"
    if prediction.degraded:
        found = "degraded"
    elif served and served != prediction.address:
        found = "elsewhere"
    elif prompt_tokens >= 0 and prompt_tokens != prediction.prompt_tokens:
        found = "tokenizer"
    elif difference < 0:
        found = "partial" if prediction.partial else "stored"
    elif restarted:
        found = "restarted"
    elif prediction.speculative_tokens and difference <= prediction.speculative_tokens:
        found = "speculative"
    return found
