"""Stream session: a pod's stream from the moment it is taken until it is given away or ends; no sockets.

It has what is known of the pod (identity, tracker, record, engine blocks) and puts on the log what follows from what an
endpoint hears. One that has ended is still acknowledged, and writes no record any more.
"""

from __future__ import annotations

import functools
import logging
from collections import deque

import msgspec

from kvatlas.bridge.engines.identity import Identity
from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.ingest.memory import HeldMessages
from kvatlas.bridge.ingest.messages import EngineMessage, Forward, Output
from kvatlas.bridge.ingest.recovered import Handover, Recovered, apply_control, event_ns, read_ts
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.ingest.strip import KnownBlocks, Stripper
from kvatlas.bridge.ingest.tracker import Tracker
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.adapters.fields import count_events
from kvatlas.bridge.model.loads import LOAD_REPEAT_SECONDS
from kvatlas.bridge.model.records import Control, PodRecord
from kvatlas.bridge.model.sink import QueuedRecord

log = logging.getLogger(__name__)


class StreamSession:
    """A pod while an endpoint has it.

    Attributes:
        identity: whose stream it is.
        tracker: what of it is on the log, and what is missing.
        record: the pod's record as acknowledged.
        changed: whether ``record`` is newer than what ``kv-pods`` has.
    """

    def __init__(self, identity: Identity, spec: EngineSpec, known: Handover, shared: Shared) -> None:
        """Go on from what is known of the pod."""
        settings = shared.settings
        self.identity = identity
        self.changed = True
        self.record = msgspec.structs.replace(
            known.record,
            state=records.LIVE,
            model=identity.model,
            engine=spec.engine,
            endpoint=spec.live,
            dp_rank=identity.rank,
            store=spec.store,
        )
        self._shared = shared
        self._spec = spec
        self._partition = shared.partition(identity.pod_id)
        self._key = identity.pod_id.encode()
        self._fixed = [
            (topics.H_ENGINE, spec.engine.encode()),
            (topics.H_MODEL, identity.model.encode()),
            *spec.headers(),
        ]
        content = topics.CONTENT_KEYS if settings.strip_tokens else topics.CONTENT_ENGINE
        self._message_fixed = [(topics.H_CONTENT_TYPE, content.encode()), *self._fixed]
        self._turns: deque[Control] = deque()  # not acknowledged yet
        self._newest: tuple[EngineMessage, int] | None = None  # acknowledged and not in the record yet, its offset
        self._ended = False
        self._stripper: Stripper | None = None
        if settings.strip_tokens:
            blocks = known.blocks if known.blocks is not None else KnownBlocks()
            self._stripper = Stripper(
                spec.engine, identity.model, settings.block_size_tokens, settings.limits(), blocks
            )
        self.tracker = Tracker(
            known.position,
            next_incarnation=shared.next_incarnation,
            read_ts=read_ts,
            held=HeldMessages(shared.holding),
            can_replay=bool(spec.replay),
        )
        self.take(self.tracker.begin())

    # --- what an endpoint hears -----------------------------------------------------------------------------------

    def live(self, topic: bytes, sequence: int, payload: bytes, now_ns: int) -> bool:
        """Take a live message; returns whether a replay is needed."""
        tracker = self.tracker
        if not self._shared.sink.room(self._key):
            tracker.shed(sequence)
            return True
        if len(payload) + len(topic) <= self._shared.settings.message_bytes and tracker.accept(sequence, payload):
            self._forward(EngineMessage(sequence, topic, payload, now_ns), tracker.incarnation)
            return False
        self.take(tracker.live(self._message(sequence, topic, payload, now_ns, topics.SOURCE_LIVE)))
        return tracker.request is not None

    def replayed(self, topic: bytes, sequence: int, payload: bytes, now_ns: int) -> None:
        """Take one message of a replay."""
        self.take(self.tracker.replayed(self._message(sequence, topic, payload, now_ns, topics.SOURCE_REPLAY)))

    def _message(self, sequence: int, topic: bytes, payload: bytes, now_ns: int, source: str) -> EngineMessage:
        size = len(payload) + len(topic)
        if size <= self._shared.settings.message_bytes:
            return EngineMessage(sequence, topic, payload, now_ns, source)
        self._shared.oversized += 1
        reason = f"oversized: message {sequence} of {len(payload)} bytes, topic of {len(topic)}, is over the limit"
        self._shared.dead_letter(self.identity.pod_id, [b""] * 3, reason, self._spec.live)
        return EngineMessage(sequence, topic, None, now_ns, source)

    # --- its end --------------------------------------------------------------------------------------------------

    def hand_over(self) -> Handover:
        """End the session for another one of the pod; returns what that one goes on from.

        What was forwarded and is not acknowledged yet still goes out, ahead of what the next session forwards.
        """
        blocks = self._stripper.known if self._stripper is not None else None
        found = Handover(self._final(), self.tracker.position(), blocks)
        self._end()
        return found

    def end(self) -> None:
        """End the session and record that the pod is gone."""
        shared, record = self._shared, self._final()
        incarnation = shared.next_incarnation(self.tracker.incarnation)
        control = Control(type="gone", incarnation=incarnation, reason="no longer listed by discovery")
        self._end()
        shared.recovered[record.pod] = Recovered(shared.put_gone(record, control, self._fixed))

    def _final(self) -> PodRecord:
        """Return the record as it will be once everything is acknowledged, but for its position."""
        return functools.reduce(apply_control, self._turns, self._settled())

    def _end(self) -> None:
        self._turns.clear()
        self.tracker.held.clear()
        self._ended = True

    # --- to the log -----------------------------------------------------------------------------------------------

    def take(self, outputs: list[Output]) -> None:
        """Put on the log what the tracker gives."""
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
        headers = [
            (topics.H_SEQUENCE, b"%d" % message.sequence),
            (topics.H_ENGINE_TOPIC, message.topic),
            (topics.H_RECEIVE_NS, b"%d" % message.receive_ns),
            (topics.H_SOURCE, message.source.encode()),
            (topics.H_INCARNATION, b"%d" % incarnation),
            *self._message_fixed,
        ]
        item = QueuedRecord(self._key, value, headers, self._acknowledged, self._refused, message)
        self._shared.sink.send(topics.EVENTS, self._partition, item)

    def _acknowledged(self, item: QueuedRecord, offset: int) -> None:
        message, shared = item.origin, self._shared
        assert isinstance(message, EngineMessage)
        self._newest = (message, offset)
        self.changed = True
        shared.acknowledged += 1
        if shared.observe is not None:
            shared.observe(message.receive_ns)

    def _refused(self, item: QueuedRecord, reason: str, behind: list[QueuedRecord] | None) -> None:
        """Record a message that the sink never takes as lost; what waits behind it goes under the epoch after that."""
        message, pod = item.origin, self.identity.pod_id
        assert isinstance(message, EngineMessage)
        origin = f"{self._spec.live} message {message.sequence}"
        self._shared.dead_letter(pod, [b"", b"", item.value], f"refused: {reason}", origin)
        # Without a holder the pod's next bridge goes on before this message, and finds it too large as well.
        holder = self._shared.claims.get(pod)
        if holder is not None and behind is not None:
            holder.continue_without(message, behind, reason)

    def continue_without(self, message: EngineMessage, behind: list[QueuedRecord], reason: str) -> None:
        """Record a message of the pod as lost, and send what waited behind it under the epoch after that."""
        tracker = self.tracker
        self._turns.clear()  # they are among what is behind
        self.take([tracker.refused(message.sequence, reason)])
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
            origin = f"{self._spec.live} message {message.sequence}"
            self._shared.dead_letter(self.identity.pod_id, [b""], f"event not usable: {reason}", origin)
        return records.encode(batch)

    def _turn(self, turn: Control) -> None:
        if turn.type == "restart" and self._stripper is not None:
            self._stripper.known.clear()
        level = logging.INFO if turn.type == "start" else logging.WARNING
        pod = self.identity.pod_id
        log.log(level, "%s: %s %d..%d: %s", pod, turn.type, turn.first_lost, turn.last_lost, turn.reason)
        self._control(turn)

    def _control(self, control: Control) -> None:
        self._turns.append(control)
        self._shared.put_control(self.identity.pod_id, control, self._fixed, self._turned)

    def _turned(self, item: QueuedRecord, offset: int) -> None:
        if self._ended:
            return
        self._turns.popleft()
        assert isinstance(item.origin, Control)
        self.record = msgspec.structs.replace(
            apply_control(self._settled(), item.origin), events_partition=self._partition, events_offset=offset
        )
        self.write_record()

    # --- its record -----------------------------------------------------------------------------------------------

    def _settled(self) -> PodRecord:
        """Fold the newest acknowledged message into the record."""
        if self._newest is not None:
            (message, offset), self._newest = self._newest, None
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
        if self.record.state not in (state, records.GONE):
            self.record = msgspec.structs.replace(self.record, state=state)
            self.changed = True

    def report(self, load: dict[str, float], read_ns: int) -> None:
        """Take what the engine says of its load; what says nothing new is told again now and then."""
        before = self.record
        if load != before.load or read_ns - before.load_ns >= LOAD_REPEAT_SECONDS * 1e9:
            self.record = msgspec.structs.replace(before, load=load, load_ns=read_ns)
            self.changed = True

    def write_record(self) -> None:
        """Put the pod's record on ``kv-pods``."""
        self.changed = False
        self._shared.put_record(self._settled())
