"""What a picker knows of endpoints: the addresses, their load, sessions, and decisions whose end is open."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from kvatlas.bridge.model.loads import (
    CACHE_USAGE,
    LOAD_STALE_SECONDS,
    RUNNING,
    WAITING,
    fresh_load,
    load_age_seconds,
)
from kvatlas.bridge.model.records import DecisionRecord, PodRecord
from kvatlas.bridge.model.sessions import MOST_SESSIONS, SESSIONS, is_hash
from kvatlas.scorer.gateway import metrics
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.picker.affinity import Sessions
from kvatlas.scorer.picker.endpoints import PREFILL, Endpoint
from kvatlas.scorer.picker.load import EngineReport, LoadBook
from kvatlas.scorer.picker.verdict import Prediction
from kvatlas.scorer.scoring.decisions import DECISION, SERVED

#: Decisions kept for the engine's word about them; the oldest go first.
_MOST_OPEN = 50_000


class OpenDecision(NamedTuple):
    """A decision whose request has not ended, or whose end nobody saw yet.

    Attributes:
        prediction: what was predicted.
        at: when, monotonic seconds.
        epoch: the pod's epoch then, 0 where it is not known.
    """

    prediction: Prediction
    at: float
    epoch: int = 0


class PickerState:
    """The picker's memory.

    Args:
        settings: of the picker.
        clock: monotonic seconds.

    Attributes:
        endpoints: serving addresses now.
        loads: their load.
        sessions: where conversations went.
    """

    def __init__(self, settings: PickerSettings, clock: Callable[[], float]) -> None:
        self.endpoints: Sequence[Endpoint] = ()
        self.loads = LoadBook(settings.load_options())
        self.sessions = Sessions()
        self._clock = clock
        self._own = settings.name
        self._models: frozenset[str] = frozenset()
        self._answering: Mapping[str, str] = {}
        self._open: OrderedDict[str, OpenDecision] = OrderedDict()

    def use(self, endpoints: Sequence[Endpoint]) -> None:
        """Take the serving addresses as they are now."""
        if tuple(endpoints) == tuple(self.endpoints):
            return
        self.endpoints = tuple(endpoints)
        self.loads.keep(frozenset(one.address for one in endpoints))
        self._answering = {one.pod: one.address for one in reversed(self.endpoints) if one.role != PREFILL}
        self._models = frozenset(one.model for one in endpoints)

    def served(self, model: str) -> str:
        """Return a model's name where endpoints go by it, else none: an adapter's, or one that their engines know."""
        return model if model in self._models else ""

    def decided(self, request_id: str, decision: OpenDecision, compute_tokens: float, session: str = "") -> None:
        """Take a decision into account, of this picker or another."""
        self._open[request_id] = decision
        self._open.move_to_end(request_id)
        while len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        address = decision.prediction.address
        self.loads.given(request_id, address, compute_tokens, decision.at)
        self.sessions.put(session, address, decision.at)

    def open(self, request_id: str) -> OpenDecision | None:
        """Return an open decision, None when there is none of this id."""
        return self._open.get(request_id)

    def close(self, request_id: str) -> OpenDecision | None:
        """Forget a decision whose request has ended; returns it."""
        self.loads.ended(request_id)
        return self._open.pop(request_id, None)

    def take(self, record: DecisionRecord) -> None:
        """Take a record of ``kv-decisions``: another picker's decision, the end of a request, or pods' sessions."""
        if record.scorer == self._own:
            return
        if record.kind == SERVED:
            self.close(record.request_id)
        elif record.kind == SESSIONS:
            self._take_sessions(record)
        elif record.kind == DECISION and record.endpoint:
            metrics.FOREIGN.inc()
            metrics.SHARING.observe(max(0.0, (time.time_ns() - record.decided_ns) / 1e9))
            prediction = Prediction(
                record.endpoint,
                record.pod,
                record.prompt_tokens,
                record.predicted_tokens,
                speculative_tokens=record.speculative_blocks * record.block_size_tokens,
                degraded=record.degraded,
            )
            foreign = OpenDecision(prediction, self._clock(), record.pod_epoch)
            self.decided(record.request_id, foreign, record.compute_tokens, record.session)

    def _take_sessions(self, record: DecisionRecord) -> None:
        """Note which sessions a pod's own events have named, where that is newer than what is known.

        A pod that only computes prompts does not answer the session's next request.
        """
        address = self._answering.get(record.pod)
        if address is None:
            return
        now, now_ns = self._clock(), time.time_ns()
        for session, seen_ns in islice(record.sessions.items(), MOST_SESSIONS):
            if is_hash(session):
                self.sessions.put(session, address, now - max(now_ns - seen_ns, 0) / 1e9)

    def take_reports(self, pods: Mapping[str, PodRecord], now_ns: int) -> None:
        """Use what pods report through the bridge, where it is newer than what is read of them here.

        Args:
            pods: by pod id.
            now_ns: wall clock in ns.
        """
        now = self._clock()
        for endpoint in self.endpoints:
            record = pods.get(endpoint.pod)
            if record is None or not (load := fresh_load(record, now_ns)):
                continue
            running, waiting, usage = (load.get(name, 0.0) for name in (RUNNING, WAITING, CACHE_USAGE))
            read = now - load_age_seconds(record, now_ns)
            self.loads.reported(endpoint.address, EngineReport(running, waiting, usage, read, LOAD_STALE_SECONDS))

    def measure(self) -> None:
        """Forget what is too old, and set the gauges."""
        now = self._clock()
        self.loads.expire(now)
        loads = [self.loads.load(one.address, now) for one in self.endpoints]
        ready = sum(one.ready and not load.silent for one, load in zip(self.endpoints, loads, strict=True))
        metrics.ENDPOINTS.labels("ready").set(ready)
        metrics.ENDPOINTS.labels("unready").set(len(self.endpoints) - ready)
        metrics.STALE.set(sum(load.stale for load in loads))
        metrics.QUEUED.set(sum(load.prefill_tokens for load in loads))
        metrics.IN_FLIGHT.set(sum(self.loads.open_requests(one.address) for one in self.endpoints))
