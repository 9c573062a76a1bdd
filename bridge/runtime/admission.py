"""Admission control by waiting time: work that would wait too long for its turn is refused at once, with a hint.

A queue that is bounded by number alone answers everybody too late once it stands: what it takes in can no longer be
done in its caller's time. So the line before a turn is bounded by how long its oldest has waited: a quarter of the
caller's time, at most 0.1 s; and only 0.02 s once the line has stood for 0.1 s without getting empty, since then it is
no burst that passes. A request is refused when it arrives (the oldest has waited too long, so it would as well) or, at
the latest, when its turn comes. Turns are given out a few at a time per pass of the event loop, so that refusals are
prompt while there is more work than time.
"""

from __future__ import annotations

import asyncio
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
#: Nobody is told to ask again sooner: what waits has to be worked off first.
_HINT_SECONDS: Final = 0.05


class Step(enum.Enum):
    """Where a request is."""

    WAITING = enum.auto()
    INSIDE = enum.auto()
    REFUSED = enum.auto()
    LEFT = enum.auto()


class Arrival:
    """A request's place: in the line, inside, or out."""

    __slots__ = ("arrived", "step", "turn", "until")

    def __init__(self, arrived: float, until: float) -> None:
        self.arrived = arrived
        self.until = until
        self.step = Step.WAITING
        self.turn: asyncio.Future[None] | None = None


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
        return self.inside + self._count >= self._most

    def too_long(self, waited: float, seconds: float) -> bool:
        """Return whether a wait is too long for somebody who gives so many seconds in all."""
        stands = self._clock() - self._empty_at > _STANDS_AFTER_SECONDS
        most = min(_STANDING_SECONDS if stands else _BURST_SECONDS, _SHARE * seconds)
        return waited > max(most, 0.0)

    def join(self, until: float) -> Arrival:
        """Put a request at the end of the line."""
        place = Arrival(self._clock(), until)
        self._waiting.append(place)
        self._count += 1
        return place

    def enter(self, until: float) -> Arrival:
        """Let a request inside past the line."""
        place = Arrival(self._clock(), until)
        place.step = Step.INSIDE
        self.inside += 1
        return place

    def next(self) -> Arrival | None:
        """Take the first out of the line, inside or refused by its ``step``; None when nobody waits."""
        waited = self.oldest()
        if not self._waiting:
            return None
        place = self._waiting.popleft()
        self._count -= 1
        if self.too_long(waited, place.until - place.arrived):
            place.step = Step.REFUSED
        else:
            place.step = Step.INSIDE
            self.inside += 1
        self.oldest()  # notes that the line is empty
        return place

    def leave(self, place: Arrival) -> None:
        """Take a request out, wherever it is."""
        if place.step is Step.INSIDE:
            self.inside -= 1
        elif place.step is Step.WAITING:
            self._count -= 1
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
        self._armed = False

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
            return OverloadedError(f"{line.inside + line.waiting} {self._what}; try again", max(oldest, _HINT_SECONDS))
        return None

    def turn(self, until: float = math.inf) -> _Turn:
        """Return a context that is entered once it is the request's turn; entering raises OverloadedError."""
        return _Turn(self, until)

    def _refused(self, waited: float) -> OverloadedError:
        text = (
            f"more work than time: {self._line.waiting} requests wait, the first for {waited * 1e3:.0f} ms; try again"
        )
        return OverloadedError(text, max(waited, _HINT_SECONDS))

    def arrive(self, until: float) -> Arrival:
        """Let a request inside or into the line.

        Raises:
            OverloadedError: it is refused.
        """
        if (error := self.refusal(until)) is not None:
            raise error
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._round)
        if self._given < _TURNS and not self._line.waiting:
            self._given += 1
            return self._line.enter(until)
        place = self._line.join(until)
        place.turn = asyncio.get_running_loop().create_future()
        return place

    async def wait(self, place: Arrival) -> None:
        """Wait for a request's turn.

        Raises:
            OverloadedError: it came too late.
        """
        assert place.turn is not None
        try:
            await place.turn
        except asyncio.CancelledError:
            self.leave(place)
            raise
        if place.step is Step.REFUSED:
            raise self._refused(self._clock() - place.arrived)

    def leave(self, place: Arrival) -> None:
        """End a request."""
        self._line.leave(place)

    def _round(self) -> None:
        """Give out the turns of a pass of the event loop; refusals cost none."""
        self._given = 0
        while self._given < _TURNS and (place := self._line.next()) is not None:
            assert place.turn is not None
            self._given += place.step is Step.INSIDE
            if not place.turn.done():
                place.turn.set_result(None)
        self._armed = self._given > 0
        if self._armed:
            asyncio.get_running_loop().call_soon(self._round)


class _Turn:
    """The context of one request."""

    __slots__ = ("_admission", "_place", "_until")

    def __init__(self, admission: Admission, until: float) -> None:
        self._admission = admission
        self._until = until

    async def __aenter__(self) -> None:
        self._place = place = self._admission.arrive(self._until)
        if place.step is not Step.INSIDE:
            await self._admission.wait(place)

    async def __aexit__(self, *_: object) -> None:
        self._admission.leave(self._place)
