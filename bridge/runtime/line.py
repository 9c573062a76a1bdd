"""The line before a turn: who waits, who begins, who goes inside and who is refused; pure apart from a clock.

The rules are those of :mod:`~kvatlas.bridge.runtime.admission`, which gives out the turns.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Final

#: Part of the caller's time that may go by in the line: the rest is for the work, and for what follows on it.
_SHARE: Final = 0.25
#: A line of a burst may be so long, in seconds.
_BURST_SECONDS: Final = 0.1
#: A line that never got empty for so long is a standing one.
_STANDS_AFTER_SECONDS: Final = 0.1
_STANDING_SECONDS: Final = 0.02
#: Requests that begin to be read, or are there and not yet inside; with more their work would come all at once.
_BEGUN: Final = 8
#: Those that are not there for so long are not waited for.
_SLOW_SECONDS: Final = 0.01


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
        self._slow = 0.0  # of those that began lately, how many were not there in time
        self._slow_at = clock()
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
        while begun and (begun[0].step is not Step.BEGUN or now - begun[0].turned > self.patience()):
            place = begun.popleft()
            self._slow += place.step is Step.BEGUN
            self.leave(place)
        return self._begun_count + self._ready_count >= _BEGUN

    def patience(self) -> float:
        """Return for how long those who begin are waited for: the less, the more of them came late lately."""
        now = self._clock()
        if now > self._slow_at:
            self._slow *= 0.5 ** (now - self._slow_at)
            self._slow_at = now
        return _SLOW_SECONDS / (1.0 + self._slow / _BEGUN)

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
