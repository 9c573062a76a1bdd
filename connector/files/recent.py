"""A bounded set of keys that forgets each after a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

_KEPT: Final = 1 << 18


class Recent:
    """Keys added within the last ``seconds``; of too many, the latest. Thread-safe."""

    def __init__(self, seconds: float, monotonic: Callable[[], float]) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._until: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def add(self, key: bytes) -> None:
        """Remember a key from now on."""
        with self._lock:
            self._until.pop(key, None)
            self._until[key] = self._monotonic() + self._seconds
            if len(self._until) > _KEPT:
                # In order of time: what is oldest goes first.
                del self._until[next(iter(self._until))]

    def discard(self, key: bytes) -> None:
        """Forget a key."""
        with self._lock:
            self._until.pop(key, None)

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            until = self._until.get(key)
            if until is None:
                return False
            if self._monotonic() < until:
                return True
            del self._until[key]
            return False
