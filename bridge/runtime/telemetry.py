"""What every service tells its operator over HTTP: Prometheus metrics, health and readiness.

One small HTTP server with three pages: ``/metrics`` (Prometheus text), ``/healthz`` (the process answers), ``/readyz``
(200 once every registered check passes, else 503 with the reasons; either way with the restarts of the process).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.numbers import port_of
from kvatlas.bridge.runtime.restarts import Restarts, RestartsCollector
from kvatlas.bridge.runtime.unfinished import Unfinished

Check = Callable[[], str | None]

#: A connection has its whole request and its answer within so long, or is closed.
_REQUEST_SECONDS: Final = 5.0
_REQUEST_BYTES: Final = 8192
#: Open connections: with more the oldest is closed, so that nobody takes the files that the service needs.
_MOST_CONNECTIONS: Final = 128
_TEXT: Final = "text/plain; charset=utf-8"
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Too Large",
    503: "Unavailable",
}


class Telemetry:
    """The HTTP side of one service.

    Whoever asks holds up neither the service nor others who ask: the metrics' page is made family by family, between
    the service's own work, once for all who wait for it.

    Attributes:
        port: the port that is bound, 0 before :meth:`start` and when switched off.
    """

    def __init__(self, listen: str, *, registry: CollectorRegistry = REGISTRY) -> None:
        """Describe the server.

        Args:
            listen: ``host:port``; port 0 takes a free one; empty text switches the server off.
            registry: where ``/metrics`` reads from.

        Raises:
            SettingsError: ``listen`` is not ``host:port``.
        """
        self.port = 0
        self._host, self._wanted = _split(listen) if listen else ("", -1)
        self._registry = registry
        self._checks: dict[str, Check] = {}
        self._restarts = Restarts()
        self._server: asyncio.Server | None = None
        self._open = Unfinished(_MOST_CONNECTIONS, _REQUEST_SECONDS)
        self._next_page: asyncio.Task[bytes] | None = None
        self._making = asyncio.Lock()

    @property
    def address(self) -> str:
        """The bound ``host:port``, empty when the server is off."""
        return f"{self._host}:{self.port}" if self.port else ""

    @property
    def unfinished(self) -> int:
        """Open connections."""
        return len(self._open)

    def add_check(self, name: str, check: Check) -> None:
        """Register a readiness check: it returns None when ready, else why not."""
        self._checks[name] = check

    def tell_restarts(self, restarts: Restarts) -> None:
        """Show how often the process was started again; to be called once."""
        self._restarts = restarts
        self._registry.register(RestartsCollector(restarts))

    def unready(self) -> dict[str, str]:
        """Return the checks that do not pass, with their reasons."""
        return {name: why for name, check in self._checks.items() if (why := check()) is not None}

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            SettingsError: the address cannot be bound.
        """
        if self._wanted < 0 or self._server is not None:
            return
        try:
            self._server = await asyncio.start_server(
                self._serve, self._host, self._wanted, limit=_REQUEST_BYTES, reuse_address=True
            )
        except OSError as error:
            raise SettingsError(f"cannot listen on {self._host}:{self._wanted} for metrics: {error}") from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop serving and drop open connections."""
        if self._server is None:
            return
        self._server.close()
        self._open.end_all()
        if self._next_page is not None:
            self._next_page.cancel()
        await self._server.wait_closed()
        self._server = None
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        transport = writer.transport
        self._open.begin(writer, transport.abort)
        try:
            transport.set_write_buffer_limits(0)  # so that an answer counts as unfinished until it was read
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                answer = await self._answer(head)
            except asyncio.LimitOverrunError:
                answer = _response(431, f"a request's head has at most {_REQUEST_BYTES} bytes\n")
            writer.write(answer)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # a probe that went away or never spoke HTTP
        finally:
            self._open.done(writer)
            with contextlib.suppress(ConnectionError):
                writer.close()

    async def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split()
        if len(words) != 3:
            return _response(400, "not an HTTP request\n")
        if words[0] not in (b"GET", b"HEAD"):
            return _response(405, "only GET and HEAD\n")
        only_head = words[0] == b"HEAD"
        page = words[1].split(b"?", 1)[0]
        if page == b"/metrics":
            return _response(200, await self._metrics(), CONTENT_TYPE_LATEST, only_head=only_head)
        if page == b"/healthz":
            return _response(200, "ok\n", only_head=only_head)
        if page == b"/readyz":
            missing = self.unready()
            text = "".join(f"{name}: {why}\n" for name, why in missing.items()) or "ready\n"
            if (note := self._restarts.note()) is not None:
                text += f"restarts: {note}\n"
            return _response(503 if missing else 200, text, only_head=only_head)
        return _response(404, "pages: /metrics /healthz /readyz\n", only_head=only_head)

    async def _metrics(self) -> bytes:
        """Return the page as of now, or a little later: whoever asks while one is made gets the next."""
        if self._next_page is None:
            self._next_page = asyncio.create_task(self._make())
        return await asyncio.shield(self._next_page)

    async def _make(self) -> bytes:
        loop = asyncio.get_running_loop()
        async with self._making:
            self._next_page = None
            began = loop.time()
            page = bytearray()
            for family in self._registry.collect():
                page += generate_latest(_Alone(family))
                await asyncio.sleep(0)
            # Of the service's time, pages that are asked for without end take half at most.
            await asyncio.sleep(loop.time() - began)
        return bytes(page)


class _Alone:
    """One family of metrics, as what Prometheus' writer takes."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        """Return it."""
        return (self._family,)


def _response(status: int, body: str | bytes, kind: str = _TEXT, *, only_head: bool = False) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if only_head else data)


def _split(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or (number := port_of(port)) is None:
        raise SettingsError(f"listen address {listen!r}: expected host:port")
    return host.strip("[]") or "0.0.0.0", number  # noqa: S104 - an empty host asks for every interface
