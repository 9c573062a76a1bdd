"""Admission control by waiting time: work that would wait too long for its turn is refused at once, with a hint.

A queue that is bounded by number alone answers everybody too late once it stands: what it takes in can no longer be
done in its caller's time. So the line before a turn is bounded by how long its oldest has waited: a quarter of the
caller's time, at most 0.1 s; and only 0.02 s once the line has stood for 0.1 s without getting empty, since then it is
no burst that passes. A request is refused when it arrives (the oldest has waited too long, so it would as well) or, at
the latest, when its turn comes. Turns are given out a few at a time per pass of the event loop, so that refusals are
prompt while there is more work than time.

A request joins the line as early as its front can tell: what happens before is a queue that nobody sees. Calls of gRPC
do with nothing but their headers (:meth:`Admission.come`): with their turn they begin to be read, a few at a time, and
are let inside once they are there as a whole, before whoever is still in the line. So the next are read while some are
worked on. A caller that is slow to send holds nobody up for more than 0.01 s.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from kvatlas.bridge.errors import OverloadedError

#: Part of the caller's time that may go by in the line: the rest is for the work, and for what follows on it.
_SHARE: Final = 0.25
#: A line of a burst may be so long, in seconds.
_BURST_SECONDS: Final = 0.1
#: A line that never got empty for so long is a standing one.
_STANDS_AFTER_SECONDS: Final = 0.1
_STANDING_SECONDS: Final = 0.02
#: Turns per pass of the event loop; each is about half a millisecond of work.
_TURNS: Final = 2
#: Requests that begin to be read, or are there and not yet inside; with more their work would come all at once.
_BEGUN: Final = 8
#: Those that are not there for so long are not waited for.
_SLOW_SECONDS: Final = 0.01
#: Nobody is told to ask again sooner: what waits has to be worked off first.
_HINT_SECONDS: Final = 0.05


class Step(enum.Enum):
    """Where a request is."""

    WAITING = enum.auto()
    BEGUN = enum.auto()
    READY = enum.auto()
    INSIDE = enum.auto()
    REFUSED = enum.auto()
    LEFT = enum.auto()


class Arrival:
    """A request's place: in the line, begun, inside, or out.

    Attributes:
        arrived: by the clock.
        until: end of the caller's time.
        whole: what it says is there with it; otherwise its turn is to begin to read that.
        turned: when it had its turn.
        turn: called then.
    """

    __slots__ = ("arrived", "line", "step", "turn", "turned", "until", "whole")

    def __init__(self, line: Line, arrived: float, until: float, whole: bool) -> None:
        self.line = line
        self.arrived = self.turned = arrived
        self.until = until
        self.whole = whole
        self.step = Step.WAITING
        self.turn: Callable[[], object] | None = None


#: The place of the request that this context belongs to, where it began with its turn.
_HAD: Final[contextvars.ContextVar[Arrival | None]] = contextvars.ContextVar("turn", default=None)


class Line:
    """Decides who waits, who goes inside and who is refused; pure apart from the clock that it is given.

    Attributes:
        inside: requests that have their turn and are not done.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """Create with nobody there; ``most`` bounds those inside and in the line together."""
        self.inside = 0
        self._most = most
        self._clock = clock
        self._waiting: deque[Arrival] = deque()
        self._count = 0  # of the line, without those who left it
        self._begun: deque[Arrival] = deque()
        self._begun_count = 0
        self._ready: deque[Arrival] = deque()
        self._ready_count = 0
        self._empty_at = clock()

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return self._count

    def oldest(self) -> float:
        """Return the seconds that the first of the line has waited."""
        while self._waiting and self._waiting[0].step is not Step.WAITING:
            self._waiting.popleft()
        now = self._clock()
        if not self._waiting:
            self._empty_at = now
            return 0.0
        return now - self._waiting[0].arrived

    def full(self) -> bool:
        """Return whether there are as many as may be."""
        return self.inside + self._count + self._ready_count >= self._most

    def too_long(self, waited: float, seconds: float) -> bool:
        """Return whether a wait is too long for somebody who gives so many seconds in all."""
        stands = self._clock() - self._empty_at > _STANDS_AFTER_SECONDS
        most = min(_STANDING_SECONDS if stands else _BURST_SECONDS, _SHARE * seconds)
        return waited > max(most, 0.0)

    def blocked(self) -> bool:
        """Return whether those who begin are to be waited for before others get their turn."""
        begun, now = self._begun, self._clock()
        while begun and (begun[0].step is not Step.BEGUN or now - begun[0].turned > _SLOW_SECONDS):
            self.leave(begun.popleft())
        return self._begun_count + self._ready_count >= _BEGUN

    @property
    def ready(self) -> int:
        """Requests that began, are there as a whole, and wait for a pass with time."""
        return self._ready_count

    def arrived(self, place: Arrival, until: float) -> Arrival:
        """Return the place of a request that began and is there as a whole now."""
        self.leave(place)
        place = Arrival(self, self._clock(), until, whole=True)
        place.step = Step.READY
        self._ready.append(place)
        self._ready_count += 1
        return place

    def join(self, until: float, *, whole: bool = True) -> Arrival:
        """Put a request at the end of the line."""
        place = Arrival(self, self._clock(), until, whole)
        self._waiting.append(place)
        self._count += 1
        return place

    def enter(self, until: float, *, whole: bool = True) -> Arrival:
        """Let a request in past the line."""
        place = Arrival(self, self._clock(), until, whole)
        self._let(place)
        return place

    def _let(self, place: Arrival) -> None:
        if place.whole:
            place.step = Step.INSIDE
            self.inside += 1
        else:
            place.step = Step.BEGUN
            place.turned = self._clock()
            self._begun.append(place)
            self._begun_count += 1

    def next(self) -> Arrival | None:
        """Take the first out of the line, let in or refused by its ``step``; None when nobody waits or can go on."""
        waited = self.oldest()
        place = self._waiting[0] if self._waiting else None
        late = place is not None and self.too_long(waited, place.until - place.arrived)
        if not late and (place is None or place.whole or self.blocked()):
            if (ready := self._next_ready()) is not None:
                return ready
            if place is None or not place.whole:
                return None
        assert place is not None
        self._waiting.popleft()
        self._count -= 1
        if late:
            place.step = Step.REFUSED
        else:
            self._let(place)
        self.oldest()  # notes that the line is empty
        return place

    def _next_ready(self) -> Arrival | None:
        while self._ready:
            place = self._ready.popleft()
            if place.step is Step.READY:
                self._ready_count -= 1
                self._let(place)
                return place
        return None

    def leave(self, place: Arrival) -> None:
        """Take a request out, wherever it is."""
        if place.step is Step.INSIDE:
            self.inside -= 1
        elif place.step is Step.WAITING:
            self._count -= 1
        elif place.step is Step.BEGUN:
            self._begun_count -= 1
        elif place.step is Step.READY:
            self._ready_count -= 1
        else:
            return
        place.step = Step.LEFT


class Admission:
    """Gives requests their turn in order, or refuses them; for one event loop."""

    def __init__(self, most: int, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Create with nobody there.

        Args:
            most: how many may be inside and wait.
            what: what they are and what says how many, for the refusal.
            clock: monotonic seconds.
        """
        self._line = Line(most, clock)
        self._clock = clock
        self._what = what
        self._given = 0
        self._next: asyncio.Handle | None = None  # round
        self._soon = False  # it comes in the next pass

    @property
    def inside(self) -> int:
        """Requests that are worked on."""
        return self._line.inside

    def refusal(self, until: float = math.inf) -> OverloadedError | None:
        """Return why a request would be refused now, None when it would not; cheap enough to ask before reading it.

        Args:
            until: end of the caller's time, by the clock.
        """
        line = self._line
        oldest = line.oldest()
        if oldest and line.too_long(oldest, until - self._clock()):
            return self._refused(oldest)
        if line.full():
            return self._full(oldest)
        return None

    def turn(self, until: float = math.inf) -> _Turn:
        """Return a context that is entered once it is the request's turn; entering raises OverloadedError."""
        return _Turn(self, until)

    def _full(self, waited: float) -> OverloadedError:
        count = self._line.inside + self._line.ready + self._line.waiting
        return OverloadedError(f"{count} {self._what}; try again", max(waited, _HINT_SECONDS))

    def _refused(self, waited: float) -> OverloadedError:
        text = (
            f"more work than time: {self._line.waiting} requests wait, the first for {waited * 1e3:.0f} ms; try again"
        )
        return OverloadedError(text, max(waited, _HINT_SECONDS))

    def come(
        self, begin: Callable[[], object], refuse: Callable[[OverloadedError], object], until: float = math.inf
    ) -> None:
        """Call one of two once it is decided: now, or in a later pass of the event loop.

        Args:
            begin: begins with a request; what it starts is let in past the line by :meth:`turn`.
            refuse: answers that it is refused.
            until: end of the caller's time, by the clock.
        """
        if (error := self.refusal(until)) is not None:
            refuse(error)
            return

        def turn() -> None:
            if place.step is Step.REFUSED:
                refuse(self._refused(self._clock() - place.arrived))
                return
            token = _HAD.set(place)
            begin()
            _HAD.reset(token)

        place = self._placed(until, turn, whole=False)
        if place.step is not Step.WAITING:
            turn()

    def arrive(self, until: float, turn: Callable[[], object]) -> Arrival:
        """Let a request inside or into the line; ``turn`` is called when a wait is over.

        Raises:
            OverloadedError: it is refused.
        """
        line, had = self._line, _HAD.get()
        if had is not None and had.line is line:
            line.leave(had)
            self._arm()
            if line.full():
                raise self._full(0.0)
            if self._given < _TURNS and not line.ready:
                self._given += 1
                return line.enter(until)
            place = line.arrived(had, until)
            place.turn = turn
            return place
        if (error := self.refusal(until)) is not None:
            raise error
        return self._placed(until, turn)

    def _placed(self, until: float, turn: Callable[[], object], *, whole: bool = True) -> Arrival:
        if self._next is None:
            self._arm()
        line = self._line
        free = self._given < _TURNS and not line.ready if whole else not line.blocked()
        if free and not line.waiting:
            self._given += whole
            return line.enter(until, whole=whole)
        place = line.join(until, whole=whole)
        place.turn = turn
        return place

    def _arm(self, seconds: float = 0.0) -> None:
        """Let a round come in the next pass of the event loop, or later."""
        loop = asyncio.get_running_loop()
        if self._soon:
            return
        if self._next is not None:
            self._next.cancel()
        self._soon = not seconds
        self._next = loop.call_later(seconds, self._round) if seconds else loop.call_soon(self._round)

    def check(self, place: Arrival) -> None:
        """Look what came of a wait.

        Raises:
            OverloadedError: the turn came too late.
        """
        if place.step is Step.REFUSED:
            raise self._refused(self._clock() - place.arrived)

    def leave(self, place: Arrival) -> None:
        """End a request."""
        self._line.leave(place)

    def _round(self) -> None:
        """Give out the turns of a pass of the event loop; refusals cost none."""
        self._given = 0
        self._next, self._soon = None, False
        while self._given < _TURNS and (place := self._line.next()) is not None:
            assert place.turn is not None
            self._given += place.step is Step.INSIDE
            place.turn()
        if self._given:
            self._arm()
        elif self._line.waiting:
            self._arm(_SLOW_SECONDS)


class _Turn:
    """The context of one request."""

    __slots__ = ("_admission", "_place", "_until", "_waiter")

    def __init__(self, admission: Admission, until: float) -> None:
        self._admission = admission
        self._until = until
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> None:
        self._place = place = self._admission.arrive(self._until, self._called)
        if place.step is Step.INSIDE:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            self._admission.leave(place)
            raise
        self._admission.check(place)

    def _called(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aexit__(self, *_: object) -> None:
        self._admission.leave(self._place)
