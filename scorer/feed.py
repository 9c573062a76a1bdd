"""Engines straight into an index: the bridge's streams in front, the workers' resolve behind, no log between.

Each engine has a stream of the bridge's (subscription, sequence tracking, gap repair) whose records go into a bounded
queue instead of Kafka. One task takes them out, pod by pod in turn, and applies them in this order:

1. resolve the messages into block updates (``engine_blocks`` is a dict per pod),
2. when an epoch rose, the pods' records first: readers must know of it before they see its entries,
3. the updates, into the index,
4. the pods' records,
5. acknowledge, which makes room in the queues.

A queue that is full leaves live messages to replay, as a bridge without Kafka does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, cast

import msgspec
import zmq
from xxhash import xxh3_64_intdigest

from kvatlas.bridge import records
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings, EngineSpec
from kvatlas.bridge.publisher import Item, Publisher
from kvatlas.bridge.recovery import Recovered
from kvatlas.bridge.stream import PodStream, Shared
from kvatlas.scorer.backends.base import Backend
from kvatlas.scorer.backends.errors import BackendError
from kvatlas.scorer.feed_state import FeedState, Kept, KeptView, Lasting, recovered_of
from kvatlas.scorer.pods import PodTable
from kvatlas.streams.codec import decode_blocks
from kvatlas.streams.effects import Effects
from kvatlas.streams.engine_sweep import sweep_engine_blocks
from kvatlas.streams.message import Message, parse_message
from kvatlas.streams.resolve import ResolveOptions, Resolver
from kvatlas.streams.view import DictView

log = logging.getLogger(__name__)

#: What a queued message costs beside its payload.
_OVERHEAD_BYTES: Final = 512
#: Messages of one pod applied before the next pod's turn.
_TURN_MESSAGES: Final = 16
#: Work done before other tasks of the loop run.
_SLICE_SECONDS: Final = 0.002
_TICK_SECONDS: Final = 0.25
_SWEEP_SLICE: Final = 5_000
#: Last messages of a pod by which its stream is known again after a restart.
_DIGESTS: Final = 64
_BACKOFF_SECONDS: Final = (0.05, 0.2, 0.5, 1.0, 2.0)


class Inbox:
    """Takes what one engine's stream has to say, in the place of the bridge's publisher.

    Attributes:
        items: messages and turns that wait to be applied.
        pending_bytes: what they take; the stream reads it to know whether there is room.
    """

    def __init__(self, feed: Feed) -> None:
        self.items: deque[Item] = deque()
        self.pending_bytes = 0
        self._feed = feed

    def send(self, topic: str, partition: int, item: Item) -> None:  # noqa: ARG002 - the publisher's signature
        """Take a record that the stream would send to ``topic``."""
        if topic == records.EVENTS:
            self.items.append(item)
            self.pending_bytes += len(item.value) + _OVERHEAD_BYTES
            self._feed.wake()
        elif topic == records.PODS:
            self._feed.pods.apply(item.key, item.value)
        else:
            self._feed.counts["messages_dead"] += 1

    def settle(self, taken: list[Item], offset: int) -> None:
        """Acknowledge applied records and give their room back."""
        for item in taken:
            self.pending_bytes -= len(item.value) + _OVERHEAD_BYTES
            if item.acknowledged is not None:
                item.acknowledged(offset)


class Engine:
    """One endpoint: its stream and its queue."""

    def __init__(self, spec: EngineSpec, feed: Feed, settings: BridgeSettings, clock: Callable[[], int]) -> None:
        self.spec = spec
        self.inbox = Inbox(feed)
        # Only `send` and `pending_bytes` of a publisher are used by a stream.
        shared = Shared(settings, cast("Publisher", self.inbox), lambda topic: topic, clock)
        shared.context.term()
        shared.context, shared.replays, shared.recovered = feed.context, feed.replays, feed.recovered
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
        self.counts: Counter[str] = Counter()
        self.pods = pods
        self.engines: dict[str, Engine] = {}
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.replays = asyncio.Semaphore(bridge.replay_parallel)
        self.recovered: dict[str, Recovered] = {}
        self._backend = backend
        self._bridge = bridge
        self._clock = clock
        self._resolver = Resolver(resolve, 1, clock)
        self._state = state
        self._touched: dict[str, None] = {}
        self._digests: dict[str, deque[tuple[int, int]]] = {}
        self._views: dict[str, DictView] = {}
        self._valid: dict[str, tuple[int, int]] = {}
        self._sweeps: asyncio.Queue[str] = asyncio.Queue()
        self._reported: set[str] = set()
        self._wake = asyncio.Event()
        self._offsets = itertools.count()
        self._applying = asyncio.Lock()
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
        if self._state is not None:
            if not isinstance(self._backend, Lasting):
                raise SettingsError(
                    f"state_dir: the {self._backend.name} backend is empty after a restart; use rocksdb or redis"
                )
            views, kept = await self._state.open(self._backend)
            self._views.update(views)
            for pod in kept:
                self._take_over(pod)
        self._tasks = [
            asyncio.create_task(work, name=name)
            for name, work in (("apply", self._run()), ("tick", self._tick()), ("sweep", self._sweep()))
        ]

    def _take_over(self, kept: Kept) -> None:
        """Go on with a pod as it was: it scores at once, as ``stale`` until its engine is heard."""
        known = recovered_of(kept)
        if known is None:
            return
        self.recovered[kept.pod] = known
        self._digests[kept.pod] = deque(kept.digests, _DIGESTS)
        self.pods.put(records.WRITER_BRIDGE, kept.pod, known.record)
        if kept.streams:
            self.pods.apply(records.pod_key(records.WRITER_STREAMS, kept.pod), kept.streams)
        self._valid[kept.pod] = (known.record.valid_from, known.record.gpu_valid_from)

    async def stop(self) -> None:
        """Stop reading and applying."""
        for engine in self.engines.values():
            await engine.stream.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.context.destroy(linger=0)
        if self._state is not None:
            self._state.close()

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
            self.engines[spec.key] = Engine(spec, self, self._bridge, self._clock)

    async def remove(self, pod: str) -> bool:
        """Leave a pod: its blocks score no more and are dropped from the index; False when there is no such pod."""
        leaving = [key for key, engine in self.engines.items() if pod in (engine.stream.pod, key)]
        for key in leaving:
            engine = self.engines.pop(key)
            await engine.stream.close()
            engine.stream.end()
            async with self._applying:
                await self._apply([engine], until=None)
            await self._forget(engine.stream.pod)
        return bool(leaving)

    async def _forget(self, pod: str) -> None:
        record = self.pods.merged.get(pod)
        for writer in (records.WRITER_BRIDGE, records.WRITER_STREAMS):
            self.pods.apply(records.pod_key(writer, pod), None)
        view = self._views.pop(pod, None)
        if self._state is not None:
            self._state.drop(pod, view)
        self._valid.pop(pod, None)
        if record is not None:
            # Were the engine added again at once, its incarnation must still lie above all that were used.
            self.recovered[pod] = Recovered(
                records.PodRecord(pod=pod, writer=records.WRITER_BRIDGE, epoch=record.epoch)
            )
            with contextlib.suppress(BackendError):  # only room is lost: nobody reads entries of an ended epoch
                await self._backend.drop_epoch(records.pod_ref(pod), record.epoch)

    @property
    def stale(self) -> bool:
        """False: what comes is applied as it comes, and freshness tells of each pod what does not."""
        return False

    @property
    def caught_up(self) -> bool:
        """Whether every engine's messages so far have been applied."""
        return all(engine.caught_up for engine in self.engines.values()) and not self._applying.locked()

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
                async with self._applying:
                    await self._apply(waiting, until=time.perf_counter() + _SLICE_SECONDS)
                await asyncio.sleep(0)

    async def _apply(self, engines: list[Engine], until: float | None) -> None:
        """Apply what waits, in turns, until it is done or the time is over."""
        effects = self._resolver.effects()
        taken: list[tuple[Engine, list[Item]]] = []
        while engines and (until is None or time.perf_counter() < until):
            for engine in engines:
                items = engine.inbox.items
                part = [items.popleft() for _ in range(min(len(items), _TURN_MESSAGES))]
                taken.append((engine, part))
                for item in part:
                    self._resolve(engine, item, effects)
            engines = [engine for engine in engines if engine.inbox.items]
        await self._commit(effects)
        offset = next(self._offsets)
        for engine, part in taken:
            engine.inbox.settle(part, offset)

    async def record(self, message: Message) -> None:
        """Apply one message that no stream of ours read."""
        async with self._applying:
            effects = self._resolver.effects()
            self._resolver.apply(self._view(message.pod), message, effects)
            await self._commit(effects)

    async def _commit(self, effects: Effects) -> None:
        if effects.urgent:
            self._announce(effects)
        for payloads in effects.encode().values():
            for payload in payloads:
                await self._write(payload)
        self._tell(effects)
        self._keep()
        self.counts.update(effects.counts)

    def _keep(self) -> None:
        """Write down what was learnt; in memory it is already, so that a crash before this repeats it."""
        if self._state is None or not self._touched:
            return
        touched, self._touched = list(self._touched), {}
        kept = []
        for pod in touched:
            parts = self.pods.parts(pod)
            bridge, streams = parts.get(records.WRITER_BRIDGE), parts.get(records.WRITER_STREAMS)
            digests = list(self._digests.get(pod, ()))
            kept.append(
                Kept(
                    pod,
                    records.encode(bridge) if bridge is not None else b"",
                    records.encode(streams) if streams is not None else b"",
                    digests,
                )
            )
        views = (self._views.get(pod) for pod in touched)
        self._state.write([view for view in views if isinstance(view, KeptView)], kept)

    def _view(self, pod: str) -> DictView:
        view = self._views.get(pod)
        if view is None:
            view = self._views[pod] = DictView() if self._state is None else KeptView(pod)
        if self._state is not None:
            self._touched[pod] = None
        return view

    def _resolve(self, engine: Engine, item: Item, effects: Effects) -> None:
        spec = engine.spec
        headers = item.headers
        if spec.store:
            headers = [*headers, (records.H_STORE, spec.store.encode())]
        if spec.announcements:
            headers = [*headers, (records.H_ANNOUNCEMENTS, spec.announcements.encode())]
        message = parse_message(item.key, item.value, headers)
        if self._state is not None and message.sequence >= 0:
            digests = self._digests.setdefault(message.pod, deque(maxlen=_DIGESTS))
            digests.append((message.sequence, xxh3_64_intdigest(item.value)))
        self._resolver.apply(self._view(message.pod), message, effects)

    async def _write(self, payload: bytes) -> None:
        record = decode_blocks(payload)
        for attempt in itertools.count():
            try:
                await self._backend.apply(record)
            except BackendError as error:
                if not error.retriable:
                    raise
                pause = _BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)]
                (log.warning if attempt == 0 else log.debug)("%s; trying again every %.2g s", error, pause)
                self.counts["backend_retries"] += 1
                await asyncio.sleep(pause)
            else:
                return

    def _announce(self, effects: Effects) -> None:
        """Tell of risen epochs before their updates are in the index, and not yet of the messages they came with."""
        for pod, record in effects.pods.items():
            before = self.pods.merged.get(pod)
            received = before.receive_ns if before is not None else 0
            self.pods.put(
                records.WRITER_STREAMS, pod, msgspec.structs.replace(record, last_sequence=-1, receive_ns=received)
            )

    def _tell(self, effects: Effects) -> None:
        for pod, record in effects.pods.items():
            self.pods.put(records.WRITER_STREAMS, pod, record)
            valid = (record.valid_from, record.gpu_valid_from)
            before = self._valid.get(pod)
            if before != valid:
                self._valid[pod] = valid
                if before is not None:
                    self._sweeps.put_nowait(pod)
        for letter in effects.dead:
            # The counts have them all; an engine that goes on sending what cannot be read must not fill the log.
            first = letter.pod not in self._reported
            self._reported.add(letter.pod)
            log.log(logging.WARNING if first else logging.DEBUG, "pod %s: %s; left out", letter.pod, letter.reason)

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
                silent = (now - stream.heard_ns) / 1e9
                stream.mark(records.STALE if silent >= settings.stale_seconds else records.LIVE)
                if silent >= settings.heartbeat_seconds and now - beats.get(key, 0) >= settings.heartbeat_seconds * 1e9:
                    beats[key] = now
                    stream.beat()
                if due and stream.changed:
                    stream.write_record()

    async def _sweep(self) -> None:
        """Give back the room of ended epochs; nothing reads it in any case."""
        while True:
            pod = await self._sweeps.get()
            valid, view = self._valid.get(pod), self._views.get(pod)
            if valid is None or view is None:
                continue
            ref = records.pod_ref(pod)
            keys = list(view.values)
            for start in range(0, len(keys), _SWEEP_SLICE):
                part = keys[start : start + _SWEEP_SLICE]
                found = sweep_engine_blocks(
                    ((key, value) for key in part if (value := view.values.get(key)) is not None), {ref: valid}
                )
                for key, value in found.puts.items():
                    view.put(key, value)
                for key in found.deletes:
                    view.delete(key)
                await asyncio.sleep(0)
            try:
                self.counts["holders_swept"] += await self._backend.drop_epoch(ref, *valid)
            except BackendError as error:
                log.warning("sweep of pod %s: %s", pod, error)
