"""The RPCs of ``kvatlas.v1.Scorer``: limits, roles and status codes around a :class:`~kvatlas.scorer.core.Core`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc

from kvatlas.bridge import records
from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer import errors, metrics
from kvatlas.scorer.core import Core
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.repeated import score_request
from kvatlas.scorer.security import Guard
from kvatlas.scorer.status import ROLE_OF, code_of
from kvatlas.scorer.v1 import scorer_pb2 as pb

if TYPE_CHECKING:
    from kvatlas.scorer.tracing import Tracing

SERVICE: Final = "kvatlas.v1.Scorer"


class ScorerFront:
    """The RPCs of ``kvatlas.v1.Scorer`` over a core: limits, roles, status codes."""

    def __init__(self, core: Core, settings: ScorerSettings, guard: Guard, tracing: Tracing | None = None) -> None:
        self._core = core
        self._settings = settings
        self._guard = guard
        self._tracing = tracing
        self._running = 0
        self._watchers = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to add to a server."""
        unary: dict[str, tuple[Any, Any]] = {
            "Score": (self._score, score_request),
            "ScoreBatch": (self._batch, pb.ScoreBatchRequest.FromString),
            "Pick": (self._pick, pb.PickRequest.FromString),
            "Explain": (self._explain, score_request),
            "ReportDecision": (self._report, pb.ReportDecisionRequest.FromString),
            "ListPods": (self._list, pb.ListPodsRequest.FromString),
        }
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, work),
                request_deserializer=parse,
                response_serializer=_serialize,
            )
            for name, (work, parse) in unary.items()
        }
        methods["WatchPods"] = grpc.unary_stream_rpc_method_handler(
            self._watch, request_deserializer=pb.ListPodsRequest.FromString, response_serializer=_serialize
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _guarded(self, name: str, work: Callable[[Any, float | None], Any]) -> Any:
        role = ROLE_OF[name]

        async def call(request: Any, context: Any) -> Any:
            began = time.perf_counter()
            code = "OK"
            try:
                caller = self._guard.admit(context.invocation_metadata(), role)
                caller.check(request, self._core.salt_of)
                if self._running >= self._settings.max_concurrent:
                    raise errors.BusyError(f"{self._running} requests are worked on (max_concurrent); try again")
                self._running += 1
                try:
                    remaining = context.time_remaining()
                    deadline = time.monotonic() + remaining if remaining is not None else None
                    return await work(request, deadline)
                finally:
                    self._running -= 1
            except KvatlasError as error:
                status = code_of(error)
                code = status.name
                await context.abort(status, str(error))
            finally:
                metrics.REQUESTS.labels(name, code).inc()
                metrics.SECONDS.labels(name).observe(time.perf_counter() - began)

        return call if self._tracing is None else self._tracing.grpc(SERVICE, name, call)

    async def _score(self, request: pb.ScoreRequest, deadline: float | None) -> pb.ScoreResponse:
        return await self._core.score(request, self._within(deadline))

    async def _batch(self, request: pb.ScoreBatchRequest, deadline: float | None) -> pb.ScoreBatchResponse:
        return await self._core.score_batch(request, self._within(deadline))

    async def _pick(self, request: pb.PickRequest, deadline: float | None) -> pb.PickResponse:
        return await self._core.pick(request, self._within(deadline))

    async def _explain(self, request: pb.ScoreRequest, deadline: float | None) -> pb.ExplainResponse:
        return await self._core.explain(request, self._within(deadline))

    async def _report(self, request: pb.ReportDecisionRequest, deadline: float | None) -> pb.ReportDecisionResponse:
        return await self._core.report(request, self._within(deadline))

    async def _list(self, request: pb.ListPodsRequest, deadline: float | None) -> pb.ListPodsResponse:  # noqa: ARG002
        return self._core.list_pods(request)

    def _within(self, deadline: float | None) -> float:
        own = time.monotonic() + self._settings.deadline_ms / 1e3
        # A part of the caller's time goes back to the answer: a partial answer in time beats none.
        return own if deadline is None else min(own, deadline - min(0.2 * (deadline - time.monotonic()), 0.05))

    async def _watch(self, request: pb.ListPodsRequest, context: Any) -> AsyncIterator[pb.PodInfo]:
        try:
            self._guard.admit(context.invocation_metadata(), ROLE_OF["WatchPods"])
            if self._watchers >= self._settings.max_watchers:
                raise errors.BusyError(f"{self._watchers} streams are open (max_watchers)")
        except KvatlasError as error:
            await context.abort(code_of(error), str(error))
        self._watchers += 1
        try:
            async with self._core.pods.watch() as queue:
                for info in self._core.list_pods(request).pods:
                    yield info
                while True:
                    name = await queue.get()
                    record = self._core.pods.merged.get(name or "")
                    if record is None or (request.model and record.model not in ("", request.model)):
                        continue
                    if request.all or record.state != records.GONE:
                        yield self._core.pod_info(record)
        finally:
            self._watchers -= 1


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
