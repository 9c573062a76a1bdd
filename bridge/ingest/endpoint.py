"""Engine endpoint: its socket, its replays, and the session of the pod that is heard there.

An endpoint lives as long as its address is listed; the pod that it has may change meanwhile, or be another's. Whose a
message is and who may have a pod is ruled in :mod:`kvatlas.bridge.ingest.claims`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from kvatlas.bridge.engines.identity import Identity, identify
from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.engines.subscriber import Subscriber
from kvatlas.bridge.engines.wires import Wires
from kvatlas.bridge.ingest.claims import Heard, Ruling, Strangers, rule
from kvatlas.bridge.ingest.messages import EngineMessage
from kvatlas.bridge.ingest.recovered import Handover
from kvatlas.bridge.ingest.session import StreamSession
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.model import records
from kvatlas.bridge.model.adapters.fields import peek_rank
from kvatlas.bridge.model.sink import QueuedRecord
from kvatlas.bridge.runtime.tasks import Background, end_tasks

_SEQUENCE_MAX: Final = 1 << 48
#: Wait before the next try of a replay that brought nothing.
REPLAY_BACKOFF_SECONDS: Final = 0.5

log = logging.getLogger(__name__)


class EngineEndpoint:
    """One engine's address. Its pod is known with the first message.

    While its pod is another bridge's, or another endpoint's, it *waits*: it is subscribed and leaves out what it hears,
    and asks its engine for nothing.

    Attributes:
        session: of the pod that is forwarded, None while there is none.
        heard_ns: when the engine was heard last.
        leaving: whether the endpoint is listed no longer; another one may take its pod then.
    """

    def __init__(self, spec: EngineSpec, shared: Shared, wires: Wires, background: Background) -> None:
        """Connect to the endpoint and ask for what was missed.

        Raises:
            EngineError: the address cannot be used.
        """
        self.spec = spec
        self.session: StreamSession | None = None
        self.leaving = False
        self.heard_ns = self._opened_ns = shared.now_ns()
        self._shared = shared
        self._wires = wires
        self._background = background
        self._wanted: Identity | None = None
        self._topic = b""
        self._wake = asyncio.Event()
        self._probe = True
        self._strangers = Strangers()
        self._fresh = True  # nothing of the pod was heard on this connection
        self._nameless = False  # what a replay gives does not say whose it is; a live message will
        self._answered = False
        # The request in flight: for what it was made (None until a reply tells the pod), up to what is here already,
        # and whether another pod answered.
        self._asked: tuple[StreamSession, int] | None = None
        self._until: int | None = None
        self._foreign = False
        self._closed = False
        self._asked_ns = 0  # when it was asked for a sign of life
        self._socket = (
            None if spec.bound else Subscriber(wires.context, spec.live, self.received, reconnected=self.reconnected)
        )
        self._task = asyncio.create_task(self._repair(), name=f"replay-{spec.live}") if spec.replay else None
        if self._task is not None:
            background.watch(self._task)

    async def close(self) -> None:
        """Stop reading; what was accepted still goes out."""
        self._closed = True
        if self._socket is not None:
            self._socket.close()
        if self._task is not None:
            self._background.release(self._task)
            await end_tasks([self._task])

    @property
    def pod(self) -> str:
        """The pod id, or the endpoint's own name before it is known."""
        found = self.session.identity if self.session is not None else self._wanted
        return found.pod_id if found is not None else self.spec.fallback_pod

    @property
    def waiting(self) -> bool:
        """Whether the pod is known and held elsewhere."""
        return self._wanted is not None

    @property
    def caught_up(self) -> bool:
        """Whether all that the engine had said when it was asked has been forwarded, or left out as another's."""
        if self.session is None:
            return not self.spec.replay or self.heard_ns > self._opened_ns
        return not self.session.tracker.hole and self.session.tracker.request is None

    @property
    def silence_seconds(self) -> float:
        """How long the engine has not been heard."""
        return (self._shared.now_ns() - self.heard_ns) / 1e9

    # --- whose pod it is ------------------------------------------------------------------------------------------

    def hand_over(self) -> Handover | None:
        """Give the pod away and wait for it; None when there is none."""
        session = self._let_go()
        if session is None:
            return None
        self._wanted = session.identity
        return session.hand_over()

    def end(self) -> None:
        """Record that the pod is gone."""
        session = self._let_go()
        if session is not None:
            session.end()

    def _let_go(self) -> StreamSession | None:
        session, self.session = self.session, None
        if session is not None and self._shared.claims.get(session.identity.pod_id) is self:
            del self._shared.claims[session.identity.pod_id]
        return session

    def retry(self) -> None:
        """Take the pod that was held elsewhere as soon as it is free, and ask for what was missed."""
        if not self._closed and self._wanted is not None and self._settle(self._wanted, self._topic) is Ruling.TAKE:
            self._wake.set()

    def continue_without(self, message: EngineMessage, behind: list[QueuedRecord], reason: str) -> None:
        """Record a message of the pod as lost, and send what waited behind it under the epoch after that."""
        if self.session is not None:
            self.session.continue_without(message, behind, reason)

    def _settle(self, found: Identity, topic: bytes, in_a_row: int = 0) -> Ruling:
        """Do what the rules say of a pod that was named here; returns ``TAKE`` for one that was taken over, too."""
        shared, session, pod = self._shared, self.session, found.pod_id
        other = shared.claims.get(pod)
        ruling = rule(
            Heard(
                pod,
                ours=session.identity.pod_id if session is not None else "",
                wanted=self._wanted.pod_id if self._wanted is not None else "",
                in_a_row=in_a_row,
                bound=self.spec.bound,
                owned=shared.owned(pod),
                held=other is not None and other is not self,
                leaving=other is not None and other.leaving,
            )
        )
        if ruling is Ruling.FOREIGN:
            return ruling
        if ruling is not Ruling.FOLLOW and self.pod != pod and (session is not None or self._wanted is not None):
            log.warning("%s: pod %s became %s", self.spec.live, self.pod, pod)
            self._strangers.count = 0
            self.end()
        self._topic = topic
        if ruling is Ruling.CONFLICT and other is not None:
            shared.conflicts += 1
            log.error(
                "%s: its pod %s is already heard at %s; left out until that one leaves. Give every engine a name "
                "of its own, and list each once",
                *(self.spec.live, pod, other.spec.live),
            )
        if ruling in (Ruling.WAIT, Ruling.CONFLICT):
            self._wanted = found
        elif ruling in (Ruling.TAKE, Ruling.TAKE_OVER):
            self._wanted = None
            self.session = StreamSession(found, self.spec, shared.take(pod, self), shared)
            log.info("%s: pod %s from sequence %d", self.spec.live, pod, self.session.tracker.expected)
            return Ruling.TAKE
        return ruling

    # --- live ----------------------------------------------------------------------------------------------------

    def received(self, frames: list[bytes]) -> None:
        """Take the frames of one live message."""
        if len(frames) != 3:
            self._unusable(frames, f"wrong number of frames: {len(frames)}")
            return
        topic, number, payload = frames
        if len(number) != 8:
            self._unusable(frames, f"sequence frame size: {len(number)} bytes")
            return
        sequence = int.from_bytes(number, "big")
        if sequence >= _SEQUENCE_MAX:
            self._unusable(frames, f"implausible sequence: {sequence}")
            return
        now = self.heard_ns = self._shared.now_ns()
        self._nameless = False
        session = self.session
        if session is None or topic != self._topic:
            waits = self._wanted is not None and topic == self._topic
            session = None if waits else self._named(topic, payload)
            if session is None and not waits:
                return
        if self._strangers.count or self._fresh:
            self._strangers.count, self._fresh = 0, False
        if session is not None and session.live(topic, sequence, payload, now):
            self._wake.set()

    def _unusable(self, frames: list[bytes], reason: str) -> None:
        self._shared.dead_letter(self.pod, frames, reason, self.spec.live)

    def _named(self, topic: bytes, payload: bytes) -> StreamSession | None:
        """Find out whose stream it is; None when its pod is held elsewhere, or another than this endpoint's."""
        found, pod = identify(topic, peek_rank(payload), self.spec), self.pod
        known = self.session is not None or self._wanted is not None
        in_a_row = self._strangers.named(found.pod_id) if known and found.pod_id != pod else 0
        if self._settle(found, topic, in_a_row) is Ruling.FOREIGN:
            reason = f"foreign topic: names pod {found.pod_id} on the connection of {pod}"
            self._shared.dead_letter(pod, [topic, b"", payload], reason, self.spec.live)
            return None
        return self.session

    def reconnected(self) -> None:
        """Note that the connection was down."""
        self._fresh = True
        if self._wanted is not None:
            return
        if self.session is not None:
            self.session.tracker.reconnected()
        self._nameless = False
        self._probe = True
        self._wake.set()

    def replaced(self) -> None:
        """Note that another engine has the pod's name from now on."""
        if self.session is not None:
            reason = "another engine, connected before this one left, has its name now"
            self.session.take(self.session.tracker.replaced(reason))
        self.reconnected()

    # --- what is due ----------------------------------------------------------------------------------------------

    def tick(self, now_ns: int, *, due: bool) -> None:
        """Take a pod that became free, look for a sign of life, and set the pod's state; ``due``: write its record."""
        self.retry()
        settings, silent = self._shared.settings, (now_ns - self.heard_ns) / 1e9
        if (session := self.session) is not None:
            session.mark(records.STALE if silent >= settings.stale_seconds else records.LIVE)
        if min(silent, (now_ns - self._asked_ns) / 1e9) >= settings.heartbeat_seconds:
            self._asked_ns = now_ns
            self.beat()
        if due and session is not None and session.changed:
            session.write_record()

    def beat(self) -> None:
        """Replay the last message of a silent engine: losing it leaves no hole, and an answer is a sign of life."""
        if self._wanted is not None or self._nameless:
            return  # it would send its whole buffer, each time, for nothing
        if self.session is not None:
            self.session.tracker.probe()
        self._probe = True
        self._wake.set()

    # --- replay --------------------------------------------------------------------------------------------------

    async def _repair(self) -> None:
        while True:
            wanted = None
            if self._wanted is not None:
                self._probe = False
            elif self.session is not None:
                if self._probe:  # the connection came while the pod was not known yet
                    self.session.tracker.probe()
                wanted = self.session.tracker.ask()
            if wanted is None and not self._probe:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._probe = False
            start, self._until = wanted or (0, None)
            self._asked, self._foreign = self._life, False
            complete, newest = await self._wires.replay(
                self.spec.replay, start, self.reply, self._room, silent=not self._answered
            )
            self._answered = complete or newest is not None
            complete = complete and not self._foreign
            if complete:
                self.heard_ns = self._shared.now_ns()
            if self.session is not None and self._asked == self._life:
                # A replay that showed a restart was left early and answers nothing about the new process.
                self.session.take(self.session.tracker.replay_ended(complete=complete, newest=newest))
            if not complete or (self.session is not None and self.session.tracker.hole):
                await asyncio.sleep(REPLAY_BACKOFF_SECONDS)

    def _room(self) -> bool:
        return self._shared.sink.room(self.pod.encode())

    @property
    def _life(self) -> tuple[StreamSession, int] | None:
        """The session and the life of its engine: what was asked of another one says nothing of this one."""
        return None if self.session is None else (self.session, self.session.tracker.counts.restarts)

    def reply(self, topic: bytes | None, sequence: int, payload: bytes) -> bool:
        """Take one reply to the request in flight; False when no more of them are wanted."""
        if self._until is not None and sequence >= self._until:
            return False
        if self._asked is None:
            if self.session is None and topic is None:
                self._nameless = True
                return False
            session = self.session or self._named(topic or b"", payload)
            if session is None:
                return False
            session.tracker.ask(first=True)
            self._asked = self._life
        session = self.session
        if session is None or self._asked != self._life:
            return False  # the pod was given away, or its engine restarted meanwhile: the rest is not its own
        if topic is not None and topic != self._topic and not self._answered_by(topic, payload):
            self._foreign = True
            return False
        session.replayed(topic or self._topic, sequence, payload, self._shared.now_ns())
        return self._asked == self._life  # a restart asks again from the start

    def _answered_by(self, topic: bytes, payload: bytes) -> bool:
        """Whether a reply under another topic is the pod's own."""
        found, pod = identify(topic, peek_rank(payload), self.spec), self.pod
        if found.pod_id == pod:
            return True
        log.warning("%s: %s answered for pod %s", self.spec.replay, found.pod_id, pod)
        if self._fresh:  # on a connection where the pod itself is heard, another one's replies rename nothing
            self._settle(found, topic, self._strangers.named(found.pod_id))
        return False
