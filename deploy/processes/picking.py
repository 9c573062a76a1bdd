"""A picker beside the scorer that it asks, in one process: ``kvatlas picker``, or any of them ``--with-picker``.

The picker listens first and stays when the other part cannot: while Kafka or the workers are away requests go by load
alone. Stopping goes the other way round: the gateway is answered to the end of the drain.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import msgspec

from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.processes.colocated import ScoringWorker
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.service import PickerService
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.scorer.tokenization.options import TokenizerSettings

#: A picker is useful without an index, so it waits for Kafka as long as it takes.
_FOR_EVER_SECONDS: Final = 1e9


class WithPicker:
    """A picker and the part that it asks, started and stopped together.

    Args:
        settings: of the picker.
        scorer: the scorer in this process.
        part: what is started and stopped; the scorer itself, or the worker around it.

    Attributes:
        ready: set once the picker can pick; the index may still be missing.
        picker: the picker.
    """

    def __init__(self, settings: PickerSettings, scorer: ScorerService, part: Any) -> None:
        self.picker = PickerService(settings, scorer)
        self.ready = self.picker.ready
        self._part = part
        self._starting: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """host:port of the picker's server once started."""
        return self.picker.address

    async def start(self) -> None:
        """Start both; the other part in the background.

        Raises:
            SettingsError: the picker's address cannot be bound, or its settings are no good.
        """
        await self.picker.start()
        self._starting = asyncio.create_task(self._part.start())

    async def run_until(self, stop: asyncio.Event) -> None:
        """Run until ``stop`` is set.

        Raises:
            KvatlasError: the other part cannot start, for a reason that time does not heal.
            BaseException: whatever else ended one of the two.
        """
        running = [asyncio.create_task(one) for one in (self.picker.run_until(stop), self._run_part(stop))]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in running:
                if task.done():
                    task.result()
        finally:
            for task in running:
                task.cancel()

    async def _run_part(self, stop: asyncio.Event) -> None:
        """Run the other part once it has started; a stop does not wait for that."""
        assert self._starting is not None
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({stopping, self._starting}, return_when=asyncio.FIRST_COMPLETED)
            if self._starting.done():
                self._starting.result()
                await self._part.run_until(stop)
        finally:
            stopping.cancel()

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on the picker's ``/metrics`` and ``/readyz`` how often this process was started again."""
        self.picker.tell_restarts(restarts)

    async def stop(self) -> None:
        """Drain the picker, then stop the other part."""
        await self.picker.stop()
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._starting
            await self._part.stop()


class ScorerWithPicker(WithPicker):
    """A picker with a scorer of its own.

    Args:
        settings: of the picker.
        kafka: how to reach Kafka.
        scorer: settings of the scorer inside.
        tokenizer: where tokenizers come from.
        serve: the scorer opens its own addresses too.
    """

    def __init__(
        self,
        settings: PickerSettings,
        kafka: KafkaSettings,
        scorer: ScorerSettings,
        tokenizer: TokenizerSettings,
        *,
        serve: bool = False,
    ) -> None:
        if not serve:
            scorer = msgspec.structs.replace(scorer, telemetry_listen="")
        self._inner = ScorerService(scorer, kafka, tokenizer=tokenizer, serve=serve, start_seconds=_FOR_EVER_SECONDS)
        super().__init__(settings, self._inner, self._inner)

    @property
    def scorer_address(self) -> str:
        """host:port of the scorer's server, empty where it has none."""
        return self._inner.address

    @property
    def telemetry_address(self) -> str:
        """host:port of the picker's metrics, empty where there are none."""
        return self.picker.telemetry_address


class WorkerWithPicker(WithPicker):
    """A picker inside a worker that scores; addressed and ready as the worker is.

    Args:
        settings: of the picker.
        worker: with its scorer.
    """

    def __init__(self, settings: PickerSettings, worker: ScoringWorker) -> None:
        super().__init__(settings, worker.scorer, worker)
        self.ready = worker.ready
        self._worker = worker

    @property
    def address(self) -> str:
        """host:port of the worker's lookup service once started."""
        return self._worker.address

    @property
    def scorer_address(self) -> str:
        """host:port of the scorer's server once started."""
        return self._worker.scorer_address

    @property
    def picker_address(self) -> str:
        """host:port of the picker's server once started."""
        return self.picker.address
