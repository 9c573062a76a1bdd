"""The picker as a service: the external processor's server around a scorer in this process, endpoints and their load.

Shutdown in steps, so that no request is lost: health says NOT_SERVING while requests are still answered for
``drain_seconds``, streams that only watch a response are left between two pieces, then the server closes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvatlas.bridge.engines.engine_metrics import EngineLoad
from kvatlas.bridge.engines.scraper import LoadPage, Scraper
from kvatlas.bridge.errors import SettingsError, UnresolvedError
from kvatlas.bridge.model.pod_ids import rank_of
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.bridge.runtime.telemetry import Telemetry
from kvatlas.scorer.api.extproc import SERVICE, ExternalProcessor, ProcessorOptions
from kvatlas.scorer.api.http2_server import Http2Server
from kvatlas.scorer.gateway import discovery, metrics
from kvatlas.scorer.gateway.decider import Made, PickerDecider
from kvatlas.scorer.gateway.kubernetes_pool import PoolWatch
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.gateway.outcome import Joined, ResponseWatch
from kvatlas.scorer.gateway.prefixes import CorePrefixes, Prefixes
from kvatlas.scorer.gateway.recorder import Recorder
from kvatlas.scorer.gateway.state import OpenDecision, PickerState
from kvatlas.scorer.picker.endpoints import Endpoint
from kvatlas.scorer.picker.load import EngineReport
from kvatlas.scorer.service import ScorerService

log = logging.getLogger(__name__)

_MEASURE_SECONDS: Final = 1.0
#: So many reads of an engine's metrics may fail before what was read last is too old.
_READS_MISSED: Final = 3.0
#: Larger requests are refused (413): above what a context of a million tokens takes.
_MAX_BODY_BYTES: Final = 16 * 1024 * 1024
#: How often file and DNS are looked at; a look costs a stat or a cached query.
_DISCOVERY_SECONDS: Final = 2.0
#: Names that gateways ask the health service for; liveness says that the process answers.
_READY_NAMES: Final = ("", "readiness", SERVICE, "inference-extension")
_LIVE_NAME: Final = "liveness"


class PickerService:
    """One picker.

    Args:
        settings: of the picker.
        scorer: a scorer in this process, started and stopped by the caller; None decides by load alone.
        prefixes: answers who holds a prompt; None asks the scorer.
        clock: monotonic seconds.

    Attributes:
        ready: set once the server listens and there is an endpoint.
        address: ``host:port`` of the server, after :meth:`start`.
        state: endpoints, load, sessions.
    """

    def __init__(
        self,
        settings: PickerSettings,
        scorer: ScorerService | None,
        *,
        prefixes: Prefixes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not settings.name:
            settings = msgspec.structs.replace(settings, name=f"picker-{socket.gethostname()}-{os.getpid()}")
        self.ready = asyncio.Event()
        self.address = ""
        self.state = PickerState(settings, clock)
        self._settings = settings
        self._scorer = scorer
        self._clock = clock
        self._static = [one for text in settings.endpoints for one in discovery.parse_endpoint(text)]
        self._known_dns: dict[str, list[Endpoint]] = {}
        self._file: list[Endpoint] = []
        self._recorder = Recorder(settings, scorer)
        if prefixes is None and scorer is not None:
            prefixes = CorePrefixes(scorer.core, scorer.tokenizers)
        self.decider = PickerDecider(
            settings, self.state, prefixes, report=self._report, outcome=self._outcome, clock=clock
        )
        self.processor = ExternalProcessor(
            self.decider,
            ProcessorOptions(
                max_body_bytes=_MAX_BODY_BYTES,
                response=settings.response,
            ),
        )
        self._pool = PoolWatch(settings.pool, settings.kubernetes_config, self._pool_changed) if settings.pool else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._telemetry = Telemetry(settings.telemetry_listen)
        self._health = health.aio.HealthServicer()
        self._server: Http2Server | None = None
        self._draining = False
        self._background = Background()

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, look for endpoints, follow their load.

        Raises:
            SettingsError: an address cannot be bound, or a certificate or spec is no good.
        """
        self._loop = asyncio.get_running_loop()
        await self._telemetry.start()
        self._telemetry.add_check("picks", self.unready)
        if self._scorer is not None:
            self._scorer.on_decision = self.state.take
        await self._discover()
        await self._serve()
        if self._pool is not None:
            self._pool.start()
        self._background.start(self._keep_discovering())
        self._background.start(self._measure())
        if self._settings.scrape_seconds:
            scraper = Scraper(
                lambda: [
                    LoadPage(one.address, one.metrics, rank_of(one.pod)) for one in self.state.endpoints if one.metrics
                ],
                self._scraped,
                lambda result: metrics.SCRAPES.labels(result).inc(),
                every_seconds=self._settings.scrape_seconds,
                clock=self._clock,
                refused=self.state.loads.refused,
            )
            self._background.start(scraper.run())

    async def _serve(self) -> None:
        settings = self._settings
        # A message from the gateway may be as large as its own buffer: the limit is ours, with an answer.
        server = Http2Server(_MAX_BODY_BYTES + 1024 * 1024)
        self.processor.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._health.set(_LIVE_NAME, health_pb2.HealthCheckResponse.SERVING)
        tls = _tls(settings) if settings.tls_certfile else None
        try:
            port = await server.listen(settings.listen, tls)
        except (ValueError, OverflowError, OSError) as error:
            raise SettingsError(f"[picker] cannot listen on {settings.listen}: {error}") from error
        self._server = server
        self.address = f"{settings.listen.rpartition(':')[0]}:{port}"
        await self._set_health()

    async def run_until(self, stop: asyncio.Event) -> None:
        """Pick until ``stop`` is set; a task that ends before ends the service with its error."""
        await self._background.until(stop)

    @property
    def telemetry_address(self) -> str:
        """host:port of its metrics, empty where there are none."""
        return self._telemetry.address

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on ``/metrics`` and ``/readyz`` how often this process was started again."""
        self._telemetry.tell_restarts(restarts)

    async def stop(self) -> None:
        """Drain, then close everything."""
        self._background.stopping()
        self._draining = True
        if self._server is not None:
            await self._set_health()
            if self._settings.drain_seconds:
                await asyncio.sleep(self._settings.drain_seconds)
            self.processor.leave()
            await self._server.stop(1.0)
        if self._pool is not None:
            self._pool.stop()
        if self._scorer is not None and self._scorer.on_decision == self.state.take:
            self._scorer.on_decision = None
        await self._background.stop()
        await self._telemetry.stop()

    def unready(self) -> str | None:
        """Return why nothing can be picked, None when something can."""
        if self._draining:
            return "draining"
        if not any(one.ready for one in self.state.endpoints):
            return "no endpoint is ready"
        return None

    async def _set_health(self) -> None:
        good = self.unready() is None
        if good and not self.ready.is_set():
            self.ready.set()
        status = health_pb2.HealthCheckResponse
        for name in _READY_NAMES:
            await self._health.set(name, status.SERVING if good else status.NOT_SERVING)

    # --- endpoints --------------------------------------------------------------------------------------------------

    def _pool_changed(self) -> None:
        """Take the pool's pods; called in the watch's thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._use)

    def _pods(self) -> Mapping[str, PodRecord]:
        return self._scorer.pods.merged if self._scorer is not None else {}

    def _use(self) -> None:
        """Join all sources."""
        settings, pods = self._settings, self._pods()
        sources = [
            self._static,
            self._file,
            *(self._known_dns.get(text, []) for text in settings.dns),
            self._pool.state.endpoints() if self._pool is not None else [],
        ]
        if settings.serving_port or not any(sources):
            sources.append(discovery.from_pods(list(pods.values()), settings.serving_port))
        self.state.use(discovery.merged(sources, pods))

    async def _discover(self) -> None:
        settings = self._settings
        if settings.endpoints_file:
            try:
                self._file = await asyncio.to_thread(discovery.read_endpoints, Path(settings.endpoints_file))
            except SettingsError as error:  # those of before stay
                metrics.DISCOVERY_ERRORS.labels("file").inc()
                log.warning("%s; keeping %d endpoints of before", error, len(self._file))
        for text in settings.dns:
            try:
                self._known_dns[text] = await discovery.resolve(text)
            except UnresolvedError as error:
                metrics.DISCOVERY_ERRORS.labels("dns").inc()
                log.warning("%s; keeping %d endpoints of before", error, len(self._known_dns.get(text, [])))
        self._use()

    async def _keep_discovering(self) -> None:
        while True:
            await self._set_health()
            await asyncio.sleep(_DISCOVERY_SECONDS if self.ready.is_set() else 0.05)
            await self._discover()

    def _scraped(self, address: str, load: EngineLoad, asked: float) -> None:
        # What is read seldom must last until it is read again.
        lasts, asleep = _READS_MISSED * self._settings.scrape_seconds, load.awake == 0
        running, waiting, usage = (figure or 0.0 for figure in load[:3])
        self.state.loads.reported(address, EngineReport(running, waiting, usage, asked, lasts, asleep))

    async def _measure(self) -> None:
        while True:
            if self._pool is not None and self._pool.failed is not None:
                raise self._pool.failed
            self.state.measure()
            self.state.take_reports(self._pods(), time.time_ns())
            metrics.OPEN_STREAMS.set(self.processor.open)
            await asyncio.sleep(_MEASURE_SECONDS)

    # --- decisions --------------------------------------------------------------------------------------------------

    def _report(self, made: Made) -> int:
        return self._recorder.decided(made)

    def _outcome(self, request_id: str) -> ResponseWatch:
        return ResponseWatch(request_id, self.state, self._joined, restarted=self._restarted, clock=self._clock)

    def _joined(self, joined: Joined) -> None:
        self._recorder.served(joined)

    def _restarted(self, decision: OpenDecision) -> bool:
        record = self._pods().get(decision.prediction.pod)
        return record is not None and 0 < decision.epoch < record.epoch


def _tls(settings: PickerSettings) -> ssl.SSLContext:
    try:
        for name in (settings.tls_keyfile, settings.tls_certfile):
            Path(name).read_bytes()
    except OSError as error:
        raise SettingsError(f"[picker] cannot read {error.filename}: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_certfile, settings.tls_keyfile, password=lambda: b"")
    except ssl.SSLError as error:
        pair = f"tls_certfile {settings.tls_certfile} and tls_keyfile {settings.tls_keyfile}"
        raise SettingsError(f"[picker] {pair} are no certificate and its key (PEM, no passphrase): {error}") from error
    return context
