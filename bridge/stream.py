"""One engine endpoint at work: its socket, its tracker, its replays, its pod record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec
import zmq

from kvatlas.bridge import records
from kvatlas.bridge.adapters.fields import count_events, peek_rank
from kvatlas.bridge.identity import Identity, identify
from kvatlas.bridge.options import BridgeSettings, EngineSpec
from kvatlas.bridge.publisher import Item, Publisher
from kvatlas.bridge.records import Control, PodRecord
from kvatlas.bridge.recovery import Recovered, apply_control, read_ts
from kvatlas.bridge.replay import replay
from kvatlas.bridge.sequence import Forward, Message, Output, Tracker, Turn
from kvatlas.bridge.strip import KnownBlocks, Stripper
from kvatlas.bridge.subscriber import Subscriber

_SEQUENCE_MAX: Final = 1 << 48
_DLQ_BYTES: Final = 1024 * 1024

log = logging.getLogger(__name__)


class Shared:
    """What all streams of a bridge use, and what they count.

    Attributes:
        dead: messages that were dead-lettered, by reason.
        oversized: messages over the size limit.
        keyless: blocks forwarded without keys, where tokens are stripped.
        messages, bytes, events: forwarded.
    """

    def __init__(
        self, settings: BridgeSettings, publisher: Publisher, topic: Callable[[str], str], now_ns: Callable[[], int]
    ) -> None:
        """Gather what the streams need."""
        self.settings = settings
        self.publisher = publisher
        self.topic = topic
        self.now_ns = now_ns
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.recovered: dict[str, Recovered] = {}
        self.partitions = 1
        self.replays = asyncio.Semaphore(settings.replay_parallel)
        self.owns: Callable[[int], bool] = lambda _: True
        self.dead: dict[str, int] = {}
        self.oversized = 0
        self.keyless = 0
        self.events = 0
        self.messages = 0
        self.acknowledged = 0
        self.observe: Callable[[int], None] | None = None
        self.bytes = 0

    def room(self) -> bool:
        """Whether the buffer for Kafka takes more."""
        return self.publisher.pending_bytes < self.settings.buffer_bytes

    def dead_letter(self, pod: str, frames: list[bytes], reason: str, origin: str) -> None:
        """Put what cannot be tracked on the DLQ, cut to a bounded size."""
        label = reason.partition(":")[0]
        self.dead[label] = self.dead.get(label, 0) + 1
        log.warning("%s: %s", origin, reason)
        if not self.room():
            return
        if self.settings.strip_tokens:
            frames = [b""]  # what cannot be read may hold tokens
        value = (
            frames[-1] if len(frames) == 3 else msgspec.msgpack.encode([frame[:_DLQ_BYTES] for frame in frames[:16]])
        )
        headers = [(records.H_REASON, reason.encode()), (records.H_ORIGIN, origin.encode())]
        number = records.pod_partition(pod, self.partitions)
        item = Item(pod.encode(), value[:_DLQ_BYTES], headers, None)
        self.publisher.send(self.topic(records.DLQ), number, item)


def open_socket(
    shared: Shared,
    address: str,
    receive: Callable[[list[bytes]], None],
    reconnected: Callable[[], None],
    *,
    bind: bool = False,
) -> Subscriber:
    """Open a SUB socket as the settings say.

    Raises:
        EngineError: the address cannot be used.
    """
    return Subscriber(
        shared.context,
        address,
        receive,
        reconnected=reconnected,
        topic_filter=shared.settings.topic_filter,
        hwm=shared.settings.receive_hwm,
        max_bytes=shared.settings.socket_message_bytes,
        bind=bind,
    )


class PodStream:
    """The stream of one endpoint. Its pod is known with the first message.

    Attributes:
        record: the pod's record as acknowledged, None before the first message.
        changed: whether ``record`` is newer than what ``kv-pods`` has.
    """

    def __init__(self, spec: EngineSpec, shared: Shared) -> None:
        """Connect to the endpoint and ask for what was missed.

        Raises:
            EngineError: the address cannot be used.
        """
        self.spec = spec
        self.record: PodRecord | None = None
        self.changed = False
        self.tracker: Tracker | None = None
        self.heard_ns = shared.now_ns()
        self._shared = shared
        self._identity: Identity | None = None
        self._partition = 0
        self._fixed: records.Headers = []
        self._stripper: Stripper | None = None
        self._key = b""
        self._topic = b""
        self._wake = asyncio.Event()
        self._probe = True
        self._socket = None if spec.bound else open_socket(shared, spec.live, self.received, self.reconnected)
        self._task = asyncio.create_task(self._repair(), name=f"replay-{spec.live}") if spec.replay else None

    async def close(self) -> None:
        """Stop reading; what was accepted still goes out."""
        if self._socket is not None:
            self._socket.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def pod(self) -> str:
        """The pod id, or the endpoint's own name before it is known."""
        return self._identity.pod_id if self._identity else self.spec.fallback_pod

    def beat(self) -> None:
        """Ask a silent engine for its tail: a lost last message leaves no hole, and an answer is a sign of life."""
        if self.tracker is not None:
            self.tracker.probe()
        self._probe = True
        self._wake.set()

    def end(self) -> None:
        """Record that the pod is gone."""
        if self.tracker is not None and self.record is not None:
            incarnation = self._next_incarnation(self.tracker.incarnation)
            self._control(Control(type="gone", incarnation=incarnation, reason="no longer listed by discovery"))

    # --- live ----------------------------------------------------------------------------------------------------

    def received(self, frames: list[bytes]) -> None:
        """Take the frames of one live message."""
        shared = self._shared
        if len(frames) != 3:
            shared.dead_letter(self.pod, frames, f"wrong number of frames: {len(frames)}", self.spec.live)
            return
        topic, number, payload = frames
        if len(number) != 8:
            shared.dead_letter(self.pod, frames, f"sequence frame size: {len(number)} bytes", self.spec.live)
            return
        sequence = int.from_bytes(number, "big")
        if sequence >= _SEQUENCE_MAX:
            shared.dead_letter(self.pod, frames, f"implausible sequence: {sequence}", self.spec.live)
            return
        now = self.heard_ns = shared.now_ns()
        tracker = self.tracker
        if tracker is None or topic != self._topic:
            tracker = self._known(topic, payload)
        if tracker is None:
            return
        if not shared.room():
            tracker.shed(sequence)
            self._wake.set()
            return
        size = len(payload)
        if size <= shared.settings.message_bytes and tracker.accept(sequence, payload):
            self._forward(Message(sequence, topic, payload, now), tracker.incarnation)
            return
        self._take(tracker.live(self._message(sequence, topic, payload, now, records.SOURCE_LIVE)))
        if tracker.request is not None:
            self._wake.set()

    def _message(self, sequence: int, topic: bytes, payload: bytes, now: int, source: str) -> Message:
        if len(payload) <= self._shared.settings.message_bytes:
            return Message(sequence, topic, payload, now, source)
        self._shared.oversized += 1
        reason = f"oversized: message {sequence} of {len(payload)} bytes is over the limit"
        self._shared.dead_letter(self.pod, [topic, b"", b""], reason, self.spec.live)
        return Message(sequence, topic, None, now, source)

    def _known(self, topic: bytes, payload: bytes) -> Tracker | None:
        """Find out whose stream it is; None when it is another bridge's."""
        found = identify(topic, peek_rank(payload), self.spec)
        if self._identity is not None and found.pod_id == self._identity.pod_id:
            self._topic = topic
            return self.tracker
        if self._identity is not None:
            log.info("%s: pod %s became %s", self.spec.live, self._identity.pod_id, found.pod_id)
            self.end()
            self.tracker = None
        shared = self._shared
        self._identity, self._topic = found, topic
        self._key = found.pod_id.encode()
        self._partition = records.pod_partition(found.pod_id, shared.partitions)
        content = records.CONTENT_KEYS if shared.settings.strip_tokens else records.CONTENT_ENGINE
        self._fixed = [
            (records.H_CONTENT_TYPE, content.encode()),
            (records.H_ENGINE, self.spec.engine.encode()),
            (records.H_MODEL, found.model.encode()),
        ]
        for name, value in ((records.H_STORE, self.spec.store), (records.H_ANNOUNCEMENTS, self.spec.announcements)):
            if value:
                self._fixed.append((name, value.encode()))
        if not shared.owns(self._partition):
            self._identity = None
            return None
        known = shared.recovered.pop(found.pod_id, None)
        base = known.record if known else PodRecord(pod=found.pod_id, writer=records.WRITER_BRIDGE)
        self.record = msgspec.structs.replace(
            base,
            state=records.LIVE,
            model=found.model,
            engine=self.spec.engine,
            endpoint=self.spec.live,
            dp_rank=found.rank,
            store=self.spec.store,
        )
        settings = shared.settings
        if settings.strip_tokens:
            blocks = known.blocks if known and known.blocks is not None else KnownBlocks(settings.strip_blocks)
            self._stripper = Stripper(
                self.spec.engine, found.model, settings.block_size_tokens, settings.limits(), blocks
            )
        self.tracker = Tracker(
            known.position() if known else Recovered(base).position(),
            next_incarnation=self._next_incarnation,
            read_ts=read_ts,
            tries=settings.replay_tries,
            hold_messages=settings.hold_messages,
            hold_bytes=settings.hold_bytes,
            can_replay=bool(self.spec.replay),
        )
        self._take(self.tracker.begin())
        log.info("%s: pod %s from sequence %d", self.spec.live, found.pod_id, self.tracker.expected)
        return self.tracker

    def _next_incarnation(self, previous: int) -> int:
        return max(previous + 1, self._shared.now_ns() // 1_000_000_000)

    def reconnected(self) -> None:
        """Note that the connection was down."""
        if self.tracker is not None:
            self.tracker.reconnected()
        self._probe = True
        self._wake.set()

    # --- to the log ----------------------------------------------------------------------------------------------

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, Forward):
                self._forward(output.message, output.incarnation)
            else:
                self._turn(output)

    def _forward(self, message: Message, incarnation: int) -> None:
        payload = message.payload
        assert payload is not None
        shared = self._shared
        headers = [
            (records.H_SEQUENCE, b"%d" % message.sequence),
            (records.H_ENGINE_TOPIC, message.topic),
            (records.H_RECEIVE_NS, b"%d" % message.receive_ns),
            (records.H_SOURCE, message.source.encode()),
            (records.H_INCARNATION, b"%d" % incarnation),
            *self._fixed,
        ]
        shared.messages += 1
        shared.bytes += len(payload)
        shared.events += count_events(payload)

        def acknowledged(offset: int) -> None:
            self._acknowledged = (message, offset)
            self.changed = True
            shared.acknowledged += 1
            if shared.observe is not None:
                shared.observe(message.receive_ns)

        value = payload if self._stripper is None else self._strip(self._stripper, message)
        item = Item(self._key, value, headers, acknowledged)
        shared.publisher.send(shared.topic(records.EVENTS), self._partition, item)

    def _strip(self, stripper: Stripper, message: Message) -> bytes:
        """Return what is stored of a message where token ids must not be."""
        batch, rejected, keyless = stripper.strip(message.payload or b"")
        self._shared.keyless += keyless
        for reason in rejected:
            origin = f"{self.spec.live} message {message.sequence}"
            self._shared.dead_letter(self.pod, [b""], f"event not usable: {reason}", origin)
        return records.encode(batch)

    _acknowledged: tuple[Message, int] | None = None

    def _turn(self, turn: Turn) -> None:
        if turn.kind == "restart" and self._stripper is not None:
            self._stripper.known.clear()
        level = logging.INFO if turn.kind == "start" else logging.WARNING
        log.log(level, "%s: %s %d..%d: %s", self.pod, turn.kind, turn.first_lost, turn.last_lost, turn.reason)
        self._control(
            Control(
                type=turn.kind,
                incarnation=turn.incarnation,
                first_lost=turn.first_lost,
                last_lost=turn.last_lost,
                reason=turn.reason,
            )
        )

    def _control(self, control: Control) -> None:
        shared = self._shared
        headers = [
            (records.H_CONTENT_TYPE, records.CONTENT_CONTROL.encode()),
            (records.H_INCARNATION, b"%d" % control.incarnation),
            (records.H_RECEIVE_NS, b"%d" % shared.now_ns()),
            *self._fixed[1:],
        ]

        def acknowledged(offset: int) -> None:
            current = self._settled()
            if current is not None:
                self.record = msgspec.structs.replace(
                    apply_control(current, control), events_partition=self._partition, events_offset=offset
                )
                self.write_record()

        item = Item(self._key, records.encode(control), headers, acknowledged)
        shared.publisher.send(shared.topic(records.EVENTS), self._partition, item)

    def _settled(self) -> PodRecord | None:
        """Fold the newest acknowledged message into the record."""
        if self._acknowledged is not None and self.record is not None:
            message, offset = self._acknowledged
            self._acknowledged = None
            ts = read_ts(message.payload or b"")
            self.record = msgspec.structs.replace(
                self.record,
                last_sequence=message.sequence,
                last_event_ns=0 if ts is None else int(ts * 1e9),
                receive_ns=message.receive_ns,
                events_partition=self._partition,
                events_offset=offset,
            )
        return self.record

    def mark(self, state: str) -> None:
        """Set the state that the next record says."""
        if self.record is not None and self.record.state not in (state, records.GONE):
            self.record = msgspec.structs.replace(self.record, state=state)
            self.changed = True

    def write_record(self) -> None:
        """Put the pod's record on ``kv-pods``."""
        record = self._settled()
        if record is None:
            return
        self.changed = False
        shared = self._shared
        value = records.encode(msgspec.structs.replace(record, updated_ns=shared.now_ns()))
        key = records.pod_key(records.WRITER_BRIDGE, record.pod)
        shared.publisher.send(shared.topic(records.PODS), self._partition, Item(key, value, [], None))

    # --- replay --------------------------------------------------------------------------------------------------

    async def _repair(self) -> None:
        shared, settings = self._shared, self._shared.settings
        while True:
            tracker = self.tracker
            request = tracker.request if tracker is not None else None
            if request is None and not self._probe:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._probe = False
            start, until = request or (0, None)
            restarts = tracker.counts.restarts if tracker is not None else 0
            async with shared.replays:
                take = self._taker(until)
                complete, newest = await replay(
                    shared.context,
                    self.spec.replay,
                    start,
                    take,
                    timeout_seconds=settings.replay_timeout_seconds,
                    piece=settings.replay_piece,
                    max_bytes=settings.socket_message_bytes,
                    room=shared.room,
                )
            if complete:
                self.heard_ns = shared.now_ns()
            if tracker is not None and tracker is self.tracker and tracker.counts.restarts == restarts:
                # A replay that showed a restart was left early and answers nothing about the new process.
                self._take(tracker.replay_ended(complete=complete, newest=newest))
            if not complete or (self.tracker is not None and self.tracker.hole):
                await asyncio.sleep(settings.replay_backoff_seconds)

    def _taker(self, until: int | None) -> Callable[[bytes, int, bytes], bool]:
        def take(topic: bytes, sequence: int, payload: bytes) -> bool:
            if until is not None and sequence >= until:
                return False
            if self.tracker is None and self._known(topic, payload) is None:
                return False
            tracker = self.tracker
            assert tracker is not None
            before = tracker.counts.restarts
            message = self._message(
                sequence, topic or self._topic, payload, self._shared.now_ns(), records.SOURCE_REPLAY
            )
            self._take(tracker.replayed(message))
            return tracker.counts.restarts == before  # a restart asks again from the start

        return take
