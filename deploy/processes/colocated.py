"""A worker and a scorer in one process: ``kvatlas worker --with-scorer``.

The scorer reads the worker's tables directly, so that a score of what is here needs no other process; partitions that
are elsewhere are asked for over gRPC, as every scorer does. Both share one event loop: a score waits for at most one
slice of a flush, and a flush for at most one score. So slices are kept short here, about a millisecond each.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.lookups.local import LocalTables
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.service import WorkerService

_SLICE_UPDATES: Final = 128


class ScoringWorker:
    """A worker and a scorer over its tables, started and stopped together; lives as a :class:`WorkerService` does.

    Attributes:
        ready: set once the worker's partitions are restored and scores can be asked for.
        worker: the worker.
    """

    def __init__(
        self, settings: WorkerSettings, kafka: KafkaSettings, scorer: ScorerSettings, tokenizer: TokenizerSettings
    ) -> None:
        """Describe both; nothing is opened yet.

        Raises:
            SettingsError: the worker's role leaves no index to score from, or the scorer's settings are wrong.
        """
        if settings.role == "resolve":
            raise SettingsError("[worker] role resolve keeps no index to score from: take index or all, or no scorer")
        self.ready = asyncio.Event()
        self.worker = WorkerService(settings, kafka, slice_updates=_SLICE_UPDATES)
        self._scorer = ScorerService(
            scorer,
            kafka,
            tokenizer=tokenizer,
            local=LocalTables(
                self.worker.index_state,
                lambda: self.worker.partition_count,
                lambda: self.worker.worker_id,
                settings.index_version,
            ),
        )
        self._starting: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port of the lookup service once started."""
        return self.worker.address

    @property
    def scorer_address(self) -> str:
        """host:port of the scorer's gRPC server once started."""
        return self._scorer.address

    @property
    def scorer(self) -> ScorerService:
        """The scorer, for use in process."""
        return self._scorer

    @property
    def core(self) -> Core:
        """The scorer's operations, for use in process."""
        return self._scorer.core

    async def start(self) -> None:
        """Start both; returns before they are ready, see :attr:`ready`.

        Raises:
            TopicsError: topics are missing or disagree.
            StoreError: the state folder cannot be used.
            SettingsError: the worker's address cannot be bound.
        """
        await self.worker.start()
        self.worker.add_check("scores", self._scorer.unready)
        self._starting = asyncio.create_task(self._start_scorer())

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on the worker's ``/metrics`` and ``/readyz`` how often this process was started again."""
        self.worker.tell_restarts(restarts)

    async def _start_scorer(self) -> None:
        await self._scorer.start()
        await self.worker.ready.wait()
        await self._scorer.ready.wait()
        tune_interpreter()
        self.ready.set()

    async def run_until(self, stop: asyncio.Event) -> None:
        """Run until ``stop`` is set.

        Raises:
            SettingsError: the scorer's address cannot be bound or a file of its settings cannot be read.
            LogError: the scorer cannot read its topics.
            BaseException: whatever else ended one of the two.
        """
        assert self._starting is not None
        running = [asyncio.create_task(one.run_until(stop)) for one in (self.worker, self._scorer)]
        try:
            await asyncio.wait({*running, self._starting}, return_when=asyncio.FIRST_COMPLETED)
            if self._starting.done():
                self._starting.result()
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in running:
                if task.done():
                    task.result()
        finally:
            for task in running:
                task.cancel()

    async def stop(self) -> None:
        """Stop: the scorer first, while the tables that it reads are open, then the worker."""
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._starting
            await self._scorer.stop()
        await self.worker.stop()
