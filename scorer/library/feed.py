"""Engines straight into an index: the bridge's streams in front, the workers' resolve behind, no log between.

Each engine has a stream of the bridge's (subscription, sequence tracking, gap repair) whose records go into a bounded
queue instead of Kafka. One task takes them out, pod by pod in turn, applies them (see
:mod:`kvatlas.scorer.library.feed_apply`) and acknowledges, which makes room in the queues.

A queue that is full leaves live messages to replay, as a bridge without Kafka does.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, cast

import zmq

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.ingest.stream import PodStream, Shared
from kvatlas.bridge.kafka.producer import QueuedRecord, RecordProducer
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.tasks import end_tasks
from kvatlas.scorer.library.backends.base import Backend
from kvatlas.scorer.library.feed_apply import Applier
from kvatlas.scorer.library.saved_state import FeedState
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.streams.resolve.message import Message, parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions

#: What a queued message costs beside its payload.
_OVERHEAD_BYTES: Final = 512
#: Messages of one pod applied before the next pod's turn.
_TURN_MESSAGES: Final = 16
#: Work done before other tasks of the loop run.
_SLICE_SECONDS: Final = 0.002
_TICK_SECONDS: Final = 0.25


class Inbox:
    """Takes what one engine's stream has to say, in the place of the bridge's publisher.

    Attributes:
        items: messages and turns that wait to be applied.
        pending_bytes: what they take; the stream reads it to know whether there is room.
    """

    def __init__(self, feed: Feed) -> None:
        self.items: deque[QueuedRecord] = deque()
        self.pending_bytes = 0
        self._feed = feed

    def send(self, topic: str, partition: int, item: QueuedRecord) -> None:  # noqa: ARG002 - the publisher's signature
        """Take a record that the stream would send to ``topic``."""
        if topic == topics.EVENTS:
            self.items.append(item)
            self.pending_bytes += len(item.value) + _OVERHEAD_BYTES
            self._feed.wake()
        elif topic == topics.PODS:
            self._feed.pods.apply(item.key, item.value)
        else:
            self._feed.counts["messages_dead"] += 1

    def settle(self, taken: list[QueuedRecord], offset: int) -> None:
        """Acknowledge applied records and give their room back."""
        for item in taken:
            self.pending_bytes -= len(item.value) + _OVERHEAD_BYTES
            if item.acknowledged is not None:
                item.acknowledged(offset)


class FedEngine:
    """One endpoint: its stream and its queue."""

    def __init__(self, spec: EngineSpec, feed: Feed, settings: BridgeSettings, clock: Callable[[], int]) -> None:
        self.spec = spec
        self.inbox = Inbox(feed)
        # Only `send` and `pending_bytes` of a publisher are used by a stream.
        shared = Shared(settings, cast("RecordProducer", self.inbox), lambda topic: topic, clock)
        shared.context.term()
        shared.context, shared.replays, shared.recovered = feed.context, feed.replays, feed.recovered
        shared.claims, shared.silent_replays = feed.claims, feed.silent_replays
        self.shared = shared
        self._opened_ns = clock()
        self.stream = PodStream(spec, shared)

    @property
    def caught_up(self) -> bool:
        """Whether all that the engine had published when it was asked has been applied."""
        tracker = self.stream.tracker
        if tracker is None:
            return not self.spec.replay or self.stream.heard_ns > self._opened_ns
        return not self.inbox.items and not tracker.hole and tracker.request is None


class Feed:
    """All engines of an indexer.

    Attributes:
        counts: what was applied, by name, as the workers count it.
        pods: where the pods' records go.
        engines: by live address.
        applier: what brings messages into the index.
    """

    def __init__(
        self,
        backend: Backend,
        pods: PodTable,
        *,
        bridge: BridgeSettings,
        resolve: ResolveOptions,
        clock: Callable[[], int] = time.time_ns,
        state: FeedState | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            backend: the index.
            pods: table of pods that scores are walked with.
            bridge: subscription, replay and queue settings; ``buffer_bytes`` bounds each engine's queue.
            resolve: what events mean.
            clock: wall clock, ns.
            state: where what was learnt is kept; None keeps it in memory alone.
        """
        self.applier = Applier(backend, pods, resolve=resolve, clock=clock, state=state)
        self.counts: Counter[str] = self.applier.counts
        self.pods = pods
        self.engines: dict[str, FedEngine] = {}
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.replays = asyncio.Semaphore(bridge.replay_parallel)
        self.silent_replays = asyncio.Semaphore(bridge.replay_parallel)
        self.claims: dict[str, PodStream] = {}
        self.recovered: dict[str, Recovered] = {}
        self._bridge = bridge
        self._clock = clock
        self._wake = asyncio.Event()
        self._offsets = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []

    def wake(self) -> None:
        """Tell the applying task that there is something to do."""
        self._wake.set()

    async def start(self) -> None:
        """Take over what an earlier run has kept, and start applying.

        Raises:
            BackendError: what was kept cannot be opened.
            SettingsError: the index does not last, so that nothing that is kept would go with it.
        """
        self.recovered.update(await self.applier.open())
        work = {
            "apply": self._run(),
            "tick": self._tick(),
            "sweep": self.applier.sweep(),
            "watch": self.applier.watch(),
        }
        self._tasks = [asyncio.create_task(each, name=name) for name, each in work.items()]

    async def stop(self) -> None:
        """Stop reading and applying."""
        for engine in self.engines.values():
            await engine.stream.close()
        await end_tasks(self._tasks)
        self.context.destroy(linger=0)
        self.applier.close()

    def failed(self) -> BaseException | None:
        """Return what ended one of the tasks, None while all work."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                return error
        return None

    # --- engines --------------------------------------------------------------------------------------------------

    def add(self, spec: EngineSpec) -> None:
        """Subscribe to an engine; one that is there already stays as it is.

        Raises:
            EngineError: the address cannot be used.
            SettingsError: the engine connects to us, which only a bridge takes.
        """
        if not spec.live:
            raise SettingsError("engine without an address: the indexer connects to engines; a bridge can be bound")
        if spec.key not in self.engines:
            self.engines[spec.key] = FedEngine(spec, self, self._bridge, self._clock)

    async def remove(self, pod: str) -> bool:
        """Leave a pod: its blocks score no more and are dropped from the index; False when there is no such pod."""
        leaving = [key for key, engine in self.engines.items() if pod in (engine.stream.pod, key)]
        for key in leaving:
            engine = self.engines.pop(key)
            name, held = engine.stream.pod, not engine.stream.waiting  # it names its endpoint once it has ended
            await engine.stream.close()
            engine.stream.end()
            if held:
                self.claims[name] = engine.stream  # who waits for the pod must not have it before all is forgotten
                try:
                    await self._forget(engine, name)
                finally:
                    del self.claims[name]
        return bool(leaving)

    async def _forget(self, engine: FedEngine, name: str) -> None:
        async with self.applier.lock:
            await self._apply([engine], until=None)
        epoch = await self.applier.forget(name)
        if epoch:
            # Were the engine added again at once, its incarnation must still lie above all that were used.
            record = records.PodRecord(pod=name, writer=pod_ids.WRITER_BRIDGE, epoch=epoch)
            self.recovered[record.pod] = Recovered(record)

    @property
    def stale(self) -> bool:
        """False: what comes is applied as it comes, and freshness tells of each pod what does not."""
        return False

    @property
    def rebuilding(self) -> bool:
        """False: an index that is written anew says itself what it does not have yet."""
        return False

    @property
    def caught_up(self) -> bool:
        """Whether every engine's messages so far have been applied."""
        return all(engine.caught_up for engine in self.engines.values()) and not self.applier.lock.locked()

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait in all queues."""
        return sum(engine.inbox.pending_bytes for engine in self.engines.values())

    # --- applying -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while waiting := [engine for engine in self.engines.values() if engine.inbox.items]:
                async with self.applier.lock:
                    await self._apply(waiting, until=time.perf_counter() + _SLICE_SECONDS)
                await asyncio.sleep(0)

    async def _apply(self, engines: list[FedEngine], until: float | None) -> None:
        """Apply what waits, in turns, until it is done or the time is over."""
        effects = self.applier.effects()
        taken: list[tuple[FedEngine, list[QueuedRecord]]] = []
        while engines and (until is None or time.perf_counter() < until):
            for engine in engines:
                items = engine.inbox.items
                part = [items.popleft() for _ in range(min(len(items), _TURN_MESSAGES))]
                taken.append((engine, part))
                for item in part:
                    self.applier.resolve(_message(engine.spec, item), effects, streamed=True)
            engines = [engine for engine in engines if engine.inbox.items]
        await self.applier.commit(effects)
        offset = next(self._offsets)
        for engine, part in taken:
            engine.inbox.settle(part, offset)

    async def record(self, message: Message) -> None:
        """Apply one message that no stream of ours read."""
        async with self.applier.lock:
            effects = self.applier.effects()
            self.applier.resolve(message, effects, streamed=False)
            await self.applier.commit(effects)

    # --- in the background ----------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        settings, beats, written = self._bridge, dict[str, int](), 0.0
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = self._clock()
            due = time.monotonic() - written >= settings.record_seconds
            if due:
                written = time.monotonic()
            for key, engine in self.engines.items():
                stream = engine.stream
                stream.retry()  # two engines may name one pod: the second waits until the first has left it
                silent = (now - stream.heard_ns) / 1e9
                stream.mark(records.STALE if silent >= settings.stale_seconds else records.LIVE)
                if silent >= settings.heartbeat_seconds and now - beats.get(key, 0) >= settings.heartbeat_seconds * 1e9:
                    beats[key] = now
                    stream.beat()
                if due and stream.changed:
                    stream.write_record()


def _message(spec: EngineSpec, item: QueuedRecord) -> Message:
    """Return what is to be applied of a record that an engine's stream sent."""
    return parse_message(item.key, item.value, [*item.headers, *spec.headers()])
