"""A stand for tests of the processor: a real Envoy, pods that report what they got, a decider that tests set."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import ClientSession, ClientTimeout, web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvatlas.deploy.gateway.config import GatewayOptions, document
from kvatlas.deploy.gateway.envoy import Envoy
from kvatlas.scorer.api.extproc import SERVICE, ExternalProcessor, ProcessorOptions
from kvatlas.scorer.api.http2_server import Http2Server
from kvatlas.scorer.gateway.decider import PickerDecider
from kvatlas.scorer.picker.route import Decision, Destination, Incoming, Refusal

T = TypeVar("T")


class Seen:
    """What an exchange was told."""

    def __init__(self) -> None:
        self.status = 0
        self.kind = ""
        self.served = ""
        self.data = b""
        self.complete: bool | None = None

    def headers(self, status: int, kind: str, served: str) -> None:
        self.status, self.kind, self.served = status, kind, served

    def chunk(self, data: bytes) -> None:
        self.data += data

    def ended(self, *, complete: bool) -> None:
        self.complete = complete


class FakeDecider:
    """Decides as the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.decision: Callable[[Incoming], Decision | Awaitable[Decision]] = lambda _incoming: Destination(())
        self.asked: list[Incoming] = []
        self.exchanges: dict[str, list[Seen]] = {}

    async def decide(self, incoming: Incoming) -> Decision:
        self.asked.append(incoming)
        found = self.decision(incoming)
        return found if isinstance(found, Destination) or not isinstance(found, Awaitable) else await found

    def refuse(self, status: int, text: str, reason: str) -> Refusal:
        return PickerDecider.refuse(status, text, reason)

    def exchange(self, request_id: str) -> Seen:
        seen = Seen()
        self.exchanges.setdefault(request_id, []).append(seen)
        return seen


class Loop:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 60.0) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(90)


class Pod:
    """An HTTP server that says what reached it; ``/stream`` sends events when told to."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ""
        self.requests = 0
        self.next_event = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_route("*", "/stream", self._stream)
        app.router.add_route("*", "/{tail:.*}", self._echo)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _echo(self, request: web.Request) -> web.Response:
        self.requests += 1
        body = await request.read()
        return web.json_response(
            {
                "pod": self.name,
                "method": request.method,
                "path": request.path,
                "length": len(body),
                "digest": hashlib.sha256(body).hexdigest(),
                "headers": {key.lower(): value for key, value in request.headers.items()},
                "body": body.decode("utf-8", "replace") if len(body) < 4096 else "",
            }
        )

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(3):
            await response.write(b"data: %d\n\n" % number)
            if number == 1:
                await self.next_event.wait()
        await response.write_eof()
        return response


class Stand:
    """Two pods, a processor, and Envoys by kind."""

    def __init__(self, folder: Path) -> None:
        self.loop = Loop()
        self.decider = FakeDecider()
        self.pods = [Pod("one"), Pod("two")]
        self.pickers: dict[str, str] = {}
        self.processors: dict[str, ExternalProcessor] = {}
        self._folder = folder
        self._servers: list[Http2Server] = []
        self._session: ClientSession | None = None
        self._envoys: dict[str, Envoy] = {}
        self.loop.run(self._start())

    async def _start(self) -> None:
        for pod in self.pods:
            await pod.start()
        self._session = ClientSession(timeout=ClientTimeout(30))
        await self.serve("headers")
        await self.serve("body")

    async def serve(self, response: str) -> None:
        """Start a picker's server that reads so much of responses."""
        processor = ExternalProcessor(self.decider, ProcessorOptions(max_body_bytes=12_000_000, response=response))
        server = Http2Server(16 * 1024 * 1024)
        processor.add_to(server)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        await servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        bound = await server.listen("127.0.0.1:0")
        self.processors[response] = processor
        self._servers.append(server)
        self.pickers[response] = f"127.0.0.1:{bound}"

    def envoy(self, kind: str, response: str = "headers", **more: Any) -> Envoy:
        """Return an Envoy of a kind, started once."""
        name = f"{kind} {response} {sorted(more.items())}"
        if name not in self._envoys:
            folder = self._folder / f"envoy-{len(self._envoys)}"
            folder.mkdir()
            options = GatewayOptions(
                kind=kind,  # type: ignore[arg-type]
                pickers=[self.pickers[response]],
                pods=[pod.address for pod in self.pods],
                **more,
            )
            envoy = Envoy(document(options), folder)
            envoy.start()
            self._envoys[name] = envoy
            # Until the picker is known to be healthy, requests pass without it.
            deadline = time.monotonic() + 90
            while envoy.stats("cluster.picker.membership_healthy").get("cluster.picker.membership_healthy") != 1:
                assert time.monotonic() < deadline, "Envoy does not see the picker"
                time.sleep(0.02)
        return self._envoys[name]

    def ask(
        self, envoy: Envoy, path: str = "/v1/completions", body: bytes | None = b'{"model": "m"}', **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Send one request through an Envoy; returns status, headers and the JSON answer (text where it is none)."""

        async def send() -> tuple[int, dict[str, str], Any]:
            assert self._session is not None
            method = "GET" if body is None else "POST"
            named = {key.replace("_", "-"): value for key, value in headers.items()}
            url = f"http://{envoy.address}{path}"
            async with self._session.request(method, url, data=body, headers=named) as answer:
                data = await answer.read()
                found = {key.lower(): value for key, value in answer.headers.items()}
                if found.get("content-type", "").startswith("application/json"):
                    return answer.status, found, await answer.json()
                return answer.status, found, data.decode()

        return self.loop.run(send())

    async def session(self) -> ClientSession:
        assert self._session is not None
        return self._session

    def close(self) -> None:
        for envoy in self._envoys.values():
            envoy.stop()

        async def end() -> None:
            assert self._session is not None
            await self._session.close()
            for server in self._servers:
                await server.stop(0)
            for pod in self.pods:
                await pod.stop()

        self.loop.run(end())
        self.loop.close()
