"""The bridge process: finds engines, keeps a stream per endpoint, writes pod records."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from kvatlas.bridge.engines.discovery import discover, read_engines, static_specs
from kvatlas.bridge.engines.http import is_http
from kvatlas.bridge.engines.kubernetes import PodWatch
from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.errors import EngineError, KvatlasError, TaskEndedError
from kvatlas.bridge.ingest.absent import Absent
from kvatlas.bridge.ingest.inbound import Inbound
from kvatlas.bridge.ingest.metrics import BridgeCollector
from kvatlas.bridge.ingest.stream import PodStream, Shared
from kvatlas.bridge.kafka.producer import RecordProducer
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.lmcache import CacheSource, parse_cache_servers
from kvatlas.bridge.relay.ownership import Ownership
from kvatlas.bridge.relay.recovery import recover
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import Background
from kvatlas.bridge.runtime.telemetry import Telemetry

_TICK_SECONDS: Final = 0.25
_FILE_SECONDS: Final = 0.5
_FIRST_LIST_SECONDS: Final = 10.0

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
        if settings.engines_file:
            read_engines(Path(settings.engines_file))
        self._settings = settings
        self._kafka = kafka
        self._clock = clock
        self.ready = asyncio.Event()
        self.registry = CollectorRegistry()
        self.telemetry = Telemetry(settings.listen, registry=self.registry)
        self.telemetry.add_check("bridge", lambda: None if self.ready.is_set() else "starting")
        self.streams: dict[str, PodStream] = {}
        self._resolved: dict[str, list[EngineSpec]] = {}
        self._missing: dict[str, float] = {}
        self._complete = False
        self._replaced = 0
        self._inbound: list[Inbound] = []
        self._pods: PodWatch | None = None
        self._look = asyncio.Event()
        self._stopped = False
        self._background = Background()
        self._shared: Shared | None = None
        self._publisher: RecordProducer | None = None
        self._caches: CacheSource | None = None
        self._ownership: Ownership | None = None
        #: Gets the receive time (ns) of each acknowledged message; for measuring.
        self.observe: Callable[[int], None] | None = None

    @property
    def acknowledged(self) -> int:
        """Engine messages that Kafka has acknowledged."""
        return self._shared.acknowledged if self._shared is not None else 0

    @property
    def received_bytes(self) -> int:
        """Bytes of the engine messages that were forwarded."""
        return self._shared.bytes if self._shared is not None else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes on the log of what Kafka has acknowledged, compressed."""
        return self._publisher.sent_bytes if self._publisher is not None else 0

    @property
    def bound(self) -> list[str]:
        """Addresses where engines connect to us."""
        return [inbound.address for inbound in self._inbound]

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
        publisher = self._publisher = RecordProducer(
            self._kafka,
            compression=settings.compression,
            linger_seconds=settings.linger_ms / 1000,
            batch_bytes=settings.batch_bytes,
            message_bytes=settings.message_bytes,
        )
        await publisher.start()
        shared = self._shared = Shared(settings, publisher, self._kafka.topic, self._clock)
        shared.observe, shared.background = self.observe, self._background
        shared.partitions = await publisher.partitions(self._kafka.topic(topics.EVENTS))
        self._ownership = Ownership(settings, self._kafka, shared.partitions, self._gained, self._lost)
        shared.owns, publisher.may_send = self._ownership.owns, self._ownership.leased
        self.registry.register(BridgeCollector(self.streams, shared))
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
        await self._sync(await self._found())
        self._bind()
        if settings.lmcache_topic:
            self._caches = CacheSource(shared, self._kafka)
            self.registry.register(self._caches.metrics())
            self._caches.start()
        self._watch()
        self.ready.set()

    def _watch(self) -> None:
        """Begin the tasks that go on for ever, and end the service with any of them."""
        assert self._publisher is not None
        assert self._ownership is not None
        background = self._background
        background.start(self._tick())
        background.start(self._discover())
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
        for inbound in self._inbound:
            inbound.close()
        if self._caches is not None:
            await self._caches.stop()
        await asyncio.gather(*(stream.close() for stream in self.streams.values()))
        if self._publisher is not None:
            await self._publisher.flush(self._settings.flush_seconds)
            for stream in self.streams.values():
                stream.write_record()
            if not await self._publisher.flush(min(1.0, self._settings.flush_seconds)):
                log.warning("%d bytes not acknowledged; replay repairs them", self._publisher.pending_bytes)
            await self._publisher.stop()
        if self._ownership is not None:
            await self._ownership.stop()
        if self._shared is not None:
            self._shared.context.destroy(linger=0)
        await self.telemetry.stop()

    async def _gained(self, partitions: list[int]) -> None:
        assert self._shared is not None
        settings = self._settings
        found = await recover(
            self._kafka,
            partitions,
            known_blocks=settings.strip_blocks if settings.strip_tokens else 0,
            known_records=settings.strip_recover_records,
        )
        self._shared.recovered.update(found)
        for known in found.values():
            if known.ahead:  # the next start need not read so far back
                self._shared.put_record(known.record)
                known.ahead = False

    async def _lost(self, partitions: list[int]) -> None:
        assert self._shared is not None
        assert self._publisher is not None
        shared, streams = self._shared, self.streams.values()
        for stream in streams:
            if stream.record is not None and pod_ids.pod_partition(stream.pod, shared.partitions) in partitions:
                stream.write_record()
                stream.hand_over()
        if self._caches is not None:
            self._caches.lost(partitions)
        for pod in list(shared.recovered):
            if pod_ids.pod_partition(pod, shared.partitions) in partitions:
                del shared.recovered[pod]
        if self._ownership is not None and self._ownership.leased():
            await self._publisher.flush(2.0)
        for number in partitions:
            for name in (topics.EVENTS, topics.PODS):
                self._publisher.discard(self._kafka.topic(name), number)

    def _open(self, spec: EngineSpec) -> None:
        assert self._shared is not None
        try:
            self.streams[spec.key] = PodStream(spec, self._shared)
        except EngineError as error:
            log.error("%s; left out", error)

    async def _found(self) -> list[EngineSpec]:
        pods = self._pods.asked() if self._pods is not None else []
        specs = await discover(self._settings, self._resolved, pods)
        kubernetes = self._pods is None or self._pods.listed.is_set()
        asked = (*self._settings.dns, *filter(is_http, self._settings.engines), *pods)
        self._complete = kubernetes and all(name in self._resolved for name in asked)
        return specs + (self._pods.specs() if self._pods is not None else [])

    def _bind(self) -> None:
        assert self._shared is not None
        self._inbound = [Inbound(text, self._shared, self.streams) for text in self._settings.bind]

    async def _sync(self, specs: list[EngineSpec]) -> None:
        wanted = {spec.key: spec for spec in specs}
        for key, spec in wanted.items():
            self._missing.pop(key, None)
            if key in self.streams and self.streams[key].spec != spec:
                await self._replace(key)
            if key not in self.streams:
                self._open(spec)
        for key, stream in self.streams.items():
            if stream.spec.bound:
                continue
            stream.leaving = key not in wanted
            if stream.leaving:
                self._missing.setdefault(key, time.monotonic())

    async def _replace(self, key: str) -> None:
        """Stop hearing an address of which other things are said now; the next stream there may take its pod.

        A pod that the next one does not take, since another one has the address now, ends like one that is not listed.
        """
        old = self.streams.pop(key)
        log.info("%s: listed otherwise than before; connecting anew", key)
        await old.close()
        self._replaced += 1
        self.streams[f"{key} (before change {self._replaced})"] = old

    async def _discover(self) -> None:
        while True:
            self._look.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), self._until_next_look())
            try:
                await self._sync(await self._found())
            except KvatlasError as error:
                log.warning("discovery: %s; keeping the endpoints of before", error)
            for key, since in list(self._missing.items()):
                if time.monotonic() - since >= self._settings.gone_seconds:
                    del self._missing[key]
                    await self._end(key)

    async def _end(self, key: str) -> None:
        """Stop hearing a pod and record that it is gone, also when the bridge is stopped meanwhile."""
        stream = self.streams.pop(key)
        try:
            await stream.close()
        finally:
            stream.end()

    def _until_next_look(self) -> float:
        """Seconds to the next look: not past the time when a missing endpoint is gone."""
        oldest = min(self._missing.values(), default=math.inf)
        left = oldest + self._settings.gone_seconds - time.monotonic()
        return max(0.05, min(self._settings.discovery_seconds, left))

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
        assert self._shared is not None
        settings, beats, written = self._settings, dict[str, int](), 0.0
        absent = Absent(self._shared)
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            if self._pods is not None and self._pods.failed is not None:
                raise self._pods.failed
            now, due = self._clock(), time.monotonic() - written >= settings.record_seconds
            if due:
                written = time.monotonic()
                if self._complete:
                    absent.look(written, self.streams)
            for inbound in self._inbound:
                for stream in inbound.left(time.monotonic(), settings.gone_seconds):
                    await self._end(stream.spec.key)
            for key, stream in list(self.streams.items()):
                stream.retry()
                silent = (now - stream.heard_ns) / 1e9
                stream.mark(records.STALE if silent >= settings.stale_seconds else records.LIVE)
                if silent >= settings.heartbeat_seconds and now - beats.get(key, 0) >= settings.heartbeat_seconds * 1e9:
                    beats[key] = now
                    stream.beat()
                if due and stream.changed:
                    stream.write_record()


def _error_of(done: asyncio.Future[None]) -> BaseException:
    return done.exception() or TaskEndedError("the producer has ended")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file's content; None when it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
