"""What peers have begun and not finished, bounded in time and number: whoever sends nothing more only holds memory.

Connections without a whole request, calls without their message. Each may stay so for a time; when there are too many,
the one that has waited the longest ends. A peer that means it finishes within milliseconds, so it is not that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable


class Unfinished:
    """Counts what is unfinished, and ends what stays so; for one event loop."""

    def __init__(self, most: int, seconds: float) -> None:
        """Create with nothing there.

        Args:
            most: unfinished at a time.
            seconds: each may be so for so long.
        """
        self._most = most
        self._seconds = seconds
        self._ends: dict[Hashable, tuple[float, Callable[[], object]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def begin(self, key: Hashable, end: Callable[[], object]) -> None:
        """Take what has begun; ``end`` is called when it is not finished in time, or gives way to others."""
        loop = asyncio.get_running_loop()
        while len(self._ends) >= self._most:
            self._end(next(iter(self._ends)))
        self._ends[key] = (loop.time() + self._seconds, end)
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._look)

    def done(self, key: Hashable) -> None:
        """Take what is finished, or has ended; more than once does no harm."""
        self._ends.pop(key, None)

    def end_all(self) -> None:
        """End what is left."""
        while self._ends:
            self._end(next(iter(self._ends)))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, key: Hashable) -> None:
        _, end = self._ends.pop(key)
        end()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._ends:
            key = next(iter(self._ends))
            left = self._ends[key][0] - loop.time()
            if left > 0:
                self._timer = loop.call_later(left, self._look)
                return
            self._end(key)
