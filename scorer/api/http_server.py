"""The operations over HTTP/JSON, for people with curl: ``POST /v1/score`` with the JSON form of ``ScoreRequest``.

===============================  =================================================
``POST /v1/score``               ``Score``
``POST /v1/score_batch``         ``ScoreBatch``
``POST /v1/pick``                ``Pick``
``POST /v1/explain``             ``Explain``
``POST /v1/report_decision``     ``ReportDecision``
``GET /v1/pods?model=&all=``     ``ListPods``
``GET /v1/pods/watch``           ``WatchPods``, with the same query; one JSON object a line
===============================  =================================================

Field names are those of the proto file; unknown ones are an error. Errors are ``{"error": ..., "code": ...}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from google.protobuf.json_format import MessageToDict, Parse, ParseError

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.scorer.api import metrics
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.api.security import Guard
from kvatlas.scorer.api.status import ROLE_OF, code_of
from kvatlas.scorer.errors import AuthError, ForbiddenError, InputError, TooLargeError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

if TYPE_CHECKING:
    from kvatlas.scorer.api.tracing import Tracing

_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class HttpFront:
    """A small aiohttp server over a core."""

    def __init__(self, core: Core, settings: ScorerSettings, guard: Guard, tracing: Tracing | None = None) -> None:
        self._core = core
        self._settings = settings
        self._guard = guard
        self._tracing = tracing
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Bind and serve; returns ``host:port``.

        Raises:
            SettingsError: the address cannot be bound, or a certificate cannot be read.
        """
        app = web.Application(client_max_size=self._settings.max_message_bytes)
        core = self._core
        posts: dict[str, tuple[str, Any, Callable[[Any, float], Awaitable[Any]]]] = {
            "score": ("Score", pb.ScoreRequest, core.score),
            "score_batch": ("ScoreBatch", pb.ScoreBatchRequest, core.score_batch),
            "pick": ("Pick", pb.PickRequest, core.pick),
            "explain": ("Explain", pb.ScoreRequest, core.explain),
            "report_decision": ("ReportDecision", pb.ReportDecisionRequest, core.report),
        }
        for path, (name, kind, work) in posts.items():
            app.router.add_post(f"/v1/{path}", self._handler(path, name, kind, work))
        app.router.add_get("/v1/pods", self._pods)
        app.router.add_get("/v1/pods/watch", self._watch)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=self._settings.stop_grace_seconds
        )
        await self._runner.setup()
        host, _, port = self._settings.http_listen.rpartition(":")
        try:
            site = web.TCPSite(self._runner, host or None, int(port), ssl_context=self._tls())
            await site.start()
        except (OSError, ValueError) as error:
            raise SettingsError(f"[scorer] http_listen {self._settings.http_listen!r}: {error}") from error
        bound = self._runner.addresses[0]
        return f"{host or '127.0.0.1'}:{bound[1]}"

    def _tls(self) -> ssl.SSLContext | None:
        settings = self._settings
        if not settings.tls_certfile:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(settings.tls_certfile, settings.tls_keyfile)
        if settings.tls_client_cafile:
            context.load_verify_locations(settings.tls_client_cafile)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def stop(self) -> None:
        """Stop serving."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _handler(
        self, path: str, name: str, kind: Any, work: Callable[[Any, float], Awaitable[Any]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            began, code = time.perf_counter(), "UNKNOWN"
            try:
                caller = self._guard.admit(_metadata(request), ROLE_OF[name])
                message = _parse(await _body(request, self._settings.max_message_bytes), kind)
                caller.check(message, self._core.salt_of)
                with self._core.gate:
                    answer = await work(message, time.monotonic() + self._settings.deadline_ms / 1e3)
                code = "OK"
                return _json(answer)
            except KvatlasError as error:
                code = code_of(error).name
                return _failed(error)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            finally:
                metrics.REQUESTS.labels(name, code).inc()
                metrics.SECONDS.labels(name).observe(time.perf_counter() - began)

        return handle if self._tracing is None else self._tracing.http(f"/v1/{path}", handle)

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        try:
            self._guard.admit(_metadata(request), ROLE_OF["ListPods"])
        except (AuthError, ForbiddenError) as error:
            return _failed(error)
        return _json(self._core.list_pods(_query(request)))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        try:
            self._guard.admit(_metadata(request), ROLE_OF["WatchPods"])
            with self._core.watchers:
                answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
                await answer.prepare(request)
                async with contextlib.aclosing(self._core.watch_pods(_query(request))) as infos:
                    async for info in infos:
                        await answer.write(json.dumps(_fields(info)).encode() + b"\n")
                return answer
        except KvatlasError as error:
            return _failed(error)


def _metadata(request: web.Request) -> list[tuple[str, str]]:
    return [("authorization", request.headers.get("Authorization", ""))]


async def _body(request: web.Request, limit: int) -> str:
    try:
        return (await request.read()).decode()
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLargeError(f"body: at most {limit} bytes (max_message_bytes)") from error
    except UnicodeDecodeError as error:
        raise InputError(f"body: not UTF-8 at byte {error.start}") from error


def _parse(text: str, kind: Any) -> Any:
    try:
        return Parse(text, kind())
    except (ParseError, RecursionError) as error:
        raise InputError(f"body: {error}") from error


def _query(request: web.Request) -> pb.ListPodsRequest:
    query = request.query
    return pb.ListPodsRequest(model=query.get("model", ""), all=query.get("all", "") in ("1", "true"))


def _fields(message: Any) -> dict[str, Any]:
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def _json(message: Any) -> web.Response:
    return web.json_response(_fields(message))


def _failed(error: KvatlasError) -> web.Response:
    code = code_of(error).name
    status = 413 if isinstance(error, TooLargeError) else _STATUS.get(code, 500)
    return web.json_response({"error": str(error), "code": code}, status=status)
