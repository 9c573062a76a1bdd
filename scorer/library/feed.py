"""Engines straight into an index: the bridge's streams in front, the workers' resolve behind, no log between.

The bridge's engine streams (subscription, sequence tracking, gap repair) send their records into a bounded queue for
each pod instead of Kafka. One task takes them out, pod by pod in turn, applies them (see
:mod:`kvatlas.scorer.library.feed_apply`) and acknowledges, which makes room in the queues.

A queue that is full leaves live messages to replay, as a bridge without Kafka does.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.ingest.streams import TICK_SECONDS, EngineStreams
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.sink import QueuedRecord
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.tasks import Background
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


class _PodQueue:
    """Messages and turns of a pod that wait to be applied, and what they take."""

    __slots__ = ("items", "key", "pending_bytes")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.items: deque[QueuedRecord] = deque()
        self.pending_bytes = 0


class Feed:
    """All engines of an indexer: the record sink of their streams.

    Attributes:
        counts: what was applied, by name, as the workers count it.
        streams: the engines' endpoints.
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
            bridge: subscription, replay and queue settings; ``buffer_bytes`` bounds each pod's queue.
            resolve: what events mean.
            clock: wall clock, ns.
            state: where what was learnt is kept; None keeps it in memory alone.
        """
        self.applier = Applier(backend, pods, resolve=resolve, clock=clock, state=state)
        self.counts: Counter[str] = self.applier.counts
        self._pods = pods
        self._background = Background()
        self.streams = EngineStreams(bridge, self, clock, self._background)
        self._queues: dict[bytes, _PodQueue] = {}
        self._queue_bytes = bridge.buffer_bytes
        self._wake = asyncio.Event()
        self._offsets = itertools.count()

    async def start(self) -> None:
        """Take over what an earlier run has kept, and start applying.

        Raises:
            BackendError: what was kept cannot be opened.
            SettingsError: the index does not last, so that nothing that is kept would go with it.
        """
        self.streams.adopt(await self.applier.open())
        for work in (self._run(), self._tick(), *self.applier.tasks()):
            self._background.start(work)

    async def stop(self) -> None:
        """Stop reading and applying."""
        self._background.stopping()
        await self.streams.close()
        await self._background.stop()
        self.streams.wires.close()
        self.applier.close()

    def failed(self) -> BaseException | None:
        """Return what ended one of the tasks, None while all work."""
        return self._background.failure

    # --- the sink -------------------------------------------------------------------------------------------------

    def room(self, key: bytes) -> bool:
        """Whether a pod's queue takes more."""
        queue = self._queues.get(key)
        return queue is None or queue.pending_bytes < self._queue_bytes

    def send(self, topic: str, partition: int, item: QueuedRecord) -> None:  # noqa: ARG002 - there is one partition
        """Take a record of a pod's stream."""
        if topic == topics.EVENTS:
            queue = self._queues.get(item.key)
            if queue is None:
                queue = self._queues[item.key] = _PodQueue(item.key)
            queue.items.append(item)
            queue.pending_bytes += len(item.value) + _OVERHEAD_BYTES
            self._wake.set()
        elif topic == topics.PODS:
            self._pods.apply(item.key, item.value)
        else:
            self.counts["messages_dead"] += 1

    def pending_bytes(self, pod: str) -> int:
        """Return the bytes that wait in a pod's queue."""
        queue = self._queues.get(pod.encode())
        return 0 if queue is None else queue.pending_bytes

    # --- engines --------------------------------------------------------------------------------------------------

    def add(self, spec: EngineSpec) -> None:
        """Subscribe to an engine; one that is there already stays as it is.

        Raises:
            EngineError: the address cannot be used.
            SettingsError: the engine connects to us, which only a bridge takes.
        """
        if not spec.live:
            raise SettingsError("engine without an address: the indexer connects to engines; a bridge can be bound")
        if spec.key not in self.streams.endpoints:
            self.streams.open(spec)

    async def remove(self, pod: str) -> bool:
        """Leave a pod: its blocks score no more and are dropped from the index; False when there is no such pod."""
        endpoints, claims = self.streams.endpoints, self.streams.shared.claims
        leaving = [key for key, endpoint in endpoints.items() if pod in (endpoint.pod, key)]
        for key in leaving:
            endpoint = endpoints[key]
            name, held = endpoint.pod, not endpoint.waiting  # it names its endpoint once it has ended
            await self.streams.end(key)
            if held:
                claims[name] = endpoint  # who waits for the pod must not have it before all is forgotten
                try:
                    await self._forget(name)
                finally:
                    del claims[name]
        return bool(leaving)

    async def _forget(self, name: str) -> None:
        async with self.applier.lock:
            await self._apply([queue for key, queue in self._queues.items() if key == name.encode()], until=None)
        epoch = await self.applier.forget(name)
        if epoch:
            # Were the engine added again at once, its incarnation must still lie above all that were used.
            record = records.PodRecord(pod=name, writer=pod_ids.WRITER_BRIDGE, epoch=epoch)
            self.streams.shared.recovered[name] = Recovered(record)

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
        return not self.late() and not self.applier.lock.locked()

    def late(self) -> list[str]:
        """Return the addresses of engines that have said what is not applied yet."""
        return [
            endpoint.spec.live
            for endpoint in self.streams.endpoints.values()
            if not endpoint.caught_up or self.pending_bytes(endpoint.pod)
        ]

    # --- applying -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queues:
                async with self.applier.lock:
                    await self._apply(list(self._queues.values()), until=time.perf_counter() + _SLICE_SECONDS)
                await asyncio.sleep(0)

    async def _apply(self, queues: list[_PodQueue], until: float | None) -> None:
        """Apply what waits, in turns, until it is done or the time is over."""
        effects = self.applier.effects()
        taken: list[tuple[_PodQueue, QueuedRecord]] = []
        while queues and (until is None or time.perf_counter() < until):
            for queue in queues:
                for _ in range(min(len(queue.items), _TURN_MESSAGES)):
                    item = queue.items.popleft()
                    taken.append((queue, item))
                    self.applier.resolve(parse_message(item.key, item.value, item.headers), effects, streamed=True)
            queues = [queue for queue in queues if queue.items]
        await self.applier.commit(effects)
        offset = next(self._offsets)
        for queue, item in taken:
            queue.pending_bytes -= len(item.value) + _OVERHEAD_BYTES
            if not queue.pending_bytes:
                del self._queues[queue.key]
            if item.acknowledged is not None:
                item.acknowledged(item, offset)

    async def record(self, message: Message) -> None:
        """Apply one message that no stream of ours read."""
        async with self.applier.lock:
            effects = self.applier.effects()
            self.applier.resolve(message, effects, streamed=False)
            await self.applier.commit(effects)

    # --- in the background ----------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self.streams.tick(complete=False)
