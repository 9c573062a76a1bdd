"""HTTP server of the console: the page, and its data as JSON.

Read-only. Every answer of ``/api`` needs the token where there is one; the page itself holds nothing but code. Scores
and explanations are asked of the scorer with the reader's own scorer token where one is given (header
``x-scorer-token``), so that roles and tenants are the scorer's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any, Final

import grpc
import msgspec
from aiohttp import web
from google.protobuf.json_format import MessageToDict

from kvatlas.bridge.errors import KvatlasError, LogError, SettingsError
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.console.decisions import DecisionLog, prefixes, what_if
from kvatlas.deploy.console.options import ConsoleSettings
from kvatlas.deploy.console.past import Past
from kvatlas.deploy.history.ask import Question
from kvatlas.deploy.history.watch import Picture, Watch
from kvatlas.scorer.client import ScorerClient, score_request
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.v1 import scorer_pb2 as pb

_BODY_BYTES: Final = 8 * 1024 * 1024
_LOOK_SECONDS: Final = 1.0
_ROWS: Final = 500
_CLIENTS: Final = 16
_POLICIES: Final = 8
_TYPES: Final = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

_STATUS: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Console:
    """The page's server.

    Args:
        settings: where to listen, what to keep.
        kafka: how to reach the log.
        past: questions to the log.
        connect: makes a scorer client with a token; empty for the console's own.
        token: what a reader must say; empty lets everyone in.
    """

    def __init__(
        self,
        settings: ConsoleSettings,
        kafka: KafkaSettings,
        past: Past,
        connect: Callable[[str], ScorerClient],
        token: str,
    ) -> None:
        self.decisions = DecisionLog(settings.decisions)
        self._settings = settings
        self._past = past
        self._connect = connect
        self._token = token
        self._watch = Watch(kafka, settings.metrics)
        self._follower = TopicFollower(kafka, topics.DECISIONS, self.decisions.apply, client_id="kvatlas-console")
        self._clients: dict[str, ScorerClient] = {}
        self._looking = asyncio.Lock()
        self._picture: tuple[float, Picture | None] = (0.0, None)
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Read what is there and listen; returns the page's address.

        Raises:
            LogError: Kafka does not answer, or topics are missing.
            SettingsError: the address cannot be bound.
        """
        await self._watch.__aenter__()
        self._follower.start()
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/", self._static)
        app.router.add_get("/{name:[a-z]+\\.(?:js|css|svg)}", self._static)
        app.router.add_get("/api/picture", self._get_picture)
        app.router.add_get("/api/decisions", self._get_decisions)
        app.router.add_get("/api/prefixes", self._get_prefixes)
        app.router.add_get("/api/timeline", self._get_timeline)
        app.router.add_get("/api/dead-letters", self._get_dead_letters)
        app.router.add_post("/api/ask", self._post_ask)
        app.router.add_post("/api/what-if", self._post_what_if)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        host, _, port = self._settings.listen.rpartition(":")
        try:
            await web.TCPSite(self._runner, host.strip("[]"), int(port)).start()
        except (OSError, ValueError, OverflowError) as error:
            raise SettingsError(f"console.listen {self._settings.listen!r} cannot be bound: {error}") from error
        bound = self._runner.addresses[0]
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        return f"http://{shown}:{bound[1]}"

    async def stop(self) -> None:
        """Stop listening and reading."""
        if self._runner is not None:
            await self._runner.cleanup()
        await self._follower.stop()
        await self._watch.__aexit__()
        for client in self._clients.values():
            client.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Ask for the token, put the headers of safety on every answer, and make errors JSON."""
        try:
            if request.path.startswith("/api/"):
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self._token and not hmac.compare_digest(given.encode(), self._token.encode()):
                    return _error(401, "the token is missing or wrong")
            answer = await handler(request)
        except web.HTTPException as error:
            answer = _error(error.status, error.reason or "refused")
        except (SettingsError, ValueError) as error:
            answer = _error(400, str(error))
        except ClientError as error:
            answer = _error(_status_of(error), str(error))
        except LogError as error:
            answer = _error(503, str(error))
        except KvatlasError as error:
            answer = _error(500, str(error))
        answer.headers.update(_HEADERS)
        return answer

    async def _static(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", "index.html")
        file = resources.files("kvatlas.deploy.console").joinpath("static", name)
        if not file.is_file():
            raise web.HTTPNotFound
        return web.Response(body=file.read_bytes(), content_type=_TYPES[name.rpartition(".")[2]], charset="utf-8")

    async def picture(self) -> Picture:
        """Return the fleet and the workers, looked at most once a second however many ask."""
        async with self._looking:
            looked, picture = self._picture
            if picture is None or time.monotonic() - looked >= _LOOK_SECONDS:
                picture = await self._watch.look()
                self._picture = (time.monotonic(), picture)
            return picture

    async def _get_picture(self, _request: web.Request) -> web.Response:
        picture = await self.picture()
        return web.Response(body=msgspec.json.encode(picture), content_type="application/json")

    async def _get_decisions(self, request: web.Request) -> web.Response:
        after = _number(request, "after", 0)
        rows = [request.row() for request in self.decisions.after(after, _ROWS)]
        return web.json_response({"rows": rows, "unreadable": self.decisions.unreadable})

    async def _get_prefixes(self, request: web.Request) -> web.Response:
        minutes = _number(request, "minutes", 15)
        since = time.time_ns() - minutes * 60 * 1_000_000_000
        requests = list(self.decisions.since(since))
        tree, looked = await asyncio.to_thread(prefixes, requests, request.query.get("model", ""))
        return web.Response(
            body=msgspec.json.encode({"tree": tree, "requests": looked, "minutes": minutes}),
            content_type="application/json",
        )

    async def _get_timeline(self, request: web.Request) -> web.Response:
        pod = request.query.get("pod", "")
        if not pod:
            raise SettingsError("pod is missing")
        return web.json_response({"marks": await self._past.timeline(pod, request.query.get("since", "-1h"))})

    async def _get_dead_letters(self, request: web.Request) -> web.Response:
        return web.json_response({"letters": await self._past.dead_letters(request.query.get("since", "-1h"))})

    async def _post_ask(self, request: web.Request) -> web.Response:
        body = await _object(request)
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise SettingsError("model is missing")
        client = self._client(request.headers.get("x-scorer-token", ""))
        if body.get("at"):
            if not isinstance(body.get("tokens"), list):
                raise SettingsError("a past moment is asked with tokens: ids, as the tokenizer of the model makes them")
            question = msgspec.convert(
                {name: body[name] for name in ("tokens", "lora", "cache_salt") if body.get(name)}, Question
            )
            return web.json_response(await self._past.ask(str(body["at"]), model, question))
        asked = _asked(model, body)
        score = await asyncio.to_thread(client.call, "Score", asked)
        explained = None
        with contextlib.suppress(ClientError):  # without the role `explain` the scores stand alone
            explained = await asyncio.to_thread(client.call, "Explain", asked)
        return web.json_response({"score": _plain(score), "explain": None if explained is None else _plain(explained)})

    async def _post_what_if(self, request: web.Request) -> web.Response:
        body = await _object(request)
        policies = body.get("policies")
        if (
            not isinstance(policies, list)
            or not 0 < len(policies) <= _POLICIES
            or not all(isinstance(p, str) for p in policies)
        ):
            raise SettingsError(f"policies: a list of one to {_POLICIES} names, as `kvatlas whatif` takes them")
        blocks = body.get("blocks", 2048)
        if not isinstance(blocks, int) or not 0 < blocks <= 10_000_000:
            raise SettingsError("blocks: how many blocks a pod's cache has")
        minutes = body.get("minutes", 60)
        if not isinstance(minutes, int) or not 0 < minutes <= 100_000:
            raise SettingsError("minutes: how far back the requests go")
        requests = list(self.decisions.since(time.time_ns() - minutes * 60 * 1_000_000_000))
        rows = await asyncio.to_thread(what_if, requests, policies, blocks)
        return web.json_response({"rows": rows})

    def _client(self, token: str) -> ScorerClient:
        if token not in self._clients:
            if len(self._clients) >= _CLIENTS:
                self._clients.pop(next(iter(self._clients))).close()
            self._clients[token] = self._connect(token)
        return self._clients[token]


def _asked(model: str, body: dict[str, Any]) -> pb.ScoreRequest:
    fields = {
        name: body[name] for name in ("tokens", "prompt", "messages", "tools", "lora", "cache_salt") if body.get(name)
    }
    if not {"tokens", "prompt", "messages"} & set(fields):
        raise SettingsError("one of prompt, messages and tokens is needed")
    try:
        return score_request(model, **fields)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise SettingsError(f"this is no prompt: {error}") from error


def _plain(message: Any) -> Any:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, "")
    if text and not (text.isdecimal() and len(text) < 16):
        raise SettingsError(f"{name}: {text[:40]!r} is no number")
    return int(text) if text else default


async def _object(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise SettingsError("the body is no JSON object")
    return body


def _status_of(error: ClientError) -> int:
    cause = error.__cause__
    return _STATUS.get(cause.code(), 502) if isinstance(cause, grpc.Call) else 502


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status, headers=_HEADERS)
