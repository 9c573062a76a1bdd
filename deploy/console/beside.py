"""Console beside other parts of one process (``kvatlas up --console``): an event loop of its own on a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.console.options import ConsoleSettings
from kvatlas.deploy.console.past import Past
from kvatlas.deploy.console.server import Console
from kvatlas.scorer.client import ScorerClient
from kvatlas.streams.resolve.resolver import ResolveOptions

_WAIT_SECONDS = 60.0


class ConsoleBeside:
    """A console that runs until it is stopped.

    Args:
        settings: where it listens.
        kafka: how to reach the log.
        scorer: ``host:port`` of the scorer to ask.
        options: what events mean, as the workers run.
        token: what a reader must say; empty lets everyone in.
    """

    def __init__(
        self, settings: ConsoleSettings, kafka: KafkaSettings, scorer: str, options: ResolveOptions, token: str
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="console", daemon=True)
        self._console: Console | None = None

        def connect(scorer_token: str) -> ScorerClient:
            return ScorerClient(scorer, token=scorer_token)

        self._make: Callable[[], Console] = lambda: Console(settings, kafka, Past(kafka, options), connect, token)

    def start(self) -> str:
        """Start; returns the page's address.

        Raises:
            LogError: Kafka does not answer.
            SettingsError: the address cannot be bound.
        """
        self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(_WAIT_SECONDS)

    async def _start(self) -> str:
        self._console = self._make()
        return await self._console.start()

    def stop(self) -> None:
        """Stop listening and reading, and end the thread."""
        if self._thread.is_alive():
            if self._console is not None:
                asyncio.run_coroutine_threadsafe(self._console.stop(), self._loop).result(_WAIT_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_WAIT_SECONDS)
