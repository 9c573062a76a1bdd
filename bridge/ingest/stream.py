"""One engine endpoint at work: its socket, its tracker, its replays, its pod record."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.engines.identity import Identity, identify
from kvatlas.bridge.engines.replay_client import replay
from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.ingest.recovered import Recovered, apply_control, event_ns, read_ts
from kvatlas.bridge.ingest.shared import Shared, open_socket
from kvatlas.bridge.ingest.strip import KnownBlocks, Stripper
from kvatlas.bridge.ingest.tracker import EngineMessage, Forward, Output, StreamPosition, Tracker, Turn
from kvatlas.bridge.kafka.producer import QueuedRecord
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.adapters.fields import count_events, peek_rank
from kvatlas.bridge.model.records import Control, PodRecord
from kvatlas.bridge.runtime.tasks import end_tasks

_SEQUENCE_MAX: Final = 1 << 48
#: Messages in a row that name another pod before the endpoint is taken for that pod's.
_RENAME_AFTER: Final = 3

log = logging.getLogger(__name__)


class Handover(NamedTuple):
    """What the next stream of a pod goes on from."""

    record: PodRecord
    position: StreamPosition
    blocks: KnownBlocks | None


class _Asked:
    """A replay request in flight, and the tracker and engine life it was made for.

    Attributes:
        tracker: None until a reply tells the pod.
        restarts: its restarts so far; one more makes the rest of the replay another engine's.
        foreign: whether another pod answered.
    """

    __slots__ = ("foreign", "restarts", "tracker")

    def __init__(self, tracker: Tracker | None) -> None:
        self.tracker = tracker
        self.restarts = tracker.counts.restarts if tracker is not None else 0
        self.foreign = False

    def bind(self, tracker: Tracker) -> None:
        """Go on with the pod that a reply named."""
        self.tracker, self.restarts = tracker, tracker.counts.restarts
        tracker.ask(first=True)

    def answers(self, tracker: Tracker | None) -> bool:
        """Whether its answer still says something of a stream."""
        return self.tracker is not None and self.tracker is tracker and tracker.counts.restarts == self.restarts


class PodStream:
    """The stream of one endpoint. Its pod is known with the first message.

    At most one stream forwards a pod. An endpoint whose pod another bridge owns, or another endpoint holds, *waits*: it
    is subscribed and leaves out what it hears, and asks its engine for nothing.

    An endpoint is one engine's, and so one pod's. Another name there is dead-lettered until it is the only one that is
    heard, some messages in a row; then the pod of before is gone and the other one is asked for what was left out.

    Attributes:
        record: the pod's record as acknowledged, None while there is no pod.
        changed: whether ``record`` is newer than what ``kv-pods`` has.
        leaving: whether the endpoint is no longer listed; another one may take its pod then.
    """

    def __init__(self, spec: EngineSpec, shared: Shared) -> None:
        """Connect to the endpoint and ask for what was missed.

        Raises:
            EngineError: the address cannot be used.
        """
        self.spec = spec
        self.record: PodRecord | None = None
        self.changed = False
        self.leaving = False
        self.tracker: Tracker | None = None
        self.heard_ns = shared.now_ns()
        self._shared = shared
        self._identity: Identity | None = None
        self._waiting: Identity | None = None
        self._turns: deque[Control] = deque()  # not acknowledged yet
        self._era = 0  # pods held before this one; acknowledgements of theirs say nothing of it
        self._partition = 0
        self._fixed: topics.Headers = []
        self._stripper: Stripper | None = None
        self._key = b""
        self._topic = b""
        self._wake = asyncio.Event()
        self._probe = True
        self._stranger = ""  # the other pod that was heard last, and how often in a row
        self._strange = 0
        self._fresh = True  # nothing of the pod was heard on this connection
        self._nameless = False  # what a replay gives does not say whose it is; a live message will
        self._answered = False
        self._closed = False
        self._socket = (
            None if spec.bound else open_socket(shared, spec.live, self.received, reconnected=self.reconnected)
        )
        self._task = asyncio.create_task(self._repair(), name=f"replay-{spec.live}") if spec.replay else None
        if self._task is not None:
            shared.background.watch(self._task)

    async def close(self) -> None:
        """Stop reading; what was accepted still goes out."""
        self._closed = True
        if self._socket is not None:
            self._socket.close()
        if self._task is not None:
            self._shared.background.release(self._task)
            await end_tasks([self._task])

    @property
    def pod(self) -> str:
        """The pod id, or the endpoint's own name before it is known."""
        found = self._identity or self._waiting
        return found.pod_id if found else self.spec.fallback_pod

    @property
    def waiting(self) -> bool:
        """Whether the pod is known and held elsewhere."""
        return self._waiting is not None

    def beat(self) -> None:
        """Replay the last message of a silent engine: losing it leaves no hole, and an answer is a sign of life."""
        if self._waiting is not None or self._nameless:
            return  # it would send its whole buffer, each time, for nothing
        if self.tracker is not None:
            self.tracker.probe()
        self._probe = True
        self._wake.set()

    def retry(self) -> None:
        """Take the pod that was held elsewhere as soon as it is free, and ask for what was missed."""
        if self._closed or self._waiting is None:
            return
        if self._claim(self._waiting, self._topic) is not None:
            self._wake.set()

    def hand_over(self) -> Handover | None:
        """Give the pod away and wait for it; None when there is none.

        What was forwarded and is not acknowledged yet still goes out, ahead of what the pod's next stream forwards.
        """
        tracker, record = self.tracker, self._final()
        if tracker is None or record is None:
            return None
        blocks = self._stripper.known if self._stripper is not None else None
        self._waiting = self._identity
        self._let_go()
        return Handover(record, tracker.position(), blocks)

    def end(self) -> None:
        """Record that the pod is gone."""
        tracker, record, shared = self.tracker, self._final(), self._shared
        if tracker is None or record is None:
            return
        incarnation = shared.next_incarnation(tracker.incarnation)
        control = Control(type="gone", incarnation=incarnation, reason="no longer listed by discovery")
        self._let_go()
        shared.recovered[record.pod] = Recovered(shared.put_gone(record, control, self._fixed[1:]))

    def _final(self) -> PodRecord | None:
        """Return the record as it will be once everything is acknowledged, but for its position."""
        record = self._settled()
        return None if record is None else functools.reduce(apply_control, self._turns, record)

    def _let_go(self) -> None:
        if self._shared.claims.get(self.pod) is self:
            del self._shared.claims[self.pod]
        self._turns.clear()
        if self.tracker is not None:
            self.tracker.release()
        self.tracker = self.record = self._identity = self._stripper = None
        self._era += 1

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
        self._nameless = False
        tracker = self.tracker
        if tracker is None or topic != self._topic:
            tracker = None if self._waits(topic) else self._known(topic, payload)
        if tracker is None:
            return
        if self._strange or self._fresh:
            self._strange, self._fresh = 0, False
        if not shared.room():
            tracker.shed(sequence)
            self._wake.set()
            return
        size = len(payload) + len(topic)
        if size <= shared.settings.message_bytes and tracker.accept(sequence, payload):
            self._forward(EngineMessage(sequence, topic, payload, now), tracker.incarnation)
            return
        self._take(tracker.live(self._message(sequence, topic, payload, now, topics.SOURCE_LIVE)))
        if tracker.request is not None:
            self._wake.set()

    def _message(self, sequence: int, topic: bytes, payload: bytes, now: int, source: str) -> EngineMessage:
        size = len(payload) + len(topic)
        if size <= self._shared.settings.message_bytes:
            return EngineMessage(sequence, topic, payload, now, source)
        self._shared.oversized += 1
        reason = f"oversized: message {sequence} of {len(payload)} bytes, topic of {len(topic)}, is over the limit"
        self._shared.dead_letter(self.pod, [b""] * 3, reason, self.spec.live)
        return EngineMessage(sequence, topic, None, now, source)

    def _known(self, topic: bytes, payload: bytes) -> Tracker | None:
        """Find out whose stream it is; None when its pod is held elsewhere."""
        found = identify(topic, peek_rank(payload), self.spec)
        named = self._identity or self._waiting
        if named is not None and found.pod_id != named.pod_id:
            if not self._renamed(found.pod_id):
                reason = f"foreign topic: names pod {found.pod_id} on the connection of {named.pod_id}"
                self._shared.dead_letter(named.pod_id, [topic, b"", payload], reason, self.spec.live)
                return None
            log.warning("%s: pod %s became %s", self.spec.live, named.pod_id, found.pod_id)
            self.end()
        elif self._identity is not None:
            self._topic = topic
            return self.tracker
        return self._claim(found, topic)

    def _waits(self, topic: bytes) -> bool:
        """Whether a message is of the pod that is held elsewhere."""
        if self._waiting is None or topic != self._topic:
            return False
        self._strange, self._fresh = 0, False
        return True

    def _renamed(self, pod: str) -> bool:
        """Count another pod's message; True once the endpoint is that pod's."""
        self._strange = self._strange + 1 if pod == self._stranger else 1
        self._stranger = pod
        if self._strange < _RENAME_AFTER or self.spec.bound:  # what connects to us is told apart by its topic
            return False
        self._strange = 0
        return True

    def _claim(self, found: Identity, topic: bytes) -> Tracker | None:
        """Take a pod, or wait for it while another stream or another bridge holds it."""
        shared = self._shared
        self._topic = topic
        partition = pod_ids.pod_partition(found.pod_id, shared.partitions)
        other = shared.claims.get(found.pod_id)
        if not shared.owns(partition):
            self._waiting = found
            return None
        if other is not None and other is not self and not other.leaving:
            if self._waiting != found:
                shared.conflicts += 1
                log.error(
                    "%s: its pod %s is already heard at %s; left out until that one leaves. Give every engine a name "
                    "of its own, and list each once",
                    *(self.spec.live, found.pod_id, other.spec.live),
                )
            self._waiting = found
            return None
        known = other.hand_over() if other is not None else None
        if known is None and (logged := shared.recovered.pop(found.pod_id, None)) is not None:
            known = Handover(logged.record, logged.position(), logged.blocks)
        if known is None:
            known = Handover(PodRecord(pod=found.pod_id, writer=pod_ids.WRITER_BRIDGE), StreamPosition(), None)
        shared.claims[found.pod_id] = self
        self._waiting, self._identity, self._partition = None, found, partition
        self._key = found.pod_id.encode()
        content = topics.CONTENT_KEYS if shared.settings.strip_tokens else topics.CONTENT_ENGINE
        self._fixed = [
            (topics.H_CONTENT_TYPE, content.encode()),
            (topics.H_ENGINE, self.spec.engine.encode()),
            (topics.H_MODEL, found.model.encode()),
        ]
        self._fixed += self.spec.headers()
        self.record = msgspec.structs.replace(
            known.record,
            state=records.LIVE,
            model=found.model,
            engine=self.spec.engine,
            endpoint=self.spec.live,
            dp_rank=found.rank,
            store=self.spec.store,
        )
        self.changed = True
        settings = shared.settings
        if settings.strip_tokens:
            blocks = known.blocks if known.blocks is not None else KnownBlocks(settings.strip_blocks)
            self._stripper = Stripper(
                self.spec.engine, found.model, settings.block_size_tokens, settings.limits(), blocks
            )
        self.tracker = Tracker(
            known.position,
            next_incarnation=self._shared.next_incarnation,
            read_ts=read_ts,
            tries=settings.replay_tries,
            hold_messages=settings.hold_messages,
            hold_bytes=settings.hold_bytes,
            holding=shared.holding,
            can_replay=bool(self.spec.replay),
        )
        self._take(self.tracker.begin())
        log.info("%s: pod %s from sequence %d", self.spec.live, found.pod_id, self.tracker.expected)
        return self.tracker

    def reconnected(self) -> None:
        """Note that the connection was down."""
        self._fresh = True
        if self._waiting is not None:
            return
        if self.tracker is not None:
            self.tracker.reconnected()
        self._nameless = False
        self._probe = True
        self._wake.set()

    def replaced(self) -> None:
        """Note that another engine has the pod's name from now on."""
        if self.tracker is not None:
            self._take(self.tracker.replaced("another engine, connected before this one left, has its name now"))
        self.reconnected()

    # --- to the log ----------------------------------------------------------------------------------------------

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, Forward):
                self._forward(output.message, output.incarnation)
            else:
                self._turn(output)

    def _forward(self, message: EngineMessage, incarnation: int) -> None:
        payload = message.payload
        assert payload is not None
        shared = self._shared
        shared.messages += 1
        shared.bytes += len(payload)
        shared.events += count_events(payload)
        self._send(message, payload if self._stripper is None else self._strip(self._stripper, message), incarnation)

    def _send(self, message: EngineMessage, value: bytes, incarnation: int) -> None:
        shared = self._shared
        headers = [
            (topics.H_SEQUENCE, b"%d" % message.sequence),
            (topics.H_ENGINE_TOPIC, message.topic),
            (topics.H_RECEIVE_NS, b"%d" % message.receive_ns),
            (topics.H_SOURCE, message.source.encode()),
            (topics.H_INCARNATION, b"%d" % incarnation),
            *self._fixed,
        ]
        era = self._era

        def acknowledged(offset: int) -> None:
            if era == self._era:
                self._acknowledged = (message, offset)
                self.changed = True
            shared.acknowledged += 1
            if shared.observe is not None:
                shared.observe(message.receive_ns)

        item = QueuedRecord(self._key, value, headers, acknowledged, self._refused, message)
        shared.publisher.send(shared.topic(topics.EVENTS), self._partition, item)

    def _refused(self, item: QueuedRecord, reason: str) -> None:
        """Record a message that Kafka never takes as lost; what waits behind it goes under the epoch after that."""
        shared, message, pod = self._shared, item.origin, item.key.decode()
        assert isinstance(message, EngineMessage)
        origin = f"{self.spec.live} message {message.sequence}"
        shared.dead_letter(pod, [b"", b"", item.value], f"refused: {reason}", origin)
        number = pod_ids.pod_partition(pod, shared.partitions)
        behind = shared.publisher.withdraw(shared.topic(topics.EVENTS), number, item.key)
        holder = shared.claims.get(pod)
        # Without a holder the pod's next bridge goes on before this message, and finds it too large as well.
        if holder is not None and behind is not None:
            holder._go_on_without(message, behind, reason)

    def _go_on_without(self, message: EngineMessage, behind: list[QueuedRecord], reason: str) -> None:
        tracker = self.tracker
        if tracker is None:
            return
        self._turns.clear()  # they are among what is behind
        self._take([tracker.refused(message.sequence, reason)])
        for item in behind:
            if isinstance(item.origin, EngineMessage):
                self._send(item.origin, item.value, tracker.incarnation)
            elif isinstance(item.origin, Control):
                self._control(msgspec.structs.replace(item.origin, incarnation=tracker.raised()))

    def _strip(self, stripper: Stripper, message: EngineMessage) -> bytes:
        """Return what is stored of a message where token ids must not be."""
        batch, rejected, keyless = stripper.strip(message.payload or b"")
        self._shared.keyless += keyless
        for reason in rejected:
            origin = f"{self.spec.live} message {message.sequence}"
            self._shared.dead_letter(self.pod, [b""], f"event not usable: {reason}", origin)
        return records.encode(batch)

    _acknowledged: tuple[EngineMessage, int] | None = None

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
        era = self._era
        self._turns.append(control)

        def acknowledged(offset: int) -> None:
            if era != self._era:
                return
            self._turns.popleft()
            current = self._settled()
            if current is not None:
                self.record = msgspec.structs.replace(
                    apply_control(current, control), events_partition=self._partition, events_offset=offset
                )
                self.write_record()

        self._shared.put_control(self.pod, control, self._fixed[1:], acknowledged)

    def _settled(self) -> PodRecord | None:
        """Fold the newest acknowledged message into the record."""
        if self._acknowledged is not None and self.record is not None:
            message, offset = self._acknowledged
            self._acknowledged = None
            self.record = msgspec.structs.replace(
                self.record,
                last_sequence=message.sequence,
                last_event_ns=event_ns(read_ts(message.payload or b"")),
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
        self._shared.put_record(record)

    # --- replay --------------------------------------------------------------------------------------------------

    async def _repair(self) -> None:
        shared, settings = self._shared, self._shared.settings
        while True:
            tracker = self.tracker
            request = None
            if tracker is not None and self._waiting is None:
                if self._probe:  # the connection came while the pod was not known yet
                    tracker.probe()
                request = tracker.ask()
            if self._waiting is not None:
                self._probe = False
            if request is None and not self._probe:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._probe = False
            start, until = request or (0, None)
            asked = _Asked(tracker)
            async with shared.replays if self._answered else shared.silent_replays:
                complete, newest = await replay(
                    shared.context,
                    self.spec.replay,
                    start,
                    self._taker(asked, until),
                    timeout_seconds=settings.replay_timeout_seconds,
                    piece=settings.replay_piece,
                    max_bytes=settings.socket_message_bytes,
                    room=shared.room,
                )
            # Engines that do not answer wait for each other, and hold up nobody else's repair.
            self._answered = complete or newest is not None
            complete = complete and not asked.foreign
            if complete:
                self.heard_ns = shared.now_ns()
            if asked.tracker is not None and asked.answers(self.tracker):
                # A replay that showed a restart was left early and answers nothing about the new process.
                self._take(asked.tracker.replay_ended(complete=complete, newest=newest))
            if not complete or (self.tracker is not None and self.tracker.hole):
                await asyncio.sleep(settings.replay_backoff_seconds)

    def _taker(self, asked: _Asked, until: int | None) -> Callable[[bytes | None, int, bytes], bool]:
        def take(topic: bytes | None, sequence: int, payload: bytes) -> bool:
            if until is not None and sequence >= until:
                return False
            if asked.tracker is None:
                if self.tracker is None and topic is None:
                    self._nameless = True
                    return False
                tracker = self.tracker or self._known(topic or b"", payload)
                if tracker is None:
                    return False
                asked.bind(tracker)
            tracker = asked.tracker
            if tracker is None or not asked.answers(self.tracker):
                return False  # the pod was given away, or its engine restarted meanwhile: the rest is not its own
            if topic is not None and topic != self._topic and not self._answered_by(topic, payload):
                asked.foreign = True
                return False
            message = self._message(
                sequence, topic or self._topic, payload, self._shared.now_ns(), topics.SOURCE_REPLAY
            )
            self._take(tracker.replayed(message))
            return asked.answers(self.tracker)  # a restart asks again from the start

        return take

    def _answered_by(self, topic: bytes, payload: bytes) -> bool:
        """Whether a reply under another topic is the pod's own."""
        found = identify(topic, peek_rank(payload), self.spec)
        if self._identity is None or found.pod_id == self._identity.pod_id:
            return True
        log.warning("%s: %s answered for pod %s", self.spec.replay, found.pod_id, self._identity.pod_id)
        if self._fresh and self._renamed(found.pod_id):
            log.warning("%s: pod %s became %s", self.spec.live, self._identity.pod_id, found.pod_id)
            self.end()
            self._claim(found, topic)
        return False


__all__ = ["PodStream", "Shared"]
