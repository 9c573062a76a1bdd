"""Sequence tracking of one pod's stream: pure, no sockets, no clock.

A :class:`Tracker` takes live and replayed messages in whatever order they come and gives back, in order and once
each, what goes on the log: messages (:class:`Forward`) and turns of the stream (:class:`Control`: start, gap, restart).

What it can see, and what it makes of it (``n`` the next sequence expected):

====================================  ================================================================================
a live message ``n``                  forwarded
live, above ``n``                     held; the hole is asked for (:attr:`Tracker.request`)
live, at or below the newest live one the engine restarted: one publisher never goes back on one connection
any, below ``n``, bytes known         equal: a duplicate, dropped; different: the engine restarted
live, below ``n``, bytes not known    a duplicate when it is newer than the newest live one; else what the replay of
                                      ``n - 1`` that is under way says, and without one a restart
a replay without the hole's start     tried again a bounded number of times, then lost: a gap
a replay of ``n - 1`` with other      the engine restarted and overtook us while we were away
bytes than ours
a replay that ends below ``n - 1``    the same: an engine always still holds its newest message
====================================  ================================================================================

Every replay is asked from ``n - 1`` on: a new engine may answer it before the live connection tells of the change. One
that was asked before a reconnect says nothing of the engine that is there since.

Bytes are compared by a 64-bit digest of the newest messages; after a restart of the bridge, when only the engine's
clock of the last message is known, by that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvatlas.bridge.ingest.memory import Digests, HeldMessages
from kvatlas.bridge.ingest.messages import Counts, EngineMessage, Forward, Output, Request, StreamPosition
from kvatlas.bridge.model.records import Control
from kvatlas.bridge.model.topics import SOURCE_LIVE

#: A sequence this far beyond the last is not a gap but nonsense.
JUMP_MAX: Final = 50_000_000

START: Final = "start"
GAP: Final = "gap"
RESTART: Final = "restart"


class Tracker:
    """The state of one stream.

    Attributes:
        expected: next sequence to forward.
        incarnation: current incarnation.
        counts: what happened so far.
        held: messages held back.
    """

    def __init__(
        self,
        position: StreamPosition,
        *,
        next_incarnation: Callable[[int], int],
        read_ts: Callable[[bytes], float | None] = lambda _: None,
        tries: int = 3,
        held: HeldMessages | None = None,
        can_replay: bool = True,
    ) -> None:
        """Go on where the log ends.

        Args:
            position: where the stream stands; the default for a pod without history.
            next_incarnation: previous incarnation -> the next one, above it.
            read_ts: payload -> the engine's clock in it, seconds; None when it has none.
            tries: replays without progress before a hole is lost.
            held: takes the live messages that wait while a hole is repaired.
            can_replay: whether there is a replay socket at all.
        """
        self.expected = position.sequence + 1
        self.incarnation = position.incarnation
        self.counts = Counts()
        self.held = HeldMessages() if held is None else held
        self._next = next_incarnation
        self._read_ts = read_ts
        self._tries = tries
        self._can_replay = can_replay
        self._last_ts = position.ts
        self._digests = Digests(self.expected, position.digests)
        self._seen = self.expected - 1  # highest sequence that is known to exist
        self._newest_live: int | None = None
        self._failed = 0
        self._verify = position.sequence >= 0  # the next replay must show that it is still the same engine
        self._catch_up = True
        self._asked = False  # whether a replay is under way
        self._outdated = False  # whether the connection changed since it was asked
        self._shown = -1  # what its answer must show, since the same engine has it; -1 for nothing
        self._heard = -1  # what was heard of the stream, and waits, when it was asked; -1 for nothing
        self._early = False  # whether it began before the pod was known
        # Messages from here on came by a connection that nobody has verified, and may be of two engines: the next
        # replay is to show them all again. None when they are of one.
        self._unverified: int | None = max(position.sequence, 0)

    # --- what the driver asks -----------------------------------------------------------------------------------

    @property
    def hole(self) -> bool:
        """Whether a message that exists is missing."""
        return self._seen >= self.expected

    @property
    def request(self) -> Request | None:
        """What to ask for now; None when nothing is missing."""
        if not self._can_replay or not (self.hole or self._catch_up):
            return None
        # Held messages are only the upper bound when nothing above them was dropped.
        start = max(self.expected - 1, 0)
        if self._unverified is not None:
            start = min(start, self._unverified)
        return Request(start, min(self.held) if self.held and not self._catch_up else None)

    def ask(self, *, first: bool = False) -> Request | None:
        """Return :attr:`request`, and note that a replay for it begins; its end is :meth:`replay_ended`.

        Args:
            first: the replay began before the pod was known, so its answer need not reach what was heard since.
        """
        request = self.request
        if request is not None:
            self._asked, self._outdated = True, False
            self._shown = -1 if first else self.expected - 1
            waits = min(self.held) if self.held else self._newest_live
            self._heard = -1 if first or waits is None else waits
            self._early = first
        return request

    def position(self) -> StreamPosition:
        """Return where the stream stands, for another tracker to go on from."""
        return StreamPosition(self.incarnation, self.expected - 1, self._last_ts, self._digests.known(self.expected))

    def begin(self) -> list[Output]:
        """Return what a stream without history starts with."""
        if self.incarnation:
            return []
        self.incarnation = self._next(0)
        return [Control(type=START, incarnation=self.incarnation, reason="first contact")]

    def reconnected(self) -> None:
        """Note that the connection was down: the engine may be another, and messages may be missing."""
        self._catch_up = True
        self._outdated = self._asked
        # What an outdated replay still brings may be the old engine's, so a live message must not follow it at once.
        self._verify = self.expected > 0 or self._asked
        if self._unverified is None:
            self._unverified = max(self.expected - 1, 0)
        if not self.expected:
            # Nothing of this engine is on the log to know it by, so what is held may be another's than what comes.
            self.held.clear()
            self._seen, self._newest_live = -1, None

    def replaced(self, reason: str) -> list[Output]:
        """Take note that another engine publishes from now on."""
        return self._restart(None, reason)

    def probe(self) -> None:
        """Ask for the stream's tail although nothing seems to be missing (a lost last message leaves no hole).

        The connection is the one of before, so live messages need not wait for the answer.
        """
        self._catch_up = True

    # --- what comes in -------------------------------------------------------------------------------------------

    def accept(self, sequence: int, payload: bytes) -> bool:
        """Take a live message on the fast path; False when :meth:`live` has to look at it.

        True means: forward it now, under the current incarnation.
        """
        if sequence != self.expected or self.held or self._verify or self._seen >= sequence:
            return False
        self._newest_live = self._seen = sequence
        self._digests.put(sequence, payload)
        self.expected = sequence + 1
        return True

    def live(self, message: EngineMessage) -> list[Output]:
        """Take a live message."""
        sequence = message.sequence
        if self._newest_live is not None and sequence <= self._newest_live:
            return self._restart(message, f"sequence went back from {self._newest_live} to {sequence}")
        if sequence < self.expected:
            return self._known(message)
        if sequence - self._seen > JUMP_MAX:
            self.counts.implausible += 1
            return []
        self._newest_live = sequence
        self._seen = max(self._seen, sequence)
        if sequence == self.expected and not self._verify:
            return self._forward_from(message)
        return self._hold(message)

    def shed(self, sequence: int) -> None:
        """Note a live message that was left to replay, because there was no room for it."""
        self.counts.shed += 1
        if self._newest_live is not None and sequence <= self._newest_live:
            # A restart; what follows the next accepted message shows it.
            self.reconnected()
            return
        if sequence - self._seen <= JUMP_MAX:
            self._newest_live = sequence
            self._seen = max(self._seen, sequence)

    def replayed(self, message: EngineMessage) -> list[Output]:
        """Take one message of a replay; they come in the engine's order."""
        sequence = message.sequence
        if sequence < self.expected:
            known = self._same(message)
            if known is False:
                return self._restart(message, f"sequence {sequence} holds other bytes than before")
            if sequence == self.expected - 1 and not self._outdated:
                self._verify = False
            return []
        if sequence - self._seen > JUMP_MAX:
            self.counts.implausible += 1
            return []
        self._seen = max(self._seen, sequence)
        if self._verify and not self._outdated:
            # The known message is no longer in the engine's buffer, so nothing tells whether it is the same engine.
            self._verify = False
        if sequence == self.expected:
            self._failed = 0
            if sequence not in self.held:
                self.counts.repaired += 1
            return self._forward_from(message)
        return self._hold(message)

    def replay_ended(self, *, complete: bool, newest: int | None) -> list[Output]:
        """Take the end of one replay.

        Args:
            complete: the end marker came, or the part that was asked for.
            newest: highest sequence it showed, None when it showed none.
        """
        known, heard, outdated, early = self._shown, self._heard, self._outdated, self._early
        self._asked, self._outdated, self._shown, self._heard, self._early = False, False, -1, -1, False
        if complete and known >= 0 and (newest is None or newest < known):
            return self._restart(None, f"the engine's newest message is {newest}, ours was {known}")
        if outdated and complete:
            return []  # it is asked again
        if complete:
            # What was heard after an early request may be of an engine before the one that answered it: one more shows.
            self._catch_up = early and newest is not None and newest < max(self._seen, self.expected - 1)
            self._unverified = None
        if not self.hole and not self.held:
            if complete:
                self._verify = False
            self._failed = 0
            return []
        outputs = self._drain() if not self._verify else []
        self._failed = self._failed + 1 if self.hole else 0
        if not self.hole or self._failed < self._tries:
            return outputs
        self._catch_up = False
        if complete and newest is not None and newest < heard:
            reason = f"the engine's newest message is {newest}, {heard} was heard before"
            return outputs + self._restart(None, reason)
        return outputs + self.give_up("not in the engine's replay buffer" if complete else "replay did not answer")

    def give_up(self, reason: str) -> list[Output]:
        """Record the hole before the next held message as lost, and go on behind it."""
        self._failed = 0
        self._verify = False
        last = min(self.held) - 1 if self.held else self._seen
        if last < self.expected:
            return self._drain()
        outputs: list[Output] = [self._lose(self.expected, last, reason)]
        self.expected = last + 1
        return outputs + self._drain()

    def without_replay(self) -> list[Output]:
        """Settle a hole when there is no replay socket: what is missing is lost at once."""
        self._catch_up = False
        self._verify = False
        outputs = self._drain()
        while self.held or self.hole:
            outputs += self.give_up("the engine has no replay socket")
        return outputs

    def refused(self, sequence: int, reason: str) -> Control:
        """Record a message that was forwarded, and that the log never takes, as lost."""
        self.counts.gaps += 1
        self.counts.lost += 1
        return _gap(self.raised(), sequence, sequence, reason)

    def raised(self) -> int:
        """Raise the incarnation, for a turn that goes on the log anew; returns it."""
        self.incarnation = self._next(self.incarnation)
        return self.incarnation

    # --- inside --------------------------------------------------------------------------------------------------

    def _forward_from(self, message: EngineMessage) -> list[Output]:
        outputs: list[Output] = []
        self._forward(message, outputs)
        if self.held:
            outputs += self._drain()
        return outputs

    def _forward(self, message: EngineMessage, outputs: list[Output]) -> None:
        sequence = message.sequence
        self.held.drop(sequence)
        self.expected = sequence + 1
        self._seen = max(self._seen, sequence)
        if message.payload is None:
            outputs.append(self._lose(sequence, sequence, "message over the size limit"))
            return
        self._digests.put(sequence, message.payload)
        self._last_ts = 0.0
        outputs.append(Forward(message, self.incarnation))

    def _drain(self) -> list[Output]:
        outputs: list[Output] = []
        while (message := self.held.get(self.expected)) is not None:
            self._forward(message, outputs)
        return outputs

    def _hold(self, message: EngineMessage) -> list[Output]:
        if message.sequence in self.held:
            self.counts.duplicates += 1
        elif not self.held.add(message):
            self.counts.shed += 1
        return [] if self._can_replay else self.without_replay()

    def _known(self, message: EngineMessage) -> list[Output]:
        same = self._same(message)
        if same is None and self._newest_live is None and self._verify and self._can_replay:
            # What a bridge hears right after it took the pod over may be older than what the other one has logged.
            self.counts.duplicates += 1
            return []
        if same is False or (same is None and self._newest_live is None):
            return self._restart(message, f"sequence {message.sequence} came again, with other bytes than before")
        self._newest_live = message.sequence
        self.counts.duplicates += 1
        if message.sequence == self.expected - 1 and same:
            self._verify = False
        return []

    def _same(self, message: EngineMessage) -> bool | None:
        """Tell whether a message below ``expected`` is the one that was forwarded; None when nothing is known of it."""
        sequence = message.sequence
        if message.payload is None:
            return None
        same = self._digests.same(sequence, message.payload, self.expected)
        if same is None and sequence == self.expected - 1 and self._last_ts:
            ts = self._read_ts(message.payload)
            return None if ts is None else abs(ts - self._last_ts) < 1e-6  # kept in ns, so rounded
        return same

    def _restart(self, message: EngineMessage | None, reason: str) -> list[Output]:
        self.counts.restarts += 1
        self.incarnation = self._next(self.incarnation)
        outputs: list[Output] = [Control(type=RESTART, incarnation=self.incarnation, reason=reason)]
        self.expected = 0
        self._digests = Digests(0)
        self._last_ts = 0.0
        self.held.clear()
        self._seen = -1
        self._newest_live = None
        self._failed = 0
        self._verify = False
        self._unverified = None
        self._asked, self._outdated, self._shown, self._heard, self._early = False, False, -1, -1, False
        self._catch_up = True
        if message is None:
            return outputs
        return outputs + (self.live(message) if message.source == SOURCE_LIVE else self.replayed(message))

    def _lose(self, first: int, last: int, reason: str) -> Control:
        self.counts.gaps += 1
        self.counts.lost += last - first + 1
        self.incarnation = self._next(self.incarnation)
        self._last_ts = 0.0
        self._digests.forget(first, last)
        return _gap(self.incarnation, first, last, reason)


def _gap(incarnation: int, first: int, last: int, reason: str) -> Control:
    return Control(type=GAP, incarnation=incarnation, first_lost=first, last_lost=last, reason=reason)
