"""The least that a picker costs here: the external processor itself, with a decision that is always the same.

``python -m kvatlas.deploy.bench._floor POD`` prints its address and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvatlas.deploy.processes.main import loop_factory
from kvatlas.scorer.api.extproc import SERVICE, ExternalProcessor, ProcessorOptions
from kvatlas.scorer.api.http2_server import Http2Server
from kvatlas.scorer.picker.route import Decision, Destination, Incoming, Refusal

_MOST_BYTES: Final = 16 * 1024 * 1024


class _Unwatched:
    """Learns nothing of a response."""

    def headers(self, status: int, kind: str, served: str) -> None:
        """Nothing."""

    def chunk(self, data: bytes) -> None:
        """Nothing."""

    def ended(self, *, complete: bool) -> None:
        """Nothing."""


class _Always:
    """Decides for one pod."""

    def __init__(self, pod: str) -> None:
        self._decision = Destination((pod,))

    async def decide(self, incoming: Incoming) -> Decision:  # noqa: ARG002 - as all deciders
        """Return the pod."""
        return self._decision

    def refuse(self, status: int, text: str, reason: str) -> Refusal:
        """Return what it takes."""
        return Refusal(status, text, reason)

    def exchange(self, request_id: str) -> _Unwatched:  # noqa: ARG002 - as all deciders
        """Return what learns nothing."""
        return _Unwatched()


async def _serve(pod: str) -> None:
    server = Http2Server(_MOST_BYTES)
    ExternalProcessor(_Always(pod), ProcessorOptions(max_body_bytes=_MOST_BYTES)).add_to(server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    port = await server.listen("127.0.0.1:0")
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0.0)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(sys.argv[1]))
