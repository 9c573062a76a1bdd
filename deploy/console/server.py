"""Console service: the page, and its data as JSON, over HTTP.

Read-only. Every answer of ``/api`` needs the page's token where there is one; the page itself holds nothing but code.
Scores and explanations are asked of the scorer with the reader's own scorer token where one is given (header
``x-scorer-token``), so that roles and tenants are the scorer's.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from importlib import resources
from typing import Final

from aiohttp import web

from kvatlas.bridge.errors import KvatlasError, LogError, SettingsError
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.deploy.console.api import Api, Handler
from kvatlas.deploy.console.flow import TopicRates
from kvatlas.deploy.console.options import ConsoleSettings, ScorerAddress, is_loopback, token_of
from kvatlas.deploy.console.past import Past
from kvatlas.deploy.console.readers import NotForReaderError, Readers
from kvatlas.deploy.history.watch import Watch
from kvatlas.scorer.client import ScorerClient, channel_credentials
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve.options import resolve_options

_BODY_BYTES: Final = 8 * 1024 * 1024
#: Newest decisions kept in memory.
_DECISIONS: Final = 5_000
_CHECK_SECONDS: Final = 1.0
_TYPES: Final = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_STATUS: Final = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "RESOURCE_EXHAUSTED": 429,
}


class ConsoleService:
    """The page's server.

    Args:
        settings: where to listen, which scorer to ask, what to keep.
        kafka: how to reach the log.
        worker: as the workers run, for what events mean.
        picker: as the pickers run, for what they reckon.

    Raises:
        SettingsError: a file cannot be read, or is empty.

    Attributes:
        ready: set once it listens.
        address: ``http://host:port/`` of the page once it listens, with the token where one was made here.
    """

    def __init__(
        self, settings: ConsoleSettings, kafka: KafkaSettings, worker: WorkerSettings, picker: PickerSettings
    ) -> None:
        self.ready = asyncio.Event()
        self.address = ""
        self._settings = settings
        self._token, self._told = token_of(settings)
        self._readers = Readers(connector(settings))
        self._watch = Watch(kafka, settings.metrics)
        self._topics = TopicRates(kafka)
        past = Past(kafka, resolve_options(worker))
        self._api = Api(self._watch, past, self._readers, picker=picker, topics=self._topics, decisions=_DECISIONS)
        self._follower = TopicFollower(kafka, topics.DECISIONS, self._api.take, client_id="kvatlas-console")
        self._runner: web.AppRunner | None = None
        self._background = Background()

    async def start(self) -> None:
        """Read what is there and listen.

        Raises:
            LogError: Kafka does not answer, or topics are missing.
            SettingsError: the address cannot be bound.
        """
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/", self._static)
        app.router.add_get("/{name:[a-z]+\\.(?:js|css|svg)}", self._static)
        for method, path, handler in self._api.routes():
            app.router.add_route(method, path, handler)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await self._runner.setup()
        host, _, port = self._settings.listen.rpartition(":")
        try:
            site = web.TCPSite(self._runner, host.strip("[]"), int(port))
            await self._watch.__aenter__()
            self._follower.start()
            await site.start()
        except (OSError, ValueError, OverflowError) as error:
            raise SettingsError(f"console.listen {self._settings.listen!r} cannot be bound: {error}") from error
        self._background.start(self._look_for_the_dead(), "look for the dead")
        bound = self._runner.addresses[0]
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        self.address = f"http://{shown}:{bound[1]}/{f'#token={self._token}' if self._told else ''}"
        self.ready.set()

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set; what is not followed any more ends the service with its error."""
        await self._background.until(stop)

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on the page how often this process was started again."""
        self._api.restarts = restarts.note()

    async def _look_for_the_dead(self) -> None:
        while True:
            for error in (self._follower.failed(), self._watch.failed()):
                if error is not None:
                    self._background.fail(error)
            await asyncio.sleep(_CHECK_SECONDS)

    async def stop(self) -> None:
        """Stop listening and reading."""
        self._background.stopping()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._background.stop()
        await self._follower.stop()
        await self._watch.__aexit__()
        await self._topics.close()
        self._readers.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Ask for the token, put the headers of safety on every answer, and make errors JSON."""
        try:
            if not self._token and not is_loopback(request.host):  # a page elsewhere whose name leads here
                return _error(403, "without a token the page answers to names of this machine alone")
            if request.path.startswith("/api/"):
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if self._token and not hmac.compare_digest(given.encode(), self._token.encode()):
                    return _error(401, "the token is missing or wrong")
            answer = await handler(request)
        except web.HTTPException as error:
            answer = _error(error.status, error.reason or "refused")
        except (SettingsError, ValueError) as error:
            answer = _error(400, str(error))
        except NotForReaderError as error:
            answer = _error(403, str(error))
        except ClientError as error:
            answer = _error(_STATUS.get(error.code, 502), f"the scorer: {error}")
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


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status, headers=_HEADERS)


def connector(settings: ConsoleSettings) -> Callable[[str], ScorerClient]:
    """Return what makes a scorer client with a reader's token, or with the console's own for an empty one.

    Raises:
        SettingsError: `scorer` cannot be read, or a file that it names.
    """
    scorer = ScorerAddress.of(settings.scorer)
    credentials = None
    if scorer.tls:
        credentials = channel_credentials(scorer.ca or None, scorer.cert or None, scorer.key or None)
    return lambda token: ScorerClient(scorer.address, token=token or scorer.token, credentials=credentials)
