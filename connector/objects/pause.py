"""Circuit breaker: a store that fails again and again is left alone for a while.

Otherwise every request would wait for its timeout, and the engine with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Pause:
    """Counts failures in a row. Thread-safe.

    Args:
        failures: so many in a row begin a pause.
        seconds: how long it lasts; afterwards one failure more begins the next.
        monotonic: seconds that never go back.
    """

    def __init__(self, failures: int, seconds: float, monotonic: Callable[[], float]) -> None:
        self._limit = failures
        self._seconds = seconds
        self._monotonic = monotonic
        self._failures = 0
        self._until = 0.0
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether nothing is to be asked now."""
        with self._lock:
            return self._monotonic() < self._until

    def failed(self) -> bool:
        """Note a failure; returns whether a pause began with it."""
        with self._lock:
            self._failures += 1
            now = self._monotonic()
            if self._failures < self._limit or now < self._until:
                return False
            self._until = now + self._seconds
            return True

    def answered(self) -> None:
        """Note that the store answered, whatever it said."""
        with self._lock:
            self._failures = 0
            self._until = 0.0
