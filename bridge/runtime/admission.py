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
worked on. A caller that is slow to send holds nobody up for more than 0.01 s, and for less where there are many.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Callable
from typing import Final

from kvatlas.bridge.errors import OverloadedError
from kvatlas.bridge.runtime.line import Arrival, Line, Step

#: Turns per pass of the event loop; each is about half a millisecond of work.
_TURNS: Final = 2
#: Nobody is told to ask again sooner: what waits has to be worked off first.
_HINT_SECONDS: Final = 0.05

#: The place of the request that this context belongs to, where it began with its turn.
_HAD: Final[contextvars.ContextVar[Arrival | None]] = contextvars.ContextVar("turn", default=None)


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

    def begun(self) -> Callable[[], None]:
        """Return what tells the end of what begins now: where it never was there as a whole, others need not wait."""
        had = _HAD.get()

        def ended() -> None:
            if had is not None and had.step is Step.BEGUN:
                self._line.leave(had)
                self._arm()

        return ended

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
            self._arm(self._line.patience())


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
