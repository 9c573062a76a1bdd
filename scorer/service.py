"""The scorer as a service: followers of Kafka around a :class:`~kvatlas.scorer.api.core.Core`, and its gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvatlas.bridge.errors import LogError, SettingsError
from kvatlas.bridge.kafka.fetching import producer_tasks
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.kafka.sending import send_record, started_producer
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.rpc import Gate, rpc_server, serving
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.bridge.runtime.telemetry import Telemetry
from kvatlas.scorer.api import llmd, metrics
from kvatlas.scorer.api.bodies import Inflight
from kvatlas.scorer.api.calls import Calls
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.api.disagreements import Disagreements
from kvatlas.scorer.api.grpc_server import SERVICE, ScorerFront, socket_target
from kvatlas.scorer.api.http_server import STOP_GRACE_SECONDS
from kvatlas.scorer.api.names import also_named, pairs
from kvatlas.scorer.api.security import Guard, server_credentials, worker_credentials
from kvatlas.scorer.lookups.index import ServiceLookups
from kvatlas.scorer.lookups.local import LocalTables, TableLookups
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.lookups.router import PartitionRouter
from kvatlas.scorer.lookups.versions import VersionReader, Versions
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.decisions import Decisions
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool

if TYPE_CHECKING:
    from kvatlas.scorer.api.tracing import Tracing

log = logging.getLogger(__name__)

#: How long a scorer waits for Kafka at its start.
START_SECONDS: Final = 30.0
_HOUSEKEEPING_SECONDS: Final = 1.0
#: A scorer is ready without the others' decisions after so long: scores are right without them.
_DECISIONS_SECONDS: Final = 10.0
#: Decisions on their way to Kafka at once; more are not published.
_MOST_SENDING: Final = 10_000
#: Decisions gather for so long before they are sent; a request for each would cost more than all else.
_GATHER_MS: Final = 5
#: A Kafka that could not be reached is not asked again for so long; decisions made meanwhile are lost at once.
_AWAY_SECONDS: Final = 1.0


def _tracing(settings: ScorerSettings) -> Tracing | None:
    """Return what makes traces, None where none are asked for."""
    if not settings.traces_endpoint:
        return None
    try:
        from kvatlas.scorer.api.tracing import Tracing  # noqa: PLC0415 - an extra of the package
    except ImportError as error:
        raise SettingsError(f"[scorer] traces_endpoint: install kvatlas[otel] for traces ({error})") from error
    return Tracing(settings)


def _traced(tracing: Tracing, stage: str, seconds: float) -> None:
    metrics.observe(stage, seconds)
    tracing.stage(stage, seconds)


class ScorerService:
    """One scorer process.

    Attributes:
        ready: set once pods, and workers unless lookups are local, have been read.
        address: ``host:port`` of the gRPC server, after :meth:`start`.
        http_address: ``host:port`` of the HTTP/JSON front, empty without one.
        core: the operations, for use in process.
        tokenizers: the pool that tokenizes prompts.
        on_decision: told of every record of ``kv-decisions``.
    """

    def __init__(
        self,
        settings: ScorerSettings,
        kafka: KafkaSettings,
        *,
        tokenizer: TokenizerSettings | None = None,
        local: LocalTables | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        serve: bool = True,
        start_seconds: float = START_SECONDS,
    ) -> None:
        """Put a scorer together; nothing is opened yet.

        Args:
            settings: of the scorer.
            kafka: how to reach Kafka.
            tokenizer: where tokenizers come from; None for the defaults.
            local: the index of a worker in this process; what is not there, or of another index version, is asked
                of the workers that ``kv-workers`` names.
            clock_ns: wall clock in ns.
            serve: open the scorer's own addresses; without, it is for use in process alone.
            start_seconds: how long :meth:`start` waits for Kafka.

        Raises:
            SettingsError: a setting makes no sense or a file is missing.
        """
        self.ready = asyncio.Event()
        self.address = ""
        self.http_address = ""
        if not settings.name:
            settings = msgspec.structs.replace(settings, name=f"{socket.gethostname()}-{os.getpid()}")
        self._settings = settings
        self._kafka = kafka
        self._clock_ns = clock_ns
        self._credentials = worker_credentials(settings)
        self._local = local
        self._versions = Versions(self._reader, settings.index_version, lambda reader: self.core.use(reader.index))
        self._serves = serve
        self._start_seconds = start_seconds
        self.on_decision: Callable[[records.DecisionRecord], None] | None = None
        self.tokenizers = self._pool = TokenizerPool(
            tokenizer or TokenizerSettings(), also_named=also_named(pairs(settings.aliases, "aliases"))
        )
        self._tracing = tracing = _tracing(settings)
        self._decisions = Decisions(settings, self._publish)
        self._disagreements = Disagreements()
        self.core = Core(
            settings,
            self._versions.used.index,
            pool=self._pool,
            decisions=self._decisions,
            clock_ns=clock_ns,
            observe=metrics.observe if tracing is None else lambda stage, seconds: _traced(tracing, stage, seconds),
            answered=self._disagreements.answered,
        )
        self._guard = Guard.from_settings(settings)
        self._telemetry = Telemetry(settings.telemetry_listen)
        self._decided = TopicFollower(
            kafka,
            topics.DECISIONS,
            self._take_decision,
            client_id=f"kvatlas-scorer-{settings.name}",
            from_end=True,
        )
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._http: Any = None
        self._producer: Any = None
        self._producer_lock = asyncio.Lock()
        self._sending = 0
        self._away_until = 0.0
        self._begun = 0.0
        self._background = Background()

    def _reader(self, name: str) -> VersionReader:
        return VersionReader(
            name,
            self._kafka,
            client_id=f"kvatlas-scorer-{self._settings.name}",
            clock_ns=self._clock_ns,
            lookups=lambda workers: self._lookups(name, workers),
            block_size_tokens=self._settings.block_size_tokens if name == topics.BASE_VERSION else 0,
        )

    def _lookups(self, index_version: str, workers: WorkerDirectory) -> ServiceLookups:
        router = PartitionRouter(
            workers,
            hedge_seconds=self._settings.hedge_ms / 1e3,
            credentials=self._credentials,
            on_event=lambda event: metrics.LOOKUP_EVENTS.labels(event).inc(),
        )
        if self._local is None or self._local.index_version != index_version:
            return router
        return TableLookups(self._local, router)

    @property
    def index_version(self) -> str:
        """Name of the index version that answers."""
        return self._versions.used.name

    @property
    def pods(self) -> PodTable:
        """The pods, as the index version in use tells them."""
        return self._versions.used.pods

    @property
    def workers(self) -> WorkerDirectory:
        """The workers of the index version in use."""
        return self._versions.used.workers

    async def start(self) -> None:
        """Open everything: server first (not ready yet), then the followers.

        Raises:
            SettingsError: an address cannot be bound or a certificate cannot be read.
            LogError: Kafka does not answer within ``start_seconds``.
        """
        await self._telemetry.start()
        self._telemetry.add_check("scores", self.unready)
        if self._serves:
            await self._serve()
        await self._set_health(serving=False)
        self._begun = time.monotonic()
        self._decided.start()
        await self._versions.start(self._start_seconds)
        if not self._settings.index_version:
            self._background.start(self._versions.run())
        self._background.start(self._housekeeping())
        if self.unready() is None:
            await self._become_ready()

    def _take_decision(self, _key: bytes | None, value: bytes | None) -> None:
        record = self._decisions.apply(value, self._clock_ns())
        if record is not None:
            self._disagreements.decided(record)
            if self.on_decision is not None:
                self.on_decision(record)

    async def _serve(self) -> None:
        settings = self._settings
        # An interceptor costs every call, so there is one only where tokens are asked for.
        interceptors = [llmd.GuardTokenization(self._guard)] if settings.tokens_file else []
        named = self._tracing.named if self._tracing is not None else lambda _model: None
        calls = Calls(self.core, settings, self._guard, named)
        server = rpc_server(settings.max_message_bytes, interceptors, Gate(self.core.admission, calls.refused))
        inflight = Inflight()
        front = ScorerFront(calls, inflight, self._tracing)
        names = [SERVICE, health.SERVICE_NAME]
        front.add_to(server)
        names += llmd.add_to(server, calls, self._pool, tracing=self._tracing)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        credentials = server_credentials(settings)
        try:
            if credentials is None:
                port = server.add_insecure_port(settings.listen)
            else:
                port = server.add_secure_port(settings.listen, credentials)
            if settings.socket:
                server.add_insecure_port(socket_target(settings.socket))
        except (RuntimeError, OSError) as error:
            raise SettingsError(
                f"[scorer] cannot listen on {settings.listen} or {settings.socket!r}: {error}"
            ) from error
        await server.start()
        self._server = server
        self._background.start(serving(server, f"of scores on {settings.listen}"), "serving")
        self.address = f"{settings.listen.rpartition(':')[0]}:{port}"
        if settings.http_listen:
            from kvatlas.scorer.api.http_server import HttpFront  # noqa: PLC0415 - only when switched on

            self._http = HttpFront(calls, inflight, self._tracing)
            self.http_address = await self._http.start()

    def unready(self) -> str | None:
        """Return why scores cannot be asked for, None when they can."""
        if (why := self._versions.used.unread()) is not None:
            return why
        why = self.core.unready()
        waits = not self.ready.is_set() and time.monotonic() < self._begun + _DECISIONS_SECONDS
        if why is None and waits and not self._decided.caught_up.is_set():
            return "decisions reported to other scorers are not followed yet"
        return why

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def _become_ready(self) -> None:
        if not self.ready.is_set():
            self.ready.set()
            log.info("ready: %d pods, scores on %s", len(self.pods.merged), self.address or "no address of its own")
        await self._set_health(serving=True)

    async def _housekeeping(self) -> None:
        while True:
            why = self.unready()
            if why is None:
                await self._become_ready()
            else:
                await self._set_health(serving=False)
            self._decisions.expire(self._clock_ns())
            self._disagreements.look(self.pods.merged.values())
            metrics.PODS.set(len(self.pods.merged))
            metrics.OPEN_DECISIONS.set(len(self._decisions.open))
            metrics.UNCOVERED.set(len(self.workers.uncovered()))
            for reader in list(self._versions.readers.values()):
                await reader.lookups.forget_gone()
            self._look_for_the_dead()
            await asyncio.sleep(_HOUSEKEEPING_SECONDS if why is None else 0.05)

    def _look_for_the_dead(self) -> None:
        """End the service when a topic is not followed any more, or nothing can be sent."""
        for error in (self._decided.failed(), *(reader.failed() for reader in self._versions.readers.values())):
            if error is not None:
                self._background.fail(error)

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on ``/metrics`` and ``/readyz`` how often this process was started again."""
        self._telemetry.tell_restarts(restarts)

    def _publish(self, record: records.DecisionRecord) -> None:
        self.publish(record)
        if self._settings.outcome_delay_ms:
            self._background.once(self._join(record), "outcome of a decision")

    def publish(self, record: records.DecisionRecord) -> None:
        """Put a record on ``kv-decisions`` in the background; one that Kafka does not take is lost and counted."""
        if self._sending < _MOST_SENDING and time.monotonic() >= self._away_until:
            self._background.once(self._send(record), "decision on its way to Kafka")
        else:  # Kafka is away and must not fill the memory
            metrics.DECISIONS_LOST.inc()

    async def _join(self, record: records.DecisionRecord) -> None:
        """Wait, then say what came of a decision."""
        await asyncio.sleep(self._settings.outcome_delay_ms / 1e3)
        outcome = await self.core.judge(record)
        model = metrics.model_label(record.model, held=record.predicted_blocks > 0 or outcome.real_blocks > 0)
        metrics.PREDICTED_BLOCKS.labels(model).inc(record.predicted_blocks)
        # What is there beyond the prediction was computed since, as a rule: for this request.
        metrics.REAL_BLOCKS.labels(model).inc(min(max(outcome.real_blocks, 0), record.predicted_blocks))
        metrics.OUTCOMES.labels(model, outcome.outcome or "unknown").inc()
        await self._send(outcome)

    async def _send(self, record: records.DecisionRecord) -> None:
        self._sending += 1
        try:
            producer = await self._started_producer()
            # With its acknowledgement: what Kafka refuses later is lost as well, and counted.
            await send_record(
                producer, self._kafka.topic(topics.DECISIONS), record.request_id.encode(), records.encode(record)
            )
        except LogError as error:
            metrics.DECISIONS_LOST.inc()
            log.warning("decision %s was not published: %s", record.request_id, error)
        finally:
            self._sending -= 1

    async def _started_producer(self) -> Any:
        async with self._producer_lock:
            if self._producer is None:
                if time.monotonic() < self._away_until:
                    raise LogError("Kafka was away a moment ago")
                client_id = f"kvatlas-scorer-{self._settings.name}"
                try:
                    self._producer = await started_producer(
                        self._kafka, client_id, max_request_size=32 * 1024 * 1024, linger_ms=_GATHER_MS
                    )
                except BaseException:
                    self._away_until = time.monotonic() + _AWAY_SECONDS
                    raise
                self._background.watch(*producer_tasks(self._producer))
            return self._producer

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set; a task that ends before ends the service with its error."""
        await self._background.until(stop)

    async def stop(self) -> None:
        """Stop serving, let running requests end, close everything."""
        self._background.stopping()
        await self._set_health(serving=False)
        if self._http is not None:
            await self._http.stop()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_SECONDS)
        await self._background.stop()
        await asyncio.gather(self._decided.stop(), self._versions.stop())
        if self._producer is not None:
            with contextlib.suppress(Exception):  # also what ended one of its tasks
                await self._producer.stop()
        self._pool.close()
        self.core.intake.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        await self._telemetry.stop()
