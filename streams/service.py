"""One stream worker: the Faust app, its lookup service, announcements and sweeps, started and stopped together.

Crash-only: whatever ends one of its background tasks, or the Faust app, ends the service, and the process with it.
Locks, sockets, threads and the membership in the group then end as well; who started the process starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.kafka.fetching import producer_tasks
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.kafka.rights import lost_right
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.block_key import KEY_VERSION
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.records import WorkerRecord
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.bridge.runtime.telemetry import Telemetry
from kvatlas.streams.errors import StoreError, WorkerCrashError
from kvatlas.streams.faust_app.app import BLOCK_INDEX, ENGINE_BLOCKS, SLICE_UPDATES, WorkerApp, build_app
from kvatlas.streams.faust_app.consumer import Watchdog
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.index.apply import sweep_index
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.sweep import sweep_engine_blocks
from kvatlas.streams.serving.announcer import Announcer
from kvatlas.streams.serving.lookup_service import LookupServer, LookupService
from kvatlas.streams.startup import advertised, discover, worker_id
from kvatlas.streams.state.damage import full_disk
from kvatlas.streams.state.partition import PartitionState, Role
from kvatlas.streams.upkeep.census import Census
from kvatlas.streams.upkeep.gauges import Gauges
from kvatlas.streams.upkeep.keeper import Keeper
from kvatlas.streams.upkeep.sweeper import Sweeper

logger = logging.getLogger(__name__)

_STOP_SECONDS: Final = 4.0
_POLL_SECONDS: Final = 0.05
#: Largest lookup, in keys: a prompt of 262,144 tokens, about a millisecond of this process's time per thousand.
_MAX_LOOKUP_KEYS: Final = 16_384


class WorkerService:
    """A stream worker.

    Args:
        settings: the worker's.
        kafka: how to reach the brokers.
        clock: wall clock, ns since the epoch.
        slice_updates: updates applied before the event loop is given to others.

    Attributes:
        ready: set once every assigned partition is restored and lookups are answered.
        address: host:port of the lookup service once started.
        pods: what ``kv-pods`` says.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        kafka: KafkaSettings,
        *,
        clock: Callable[[], int] = time.time_ns,
        slice_updates: int = SLICE_UPDATES,
    ) -> None:
        self.ready = asyncio.Event()
        self.address = ""
        self.pods = PodDirectory(settings.index_version)
        self.worker_id = ""
        self._settings = settings
        self._kafka = kafka
        self._clock = clock
        self._slice_updates = slice_updates
        self._workers = WorkerDirectory(clock, settings.index_version)
        self._partitions: dict[str, int] = {}
        self._app: WorkerApp | None = None
        self._background = Background()
        self._server: LookupServer | None = None
        self._announcer: Announcer | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._telemetry = Telemetry(settings.telemetry_listen)
        self._census = Census(self._index_states, self.pods.records)
        self._followers: list[TopicFollower] = []
        self._saying_ready: set[asyncio.Task[None]] = set()

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything; returns before the partitions are restored, see :attr:`ready`.

        Raises:
            TopicsError: topics are missing or disagree.
            StoreError: the state folder cannot be used.
            SettingsError: an address cannot be bound.
        """
        folder = Path(self._settings.state_dir)
        self.worker_id = worker_id(folder)
        self._partitions = await discover(self._settings, self._kafka, f"kvatlas-worker-{self.worker_id}")
        await self._serve()
        self._telemetry.add_check("partitions", lambda: None if self.ready.is_set() else "partitions are not restored")
        await self._telemetry.start()
        for topic, apply in ((topics.PODS, self.pods.apply), (topics.WORKERS, self._workers.apply)):
            follower = TopicFollower(self._kafka, topic, apply, client_id=f"kvatlas-worker-{self.worker_id}")
            follower.start()
            self._background.watch(follower.task)
            self._followers.append(follower)
        await self._start_app()

    async def run_until(self, stop: asyncio.Event) -> None:
        """Run until ``stop`` is set.

        Raises:
            RightsError: the account may not do on Kafka what it must.
            StateFolderError: the disk is full.
            FencedError: another worker took a partition over while this one stood still.
            BaseException: whatever else ended the Faust app or a background task.
        """
        try:
            await self._background.until(stop)
        except Exception as error:
            refused = lost_right(error, self._kafka) or full_disk(error, self._settings.state_dir)
            if refused is not None:
                raise refused from error
            raise

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on ``/metrics`` and ``/readyz`` how often this process was started again."""
        self._telemetry.tell_restarts(restarts)

    async def stop(self) -> None:
        """Stop: commit the flushes in progress, leave the group, say goodbye on ``kv-workers``."""
        self._background.stopping()
        self.ready.clear()
        if self._server is not None:
            await self._server.set_ready(False)
        if self._app is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._app.quiesce(), _STOP_SECONDS)
            await self._farewell()
        if self._server is not None:
            await self._server.stop()
        for follower in self._followers:
            await follower.stop()
        await self._stop_app()
        await self._telemetry.stop()

    async def _farewell(self) -> None:
        assert self._announcer is not None
        assert self._app is not None
        if self._announcing is not None:
            self._announcing.cancel()  # nothing may be announced after the goodbye
        try:
            if self._app.publisher is not None:
                await asyncio.wait_for(self._app.publisher.flush(everything=True), 1.0)
            await asyncio.wait_for(self._announcer.withdraw(), 2.0)
        except Exception as error:  # noqa: BLE001 # the brokers may be away; the record expires by itself
            logger.warning("kv-workers: could not say goodbye: %r", error)

    # --- parts ----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        service = LookupService(
            self.worker_id,
            partition_count=self._partitions[self._settings.blocks_topic],
            max_keys=_MAX_LOOKUP_KEYS,
            state_of=self._state_of,
            lag_of=self._lag_of,
            others=self._workers,
            certain=self._certain,
        )
        self._server = LookupServer(
            service,
            self._settings.listen,
            max_keys=_MAX_LOOKUP_KEYS,
        )
        try:
            port = await self._server.start()
        except OSError as error:
            raise SettingsError(f"[worker] listen {self._settings.listen}: {error}") from error
        self._watch(self._server.serving())
        self.address = advertised(self._settings.listen, self._settings.advertise, port)

    async def _start_app(self) -> None:
        loop = asyncio.get_running_loop()

        def fail(error: BaseException) -> None:  # also from RocksDB's threads
            loop.call_soon_threadsafe(self._background.fail, error)

        self._app = app = build_app(
            self._settings,
            self._kafka,
            partitions=self._partitions,
            worker_id=self.worker_id,
            clock=self._clock,
            on_crash=fail,
            slice_updates=self._slice_updates,
        )
        app.roles_listener = self._roles_changed
        self._announcer = Announcer(
            app.aiokafka_producer,
            (self._kafka.topic(topics.WORKERS), self._partitions[topics.WORKERS]),
            self._describe,
            clock=self._clock,
        )
        app.finalize()
        await app.start()
        self._background.watch(*producer_tasks(app.aiokafka_producer()))
        self._announcing = self._watch(self._announcer.run())
        self._watch(_crash_of(app))
        self._watch(Gauges(app).run())
        self._watch(Keeper(app.sources.values(), may_commit=lambda: app.lease.valid).run())
        self._watch(self._census.run())
        self._watch(Watchdog(app.waiting, app.source_end, app.source_consumer().rewind).run())
        if app.publisher is not None:
            self._watch(app.publisher.run())
        if app.sessions is not None:
            self._watch(app.sessions.run())
        self._start_mirror(app)
        for name, sweep in ((BLOCK_INDEX, sweep_index), (ENGINE_BLOCKS, sweep_engine_blocks)):
            table = app.bulk_table(name)
            if table is not None:
                sweeper = Sweeper(
                    table,
                    self.pods.ended,
                    interval_seconds=self._settings.sweep_interval_seconds,
                    sweep=sweep,
                    forget=self._forgettable,
                    on_deleted=self._withdraw if name == ENGINE_BLOCKS else None,
                )
                self._watch(sweeper.run())

    def _forgettable(self) -> dict[int, int]:
        return self.pods.gone_since(self._clock() - int(self._settings.forget_gone_hours * 3.6e12))

    async def _withdraw(self, keys: Sequence[bytes]) -> None:
        """Remove the records of pods whose states a sweep of ``engine_blocks`` has removed."""
        publisher = self._app.publisher if self._app is not None else None
        refs = [int.from_bytes(key[: eb.POD_BYTES], "big") for key in keys if key[eb.POD_BYTES :] == eb.KIND_STATE]
        if publisher is None or not refs:
            return
        names = self.pods.names()
        for pod in (names[ref] for ref in refs if ref in names):
            logger.info("pod %s has been gone for %.1f h and is forgotten", pod, self._settings.forget_gone_hours)
            await publisher.withdraw(pod)

    def _start_mirror(self, app: WorkerApp) -> None:
        if not self._settings.mirror or app.bulk_table(BLOCK_INDEX) is None:
            return
        try:
            from kvatlas.streams.mirror.service import MirrorService  # noqa: PLC0415 # Redis's client only where it is used
        except ImportError as error:
            raise SettingsError("[worker] mirror: needs Redis's client; install kvatlas[redis]") from error

        settings = msgspec.structs.replace(self._settings, telemetry_listen="")  # the worker's own tells of it too
        self._watch(MirrorService(settings, self._kafka, name=self.worker_id).run())

    def _watch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._background.start(work)

    async def _stop_app(self) -> None:
        app, self._app = self._app, None
        await self._background.stop()
        if app is None:
            return
        app.roles_listener = None
        try:
            await asyncio.wait_for(app.stop(), _STOP_SECONDS)
        except Exception as error:  # noqa: BLE001 # it is given up either way
            logger.warning("the stream app did not stop cleanly: %r", error)
        for table in app.sources.values():
            table.close()  # also when Faust's stop was cut off

    # --- what is known --------------------------------------------------------------------------------------------

    def index_table(self) -> BulkTable:
        """Return the ``block_index`` table of the running app.

        Raises:
            StoreError: this worker has none.
        """
        table = self._app.bulk_table(BLOCK_INDEX) if self._app is not None else None
        if table is None:
            raise StoreError("this worker has no block_index table: it is stopped, or its role is resolve")
        return table

    def index_state(self, partition: int) -> PartitionState | None:
        """Return the local state of a partition of ``block_index``.

        None when it is not here, or may have become another worker's: the lookup service then answers, flagged.
        """
        state = self._state_of(partition)
        return None if state is not None and state.role is Role.ACTIVE and not self._certain() else state

    def _certain(self) -> bool:
        return self._app is not None and self._app.lease.valid

    @property
    def partition_count(self) -> int:
        """Partitions of the index; 0 before :meth:`start`."""
        return self._partitions.get(self._settings.blocks_topic, 0)

    def add_check(self, name: str, check: Callable[[], str | None]) -> None:
        """Make ``/readyz`` depend on one more check: None when it is passed, else why not."""
        self._telemetry.add_check(name, check)

    def _index_states(self) -> dict[int, PartitionState]:
        table = self._app.bulk_table(BLOCK_INDEX) if self._app is not None else None
        return table.states if table is not None else {}

    def _state_of(self, partition: int) -> PartitionState | None:
        return self._index_states().get(partition)

    def _lag_of(self, partition: int) -> int:
        app = self._app
        state = self._state_of(partition)
        if app is None or state is None:
            return -1
        return source_lag(app, self._kafka.topic(self._settings.blocks_topic), partition, state.reflected.source_offset)

    def _roles_changed(self, restored: bool) -> None:
        if self._app is None:
            return
        if restored:  # stays set through a rebalance: partitions are answered, flagged, meanwhile
            self.ready.set()
        if self._server is not None:
            answers = any(state.role is not Role.RESTORING for state in self._index_states().values())
            task = asyncio.ensure_future(self._server.set_ready(answers))
            self._saying_ready.add(task)
            task.add_done_callback(self._saying_ready.discard)
        if self._announcer is not None:
            self._announcer.changed()

    def _describe(self) -> WorkerRecord:
        states = self._index_states()

        def having(role: Role) -> list[int]:
            return sorted(number for number, state in states.items() if state.role is role)

        return WorkerRecord(
            worker=self.worker_id,
            endpoint=self.address,
            partitions=having(Role.ACTIVE),
            standby=having(Role.STANDBY),
            restoring=having(Role.RESTORING),
            partition_count=self._partitions[self._settings.blocks_topic],
            block_size_tokens=self._settings.block_size_tokens,
            key_version=KEY_VERSION,
            generation=max(self._app.consumer_generation_id, 0) if self._app is not None else 0,
            offsets={number: state.meta.source_offset for number, state in states.items()},
            index_version=self._settings.index_version,
            blocks=self._census.holdings,
        )


async def _crash_of(app: WorkerApp) -> None:
    """Wait until Faust's app has crashed: mode services note it and stop, and tell nobody but their own program.

    Raises:
        BaseException: what it crashed of.
    """
    while not app.crashed:  # noqa: ASYNC110 # nothing tells of it
        await asyncio.sleep(_POLL_SECONDS * 4)
    raise app.crash_reason or WorkerCrashError("the Faust app crashed without a reason")


def source_lag(app: WorkerApp, topic: str, partition: int, applied: int) -> int:
    """Return how many source records a partition is behind the end that was seen last; -1 when none was."""
    end = app.source_end(topic, partition)
    return -1 if end is None else max(end - applied - 1, 0)
