"""The RPCs of ``kvatlas.v1.Scorer`` over :class:`~kvatlas.scorer.api.calls.Calls`.

Messages arrive as bytes: what is large is counted against the limit of bytes in flight and read beside the event loop,
and bytes that are no message are the caller's error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.runtime.rpc import pushback
from kvatlas.scorer.api.bodies import Inflight
from kvatlas.scorer.api.calls import MESSAGE_OF, Calls
from kvatlas.scorer.api.status import ROLE_OF, code_of
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

if TYPE_CHECKING:
    from kvatlas.scorer.api.tracing import Tracing

SERVICE: Final = "kvatlas.v1.Scorer"

#: Of a caller's time goes back to its answer: so many seconds, or this share where it is less.
_ANSWER_SECONDS: Final = 0.05
_ANSWER_SHARE: Final = 0.2
#: gRPC's clients round the time that they tell up to two or three digits: they may be over sooner than they say.
_ROUNDED: Final = 0.01


class ScorerFront:
    """The RPCs of ``kvatlas.v1.Scorer``: deadlines and status codes of gRPC."""

    def __init__(self, calls: Calls, inflight: Inflight, tracing: Tracing | None = None) -> None:
        self._calls = calls
        self._inflight = inflight
        self._tracing = tracing

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the methods to a server."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(self._unary(name), response_serializer=_serialize)
            for name in MESSAGE_OF
        }
        methods["WatchPods"] = grpc.unary_stream_rpc_method_handler(self._watch, response_serializer=_serialize)
        server.add_registered_method_handlers(SERVICE, methods)

    def _unary(self, name: str) -> Callable[[bytes, Any], Any]:
        async def call(data: bytes, context: Any) -> Any:
            async def given() -> bytes:
                return data

            try:
                with self._inflight.held(len(data)):
                    return await self._calls.call(
                        name,
                        context.invocation_metadata(),
                        given,
                        "binary",
                        lambda: within(context, self._calls.settings),
                    )
            except KvatlasError as error:
                await context.abort(code_of(error), str(error), pushback(error))

        return call if self._tracing is None else self._tracing.grpc(SERVICE, name, call)

    async def _watch(self, data: bytes, context: Any) -> AsyncIterator[pb.PodInfo]:
        calls = self._calls
        try:
            calls.guard.admit(context.invocation_metadata(), ROLE_OF["WatchPods"])
            request = calls.listing(await calls.core.intake.message("ListPodsRequest", data, "binary"))
            async with calls.core.watchers.turn(), contextlib.aclosing(calls.core.watch_pods(request)) as infos:
                async for info in infos:
                    yield info
        except KvatlasError as error:
            await context.abort(code_of(error), str(error), pushback(error))


def within(context: Any, settings: ScorerSettings) -> float:
    """Return until when a call is to be answered, in monotonic seconds: its own deadline, else that of the settings."""
    remaining: float | None = context.time_remaining()
    if remaining is None:
        return time.monotonic() + settings.deadline_ms / 1e3
    # A partial answer in time beats none.
    return time.monotonic() + remaining - min(_ANSWER_SHARE * remaining, _ANSWER_SECONDS + _ROUNDED * remaining)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def socket_target(path: str) -> str:
    """Return gRPC's name of a Unix socket, its folder made."""
    whole = Path(path).absolute()
    whole.parent.mkdir(parents=True, exist_ok=True)
    return f"unix:{whole}"
