"""The operations over HTTP/JSON, for people with curl: ``POST /v1/score`` with the JSON form of ``ScoreRequest``.

===================================  =================================================
``POST /v1/score``                   ``Score``
``POST /v1/score_batch``             ``ScoreBatch``
``POST /v1/pick``                    ``Pick``
``POST /v1/explain``                 ``Explain``
``POST /v1/report_decision``         ``ReportDecision``
``GET /v1/pods?model=&all=``         ``ListPods``
``GET /v1/pods/watch``               ``WatchPods``, with the same query; one JSON object a line
``POST /v1/score/ENGINE_PATH``       ``Score`` of the very body that the client would send to the engine
``POST /v1/tokenize/ENGINE_PATH``    its token ids: ``{"tokens": [...], "count": N, "text": "..."}``
===================================  =================================================

``ENGINE_PATH`` is ``completions``, ``chat/completions``, ``responses``, ``messages`` or ``generate``. A body with
several prompts is answered with ``{"responses": [...]}``.

Field names of our own messages are those of the proto file; unknown ones are an error. Errors are
``{"error": ..., "code": ...}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web
from google.protobuf.json_format import MessageToDict

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.scorer.api import http_runner
from kvatlas.scorer.api.bodies import HttpBody, Inflight
from kvatlas.scorer.api.calls import Calls
from kvatlas.scorer.api.status import ROLE_OF, code_of, http_status, retry_headers
from kvatlas.scorer.tokenization.requests import SHAPES
from kvatlas.scorer.v1 import scorer_pb2 as pb

if TYPE_CHECKING:
    from kvatlas.scorer.api.tracing import Tracing

#: Requests that run when the server stops get so long to end, on every front.
STOP_GRACE_SECONDS: Final = 2.0

_POSTS: Final = {
    "score": "Score",
    "score_batch": "ScoreBatch",
    "pick": "Pick",
    "explain": "Explain",
    "report_decision": "ReportDecision",
}
#: What aiohttp tells of broken requests: one line each, without a traceback.
_SERVER_LOG: Final = logging.getLogger("kvatlas.scorer.http")

#: Messages up to this size are put into JSON at once: less than a few milliseconds of the event loop.
_AT_ONCE_BYTES: Final = 64 * 1024

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: Messages, and what JSON they become.
_Answer = tuple[Sequence[Any], Callable[[Sequence[Any]], Any]]


class HttpFront:
    """A small aiohttp server over the calls."""

    def __init__(self, calls: Calls, inflight: Inflight, tracing: Tracing | None = None) -> None:
        self._calls = calls
        self._settings = calls.settings
        self._inflight = inflight
        self._tracing = tracing
        self._runner: web.AppRunner | None = None
        self._showing = asyncio.Lock()

    async def start(self) -> str:
        """Bind and serve; returns ``host:port``.

        Raises:
            SettingsError: the address cannot be bound, or a certificate cannot be read.
        """
        app = web.Application()
        for path, name in _POSTS.items():
            app.router.add_post(f"/v1/{path}", self._posted(path, name))
        for shape in SHAPES:
            app.router.add_post(f"/v1/score/{shape}", self._engine_body(f"score/{shape}", "Score", shape))
            app.router.add_post(f"/v1/tokenize/{shape}", self._engine_body(f"tokenize/{shape}", "Tokenize", shape))
        app.router.add_get("/v1/pods", self._pods)
        app.router.add_get("/v1/pods/watch", self._watch)
        self._runner = await http_runner.started(app, _SERVER_LOG, STOP_GRACE_SECONDS)
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

    def _posted(self, path: str, name: str) -> _Handler:
        async def answer(request: web.Request, body: HttpBody) -> _Answer:
            found = await self._calls.call(name, _metadata(request), body.read, "json", self._deadline)
            return (found,), lambda one: _fields(one[0])

        return self._handler(path, name, answer)

    def _engine_body(self, path: str, name: str, shape: str) -> _Handler:
        def shown(found: Sequence[Any]) -> Any:
            made = [_fields(one) if name == "Score" else _tokens(one) for one in found]
            return made[0] if len(made) == 1 else {"responses": made}

        async def answer(request: web.Request, body: HttpBody) -> _Answer:
            return await self._calls.body(name, _metadata(request), body.read, shape, self._deadline), shown

        return self._handler(path, name, answer)

    def _handler(self, path: str, name: str, answer: Callable[[web.Request, HttpBody], Awaitable[_Answer]]) -> _Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            # Before the body, which most of a refusal's cost would be.
            if (refused := self._calls.refusal(name)) is not None:
                return _failed(refused)
            try:
                most = self._settings.max_message_bytes
                with HttpBody(request, most, self._inflight, " (max_message_bytes)") as body:
                    return await self._shown(*await answer(request, body))
            except KvatlasError as error:
                return _failed(error)

        return handle if self._tracing is None else self._tracing.http(f"/v1/{path}", handle)

    async def _shown(self, messages: Sequence[Any], shown: Callable[[Sequence[Any]], Any]) -> web.Response:
        """Return messages as JSON; what is large is made on a thread, one at a time: it takes seconds of Python."""
        if sum(message.ByteSize() for message in messages) <= _AT_ONCE_BYTES:
            return web.json_response(shown(messages))
        async with self._showing:
            return await asyncio.to_thread(lambda: web.json_response(shown(messages)))

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.deadline_ms / 1e3

    async def _pods(self, request: web.Request) -> web.StreamResponse:
        calls = self._calls

        async def listed(_caller: Any) -> Any:
            return calls.core.list_pods(calls.listing(_query(request)))

        try:
            return web.json_response(
                _fields(await calls.guarded("ListPods", ROLE_OF["ListPods"], _metadata(request), listed))
            )
        except KvatlasError as error:
            return _failed(error)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        calls = self._calls
        try:
            calls.guard.admit(_metadata(request), ROLE_OF["WatchPods"])
            wanted = calls.listing(_query(request))
            async with calls.core.watchers.turn():
                answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
                await answer.prepare(request)
                async with contextlib.aclosing(calls.core.watch_pods(wanted)) as infos:
                    async for info in infos:
                        await answer.write(json.dumps(_fields(info)).encode() + b"\n")
                return answer
        except KvatlasError as error:
            return _failed(error)


def _metadata(request: web.Request) -> list[tuple[str, str]]:
    return [("authorization", request.headers.get("Authorization", ""))]


def _query(request: web.Request) -> pb.ListPodsRequest:
    query = request.query
    return pb.ListPodsRequest(model=query.get("model", ""), all=query.get("all", "") in ("1", "true"))


def _fields(message: Any) -> dict[str, Any]:
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def _tokens(message: pb.Tokenized) -> dict[str, Any]:
    return {"tokens": list(message.tokens), "count": message.count, "text": message.text}


def _failed(error: KvatlasError) -> web.Response:
    told = {"error": str(error), "code": code_of(error).name}
    return web.json_response(told, status=http_status(error), headers=retry_headers(error))
