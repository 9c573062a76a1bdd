"""The bridge process: finds engines, keeps a stream per endpoint, writes pod records."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from kvatlas.bridge.engines.discovery import discover, read_engines, static_specs
from kvatlas.bridge.engines.http import is_http
from kvatlas.bridge.engines.kubernetes import PodWatch
from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.errors import KvatlasError, TaskEndedError
from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.loads import EngineLoads
from kvatlas.bridge.ingest.streams import TICK_SECONDS, EngineStreams
from kvatlas.bridge.ingest.strip import KNOWN_BLOCKS
from kvatlas.bridge.kafka.producer import RecordProducer
from kvatlas.bridge.model import topics
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.lmcache import CacheSource, parse_cache_servers
from kvatlas.bridge.relay.metrics import BridgeCollector
from kvatlas.bridge.relay.mooncake import PoolSource, parse_masters
from kvatlas.bridge.relay.ownership import Ownership
from kvatlas.bridge.relay.recovery import recover
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.bridge.runtime.telemetry import Telemetry

_FILE_SECONDS: Final = 0.5
_FIRST_LIST_SECONDS: Final = 10.0
#: How often DNS, and the APIs of engines known by their HTTP address, are asked again; a file is looked at more often.
DISCOVERY_SECONDS: Final = 5.0
#: Longest wait for Kafka at shutdown; what is not acknowledged then is replayed by the next bridge.
_FLUSH_SECONDS: Final = 10.0

log = logging.getLogger(__name__)


class BridgeService:
    """The bridge.

    Attributes:
        ready: set once every endpoint known at start is subscribed.
        telemetry: the HTTP pages, on a registry of their own.
    """

    def __init__(
        self, settings: BridgeSettings, kafka: KafkaSettings, *, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """Describe the service; ``clock`` is the wall clock in ns.

        Raises:
            SettingsError: an endpoint or the engines file is not valid.
        """
        static_specs(settings)
        parse_cache_servers(settings.lmcache_servers)
        parse_masters(settings.mooncake_masters)
        if settings.engines_file:
            read_engines(Path(settings.engines_file))
        self._settings = settings
        self._kafka = kafka
        self.ready = asyncio.Event()
        self.registry = CollectorRegistry()
        self.telemetry = Telemetry(settings.listen, registry=self.registry)
        self.telemetry.add_check("bridge", lambda: None if self.ready.is_set() else "starting")
        self._resolved: dict[str, list[EngineSpec]] = {}
        self._complete = False
        self._pods: PodWatch | None = None
        self._look = asyncio.Event()
        self._stopped = False
        self._background = Background()
        self._publisher = RecordProducer(
            kafka,
            compression=settings.compression,
            message_bytes=settings.message_bytes,
            buffer_bytes=settings.buffer_bytes,
        )
        self._streams = EngineStreams(settings, self._publisher, clock, self._background)
        self._loads = EngineLoads(self._streams)
        self._caches: list[CacheSource | PoolSource] = []
        self._ownership: Ownership | None = None
        #: Gets the receive time (ns) of each acknowledged message; for measuring.
        self.observe: Callable[[int], None] | None = None

    @property
    def endpoints(self) -> dict[str, EngineEndpoint]:
        """The endpoints that are heard, by address."""
        return self._streams.endpoints

    @property
    def acknowledged(self) -> int:
        """Engine messages that Kafka has acknowledged."""
        return self._streams.shared.acknowledged

    @property
    def received_bytes(self) -> int:
        """Bytes of the engine messages that were forwarded."""
        return self._streams.shared.bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes on the log of what Kafka has acknowledged, compressed."""
        return self._publisher.sent_bytes

    @property
    def bound(self) -> list[str]:
        """Addresses where engines connect to us."""
        return self._streams.bound

    @property
    def address(self) -> str:
        """Where the metrics are, empty when switched off."""
        return self.telemetry.address

    async def start(self) -> None:
        """Connect to Kafka, recover positions, subscribe.

        Raises:
            KvatlasError: Kafka cannot be reached, or a setting is not valid.
        """
        settings = self._settings
        await self.telemetry.start()
        publisher, streams, shared = self._publisher, self._streams, self._streams.shared
        await publisher.start()
        shared.observe = self.observe
        shared.partitions = await publisher.partitions(topics.EVENTS)
        self._ownership = Ownership(settings, self._kafka, shared.partitions, self._gained, self._lost)
        shared.owns, publisher.may_send = self._ownership.owns, self._ownership.leased
        self.registry.register(BridgeCollector(streams, self._loads, publisher))
        await self._ownership.start()
        if settings.kubernetes_selector:
            loop = asyncio.get_running_loop()

            def changed() -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._look.set)

            self._pods = PodWatch(settings, changed)
            self._pods.start()
            if not await asyncio.to_thread(self._pods.listed.wait, _FIRST_LIST_SECONDS):
                log.warning("Kubernetes has not answered yet; its pods follow")
        await streams.sync(await self._found())
        streams.bind(settings.bind)
        if settings.lmcache_topic:
            self._caches.append(CacheSource(shared, self._kafka, self._background))
        if settings.mooncake_masters:
            self._caches.append(PoolSource(shared, streams.wires, self._kafka, self._background))
        for source in self._caches:
            self.registry.register(source.metrics())
            source.start()
        self._watch()
        self.ready.set()

    def _watch(self) -> None:
        """Begin the tasks that go on for ever, and end the service with any of them."""
        assert self._ownership is not None
        background = self._background
        background.start(self._tick())
        background.start(self._discover())
        background.start(self._loads.run())
        if self._settings.engines_file:
            background.start(self._watch_file())
        for task in self._ownership.tasks:
            background.watch(task)
        failed = self._publisher.failed
        assert failed is not None
        failed.add_done_callback(lambda done: None if done.cancelled() else background.fail(_error_of(done)))

    def tell_restarts(self, restarts: Restarts) -> None:
        """Tell on ``/metrics`` and ``/readyz`` how often this process was started again."""
        self.telemetry.tell_restarts(restarts)

    async def run_until(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set; a task that ends before ends the service with its error."""
        await self._background.until(stop)

    async def stop(self) -> None:
        """Stop reading, send what was accepted, and leave."""
        if self._stopped:
            return
        self._stopped = True
        self.ready.clear()
        await self._background.stop()
        if self._pods is not None:
            await asyncio.to_thread(self._pods.stop)
        for source in self._caches:
            await source.stop()
        await self._streams.close()
        await self._publisher.flush(_FLUSH_SECONDS)
        self._streams.write_records()
        if not await self._publisher.flush(1.0):
            log.warning("%d bytes not acknowledged; replay repairs them", self._publisher.pending_bytes)
        await self._publisher.stop()
        if self._ownership is not None:
            await self._ownership.stop()
        self._streams.wires.close()
        await self.telemetry.stop()

    async def _gained(self, partitions: list[int]) -> None:
        settings = self._settings
        found = await recover(
            self._kafka,
            partitions,
            known_blocks=KNOWN_BLOCKS if settings.strip_tokens else 0,
        )
        self._streams.adopt(found)

    async def _lost(self, partitions: list[int]) -> None:
        self._streams.release(partitions)
        for source in self._caches:
            source.lost(partitions)
        if self._ownership is not None and self._ownership.leased():
            await self._publisher.flush(2.0)
        for number in partitions:
            for name in (topics.EVENTS, topics.PODS):
                self._publisher.discard(name, number)

    async def _found(self) -> list[EngineSpec]:
        pods = self._pods.asked() if self._pods is not None else []
        specs = await discover(self._settings, self._resolved, pods)
        kubernetes = self._pods is None or self._pods.listed.is_set()
        asked = (*self._settings.dns, *filter(is_http, self._settings.engines), *pods)
        self._complete = kubernetes and all(name in self._resolved for name in asked)
        return specs + (self._pods.specs() if self._pods is not None else [])

    async def _discover(self) -> None:
        while True:
            self._look.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), self._until_next_look())
            try:
                await self._streams.sync(await self._found())
            except KvatlasError as error:
                log.warning("discovery: %s; keeping the endpoints of before", error)
            await self._streams.end_missing()

    def _until_next_look(self) -> float:
        """Seconds to the next look: not past the time when a missing endpoint is gone."""
        return max(0.05, min(DISCOVERY_SECONDS, self._streams.seconds_to_next_end()))

    async def _watch_file(self) -> None:
        """Look at the file's own data often: cheap, and it works on every file system and with swapped links."""
        path = Path(self._settings.engines_file)
        before: tuple[int, int, int] | None = None  # it may have changed since the first look
        while True:
            await asyncio.sleep(_FILE_SECONDS)
            now = await asyncio.to_thread(_stamp, path)
            if now != before:
                before = now
                self._look.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self._pods is not None and self._pods.failed is not None:
                raise self._pods.failed
            await self._streams.tick(complete=self._complete)


def _error_of(done: asyncio.Future[None]) -> BaseException:
    return done.exception() or TaskEndedError("the producer has ended")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file's content; None when it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
