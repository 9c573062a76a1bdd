"""Turns of work that would hold up others: one at a time, a bounded number waiting, each to its end.

Whoever asks may go away; its work then ends before the next has its turn, so that asking and leaving piles nothing up.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

from kvatlas.scorer.errors import BusyError

_MOST_WAITING: Final = 16

T = TypeVar("T")


class Turns:
    """Gives turns; for one event loop."""

    def __init__(self, what: str, most: int = _MOST_WAITING) -> None:
        """Create with nobody there.

        Args:
            what: names the work, for refusals.
            most: so many may wait.
        """
        self._what = what
        self._most = most
        self._waiting = 0
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn.

        Raises:
            BusyError: too many wait.
        """
        if self._waiting >= self._most:
            raise BusyError(f"{self._waiting} {self._what} wait; try again")
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()

    async def run(self, work: Callable[[threading.Event], T]) -> T:
        """Do work on a thread once it is its turn; it is told by the event when nobody waits for it any more.

        Raises:
            BusyError: too many wait.
        """
        async with self.turn():
            gone = threading.Event()
            thread = asyncio.ensure_future(asyncio.to_thread(work, gone))
            try:
                return await asyncio.shield(thread)
            except asyncio.CancelledError:
                gone.set()
                await asyncio.wait([thread])
                raise
