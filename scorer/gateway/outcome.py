"""Watches one response: first token, usage, end; joins them with the decision and says whether it was right."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvatlas.scorer.gateway import metrics
from kvatlas.scorer.gateway.state import OpenDecision, PickerState
from kvatlas.scorer.picker.usage import Usage, UsageReader
from kvatlas.scorer.picker.verdict import UNKNOWN, PredictionVerdict, judge


class Joined(NamedTuple):
    """A decision with what came of it.

    Attributes:
        decision: as it was made.
        status: HTTP status of the response, 0 when it was not seen.
        served: address that answered, empty when it was not told.
        usage: the engine's word.
        first_token_ms: from the decision to the first token of a stream, -1 where there is none.
        verdict: prediction against the engine's word.
    """

    request_id: str
    decision: OpenDecision
    status: int
    served: str
    usage: Usage
    first_token_ms: float
    verdict: PredictionVerdict


class ResponseWatch:
    """What watches one response.

    Args:
        request_id: the decision's.
        state: of the picker.
        joined: told once the response has ended, where there was a decision and the engine said something.
        restarted: tells whether a pod has begun a new epoch since a decision.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        request_id: str,
        state: PickerState,
        joined: Callable[[Joined], None],
        *,
        restarted: Callable[[OpenDecision], bool] = lambda _decision: False,
        clock: Callable[[], float],
    ) -> None:
        self._request_id = request_id
        self._state = state
        self._joined = joined
        self._restarted = restarted
        self._clock = clock
        self._reader: UsageReader | None = None
        self._status = 0
        self._served = ""
        self._first_token_ms = -1.0

    def headers(self, status: int, kind: str, served: str) -> None:
        """Take the response's status, content type and the address that answered."""
        self._status, self._served = status, served
        self._reader = UsageReader(kind)
        decision = self._state.open(self._request_id)
        if decision is not None and served:
            picked = decision.prediction.address
            metrics.SERVED.labels("picked" if served == picked else "another").inc()

    def chunk(self, data: bytes) -> None:
        """Take a piece of the response's body."""
        reader = self._reader
        if reader is None:
            return
        begun = reader.begun
        reader.feed(data)
        if reader.begun and not begun and reader.streamed:
            now = self._clock()
            self._state.loads.first_token(self._request_id, now)
            if (decision := self._state.open(self._request_id)) is not None:
                self._first_token_ms = (now - decision.at) * 1e3

    def ended(self, *, complete: bool) -> None:
        """Take the end of what can be seen of the response."""
        usage = self._reader.close() if self._reader is not None else Usage()
        if usage == Usage():
            # A response whose end was seen, or that was cut, is over; else the picker only sees no more of it.
            if complete or self._first_token_ms >= 0 or self._status >= 400:
                self._state.loads.ended(self._request_id)
            return
        decision = self._state.close(self._request_id)
        if decision is None:
            return
        verdict = judge(
            decision.prediction,
            cached_tokens=usage.cached_tokens,
            prompt_tokens=usage.prompt_tokens,
            served=self._served,
            restarted=usage.cached_tokens >= 0 and self._restarted(decision),
        )
        self._count(decision, usage, verdict)
        self._joined(
            Joined(self._request_id, decision, self._status, self._served, usage, self._first_token_ms, verdict)
        )

    def _count(self, decision: OpenDecision, usage: Usage, verdict: PredictionVerdict) -> None:
        metrics.PREDICTIONS.labels(verdict.kind, verdict.cause).inc()
        if verdict.kind != UNKNOWN:
            metrics.PREDICTED_TOKENS.inc(decision.prediction.cached_tokens)
            metrics.CACHED_TOKENS.inc(usage.cached_tokens)
            metrics.PROMPT_TOKENS.inc(max(usage.prompt_tokens, 0))
            metrics.REGRET.observe(verdict.regret_tokens)
        if self._first_token_ms >= 0:
            share = metrics.cached_share(usage.cached_tokens, usage.prompt_tokens)
            metrics.FIRST_TOKEN.labels(share).observe(self._first_token_ms / 1e3)
