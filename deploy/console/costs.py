"""What a picker reckons a prompt costs at each pod, by its own chooser, from what pickers tell one another.

Load is what the pods report through the bridge, and the requests that pickers have put on ``kv-decisions``; a picker
that reads its engines' own metrics may know it fresher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kvatlas.bridge.model.records import GONE, DecisionRecord, PodRecord
from kvatlas.scorer.gateway import discovery
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.state import PickerState
from kvatlas.scorer.picker.affinity import sessions_of
from kvatlas.scorer.picker.choose import Ask, Candidate, Chooser, eligible
from kvatlas.scorer.picker.endpoints import BOTH, DECODE, Endpoint, held_of
from kvatlas.scorer.v1 import scorer_pb2 as pb


class Costs:
    """A picker's memory and chooser, that only looks.

    Args:
        settings: of the picker.
        clock: monotonic seconds.
        clock_ns: wall clock in ns.
    """

    def __init__(
        self,
        settings: PickerSettings,
        clock: Callable[[], float] = time.monotonic,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._settings = settings
        self._clock, self._clock_ns = clock, clock_ns
        self._state = PickerState(msgspec.structs.replace(settings, name="console"), clock)
        self._static = [one for text in settings.endpoints for one in discovery.parse_endpoint(text)]
        self._told: dict[str, Endpoint] = {}
        self._began_ns = clock_ns()

    def take(self, record: DecisionRecord) -> None:
        """Take a record of ``kv-decisions``; what was there before the console is load no more."""
        if record.decided_ns >= self._began_ns:
            self._state.take(record)
        if record.endpoint and record.pod and record.kind == "decision":
            self._told[record.endpoint] = Endpoint(record.endpoint, record.pod)

    def look(self, pods: Mapping[str, PodRecord]) -> None:
        """Take the pods as they are now, and the load that they report."""
        alive = {name: record for name, record in pods.items() if record.state != GONE}
        self._told = {address: one for address, one in self._told.items() if one.pod in alive}
        known = discovery.merged(
            [self._static, self._told.values(), discovery.from_pods(alive.values(), self._settings.serving_port)], alive
        )
        named = {one.pod for one in known}
        # Where nobody says where a pod serves, its own name stands for that: the cost is of the pod all the same.
        rest = [Endpoint(name, name, record.model) for name, record in alive.items() if name not in named]
        self._state.use([*known, *rest])
        self._state.take_reports(alive, self._clock_ns())
        self._state.loads.expire(self._clock())

    def of(self, model: str, scored: pb.ScoreResponse, session: str = "") -> dict[str, Any]:
        """Return the cost at each pod by its parts, the picker's first choice first, and the rule that decided.

        Args:
            model: as engines have it.
            scored: the prompt's scores, of what engines reuse (``usable_only``).
            session: of the request, as its body names it.
        """
        now = self._clock()
        held = {pod: held_of(found, scored.block_size_tokens) for pod, found in scored.scores.items()}
        sticky = self._state.sessions.get(sessions_of({}, session), now)
        endpoints = eligible(self._state.endpoints, model, (BOTH, DECODE), None)
        chooser = Chooser(self._settings.weights(), self._settings.rules(), draw=lambda: 0.0)
        choice = chooser.choose(
            Ask(model, scored.prompt_tokens, held, sticky),
            endpoints,
            lambda address: self._state.loads.load(address, now),
        )
        return {
            "rule": choice.rule,
            "saturated": choice.saturated,
            "pods": [_row(one, session=one.endpoint.address == sticky) for one in choice.candidates],
        }


def _row(one: Candidate, *, session: bool) -> dict[str, Any]:
    cost, load = one.cost, one.load
    return {
        "pod": one.endpoint.pod,
        "held_tokens": one.held.tokens,
        "compute": cost.compute,
        "queued": cost.queued,
        "decode": cost.decode,
        "full": cost.full,
        "total": cost.total,
        "session": session,
        "waiting_tokens": load.prefill_tokens,
        "requests": load.requests,
        "cache_usage": load.usage,
        "load_known": not load.stale,
    }
