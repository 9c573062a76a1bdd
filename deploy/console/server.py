"""Console service: the page, and its data as JSON, over HTTP.

Read-only. Every answer of ``/api`` needs the page's token where there is one; the page itself holds nothing but code.
Scores and explanations are asked of the scorer with the reader's own scorer token where one is given (header
``x-scorer-token``), so that roles and tenants are the scorer's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import web

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.deploy.console.api import Api
from kvatlas.deploy.console.flow import TopicRates
from kvatlas.deploy.console.options import ConsoleSettings, ScorerAddress, token_of
from kvatlas.deploy.console.pages import Pages
from kvatlas.deploy.console.past import Past
from kvatlas.deploy.console.readers import Readers
from kvatlas.deploy.history.watch import Watch
from kvatlas.scorer.client import AsyncScorerClient, channel_credentials
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve.options import resolve_options

#: Newest decisions kept in memory.
_DECISIONS: Final = 5_000
_CHECK_SECONDS: Final = 1.0


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
        self._runner = await Pages(self._api, self._token).runner()
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
        await self._readers.close()


def connector(settings: ConsoleSettings) -> Callable[[], AsyncScorerClient]:
    """Return what makes a client of the scorer with the console's own token.

    Raises:
        SettingsError: `scorer` cannot be read, or a file that it names.
    """
    scorer = ScorerAddress.of(settings.scorer)
    credentials = None
    if scorer.tls:
        credentials = channel_credentials(scorer.ca or None, scorer.cert or None, scorer.key or None)
    return lambda: AsyncScorerClient(scorer.address, token=scorer.token, credentials=credentials)
