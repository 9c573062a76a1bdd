"""The decision about one request, within a deadline, whatever fails: with the prompt, else by load alone.

A request is decided in steps, each of which may fail without failing the next: read the body, tokenize and score the
prompt, choose by cost. What was missing is said in metrics and in the decision's record.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Final, NamedTuple

from kvatlas.bridge.model.pod_ids import rank_of
from kvatlas.bridge.runtime.logs import whereabouts
from kvatlas.scorer.gateway import metrics
from kvatlas.scorer.gateway.body import with_source
from kvatlas.scorer.gateway.look import UNREADABLE, Known, Looker
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.outcome import ResponseWatch
from kvatlas.scorer.gateway.prefixes import Prefixes, Prompt
from kvatlas.scorer.gateway.state import OpenDecision, PickerState
from kvatlas.scorer.picker import names
from kvatlas.scorer.picker.affinity import sessions_of
from kvatlas.scorer.picker.choose import Ask, Candidate, Choice, Chooser, eligible
from kvatlas.scorer.picker.endpoints import BOTH, DECODE, PREFILL, Endpoint
from kvatlas.scorer.picker.load import Load, saturation
from kvatlas.scorer.picker.roles import PeerSource, is_split, source_of
from kvatlas.scorer.picker.route import Decision, Destination, Incoming, Refusal
from kvatlas.scorer.picker.verdict import Prediction

log = logging.getLogger(__name__)

_ANSWERING: Final = (BOTH, DECODE)
_COMPUTING: Final = (PREFILL,)


class _Case(NamedTuple):
    """One request under decision."""

    incoming: Incoming
    known: Known
    ask: Ask
    session: str
    now: float


class Made(NamedTuple):
    """A decision about a prompt, for whoever records it."""

    request_id: str
    endpoint: Endpoint
    prompt: Prompt | None
    model: str
    prediction: Prediction
    compute_tokens: float
    session: str
    policy: str


#: Records a decision; returns the epoch of the picked pod, 0 where it is not known.
RecordDecision = Callable[[Made], int]


class PickerDecider:
    """Decides requests for the external processor.

    Args:
        settings: of the picker.
        state: endpoints, load, sessions.
        prefixes: answers who holds a prompt; None decides by load alone.
        report: told of each decision, to record and share it.
        outcome: makes what watches a response, by request id.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: PickerSettings,
        state: PickerState,
        prefixes: Prefixes | None,
        *,
        report: RecordDecision = lambda _made: 0,
        outcome: Callable[[str], ResponseWatch],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._state = state
        self._looker = Looker(prefixes, settings.deadline_ms / 1e3)
        self._report = report
        self._outcome = outcome
        self._clock = clock
        self._chooser = Chooser(settings.weights(), settings.rules())
        self._role_rules = settings.role_rules()
        self._named = settings.rules().fallbacks + 1

    def exchange(self, request_id: str) -> ResponseWatch:
        """Return what watches a request's response."""
        return self._outcome(request_id)

    async def decide(self, incoming: Incoming) -> Decision:
        """Decide a request; a fault of ours leaves the choice to the gateway."""
        began = self._clock()
        try:
            decision = await self._decide(incoming)
        except Exception as error:  # noqa: BLE001 - whatever it is, the request must go on
            log.error("a decision failed; the gateway chooses: %s", whereabouts(error))
            metrics.DEGRADED.labels("fault").inc()
            metrics.DECISIONS.labels("passed", "fault").inc()
            decision = Destination(())
        metrics.SECONDS.observe(self._clock() - began)
        return decision

    async def _decide(self, incoming: Incoming) -> Decision:
        known = await self._looker.look(incoming)
        if known.degraded:
            metrics.DEGRADED.labels(known.degraded).inc()
        elif known.prompt is not None and known.prompt.partial:
            metrics.DEGRADED.labels("partial").inc()
        if known.degraded == UNREADABLE and incoming.whole and self._settings.unreadable == "refuse":
            return self.refuse(400, "the request's body cannot be read as what its path takes", UNREADABLE)
        now = self._clock()
        sessions = sessions_of(incoming.headers, known.body.session if known.body is not None else "")
        ask = _ask(incoming, known, self._state.sessions.get(sessions, now) if sessions else "")
        answering = self._eligible(ask.model, _ANSWERING, incoming.subset)
        if self._sheds(incoming, answering, now):
            return self.refuse(
                429, "the endpoints are full, and this request may wait; try again", "rejected-saturated"
            )
        choice = self._chooser.choose(ask, answering, self._loads(now))
        if not choice.candidates:
            return self._none(choice, ask.model)
        return self._route(_Case(incoming, known, ask, sessions[0] if sessions else "", now), choice)

    def _eligible(self, model: str, roles: tuple[str, ...], subset: frozenset[str] | None) -> list[Endpoint]:
        return eligible(self._state.endpoints, self._state.served(model), roles, subset)

    def _sheds(self, incoming: Incoming, endpoints: list[Endpoint], now: float) -> bool:
        """Whether a request is one of those that are refused first, and it has come to that."""
        if not (sheddable := self._settings.sheddable):
            return False
        objective = next((found for name in names.OBJECTIVES if (found := incoming.headers.get(name))), "")
        loads = self._loads(now)
        return objective in sheddable and saturation([loads(one.address) for one in endpoints]) >= 1.0

    def _loads(self, now: float) -> Callable[[str], Load]:
        return lambda address: self._state.loads.load(address, now)

    # --- the answer -------------------------------------------------------------------------------------------------

    def _none(self, choice: Choice, model: str) -> Refusal:
        if choice.saturated:
            text = f"all {choice.saturated} endpoints are past their limits; try again"
            return self.refuse(429, text, "rejected-saturated")
        served = any(one.ready for one in self._state.endpoints)
        if model and served and not self._eligible(model, _ANSWERING, None):
            return self.refuse(503, "no endpoint serves this model", "rejected-no-endpoints")
        return self.refuse(503, "no endpoint can serve this request", "rejected-no-endpoints")

    @staticmethod
    def refuse(status: int, text: str, reason: str) -> Refusal:
        """Return a refusal, which is counted."""
        metrics.DECISIONS.labels("refused", "none").inc()
        metrics.REFUSED.labels(reason).inc()
        return Refusal(status, text, reason)

    def _route(self, case: _Case, choice: Choice) -> Destination:
        best, known = choice.best, case.known
        request_id = case.incoming.request_id or str(uuid.uuid4())
        headers: list[tuple[str, str]] = []
        computing = best
        if known.prompt is not None and (prefill := self._prefill(case, best)) is not None:
            computing = prefill
            headers.append((names.PREFILL, prefill.endpoint.address))
        body = None
        if known.prompt is not None and (source := self._source(choice, computing)) is not None:
            address = source.endpoint.address
            headers += [(names.PEER_SOURCE, address), (names.PEER_TOKENS, str(source.tokens))]
            if self._settings.peer_port and known.body is not None and known.body.document is not None:
                host, port = address.rpartition(":")[0].strip("[]"), self._settings.peer_port
                port += rank_of(source.endpoint.pod) or 0
                body = with_source(known.body.document, host, port, request_id)
        metrics.DECISIONS.labels("routed", choice.rule).inc()
        if known.inference:
            self._note(case, choice, computing, request_id)
        addresses = tuple(one.endpoint.address for one in choice.candidates[: self._named])
        return Destination(addresses, tuple(headers), body, request_id)

    def _prefill(self, case: _Case, decode: Candidate) -> Candidate | None:
        """Return the pod that computes the prompt, None where the one that decodes does it."""
        pods = self._eligible(case.ask.model, _COMPUTING, case.incoming.subset)
        if not pods or not is_split(case.ask.prompt_tokens, decode, self._role_rules):
            return None
        choice = self._chooser.choose(case.ask, pods, self._loads(case.now))
        return choice.best if choice.candidates else None

    def _source(self, choice: Choice, computing: Candidate) -> PeerSource | None:
        others = [one for one in choice.candidates if one is not computing]
        return source_of(computing, others, self._role_rules)

    def _note(self, case: _Case, choice: Choice, computing: Candidate, request_id: str) -> None:
        """Take the decision into account, here and in what others are told."""
        best, known = choice.best, case.known
        others = [one.cost.total for one in choice.candidates[1:]]
        prediction = Prediction(
            best.endpoint.address,
            best.endpoint.pod,
            case.ask.prompt_tokens,
            best.held.tokens,
            speculative_tokens=best.held.speculative,
            suspect_tokens=best.held.suspect,
            degraded=known.degraded,
            partial=known.prompt is not None and known.prompt.partial,
            best_other_tokens=min(others) if others else -1.0,
            waiting_tokens=best.cost.total - best.cost.compute,
        )
        compute = computing.cost.compute
        rule = f"picker:{choice.rule}"
        made = Made(request_id, best.endpoint, known.prompt, case.ask.model, prediction, compute, case.session, rule)
        epoch = self._report(made)
        self._state.decided(request_id, OpenDecision(prediction, case.now, epoch), compute, case.session)


def _ask(incoming: Incoming, known: Known, sticky: str) -> Ask:
    if known.prompt is not None:
        return Ask(known.prompt.model, known.prompt.tokens, known.prompt.held, sticky)
    if known.body is not None:
        return Ask(known.body.model, known.body.tokens_estimate, {}, sticky)
    return Ask("", len(incoming.body or b"") // 4, {}, sticky)
