"""The RPCs of ``kvatlas.v1.Scorer``: limits, roles and status codes around a :class:`~kvatlas.scorer.api.core.Core`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final

import grpc

from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer.api import metrics
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.api.security import Guard
from kvatlas.scorer.api.status import ROLE_OF, code_of
from kvatlas.scorer.api.varints import score_request
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

if TYPE_CHECKING:
    from kvatlas.scorer.api.tracing import Tracing

SERVICE: Final = "kvatlas.v1.Scorer"


class ScorerFront:
    """The RPCs of ``kvatlas.v1.Scorer`` over a core: limits, roles, status codes."""

    def __init__(self, core: Core, settings: ScorerSettings, guard: Guard, tracing: Tracing | None = None) -> None:
        self._core = core
        self._settings = settings
        self._guard = guard
        self._tracing = tracing

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to add to a server."""
        core = self._core
        unary: dict[str, tuple[Any, Any]] = {
            "Score": (core.score, score_request),
            "ScoreBatch": (core.score_batch, pb.ScoreBatchRequest.FromString),
            "Pick": (core.pick, pb.PickRequest.FromString),
            "Explain": (core.explain, score_request),
            "ReportDecision": (core.report, pb.ReportDecisionRequest.FromString),
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

    def _guarded(self, name: str, work: Callable[[Any, float], Any]) -> Any:
        role = ROLE_OF[name]

        async def call(request: Any, context: Any) -> Any:
            began = time.perf_counter()
            code = "UNKNOWN"
            try:
                caller = self._guard.admit(context.invocation_metadata(), role)
                caller.check(request, self._core.salt_of)
                with self._core.gate:
                    answer = await work(request, within(context, self._settings))
                code = "OK"
                return answer
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except KvatlasError as error:
                status = code_of(error)
                code = status.name
                await context.abort(status, str(error))
            finally:
                metrics.REQUESTS.labels(name, code).inc()
                metrics.SECONDS.labels(name).observe(time.perf_counter() - began)

        return call if self._tracing is None else self._tracing.grpc(SERVICE, name, call)

    async def _list(self, request: pb.ListPodsRequest, deadline: float) -> pb.ListPodsResponse:  # noqa: ARG002
        return self._core.list_pods(request)

    async def _watch(self, request: pb.ListPodsRequest, context: Any) -> AsyncIterator[pb.PodInfo]:
        try:
            self._guard.admit(context.invocation_metadata(), ROLE_OF["WatchPods"])
            with self._core.watchers:
                async with contextlib.aclosing(self._core.watch_pods(request)) as infos:
                    async for info in infos:
                        yield info
        except KvatlasError as error:
            await context.abort(code_of(error), str(error))


def within(context: Any, settings: ScorerSettings) -> float:
    """Return until when a call is to be answered, in monotonic seconds: its own deadline, else that of the settings."""
    remaining: float | None = context.time_remaining()
    if remaining is None:
        return time.monotonic() + settings.deadline_ms / 1e3
    # A part of the caller's time goes back to the answer: a partial answer in time beats none.
    return time.monotonic() + remaining - min(0.2 * remaining, 0.05)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
