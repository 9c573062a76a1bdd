"""Announcements of blocks, in the order in which their objects changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from kvatlas.connector.files.holdings import Change

#: Locks over blocks' names. A store holds its block's lock while it runs, so there are many more than threads.
_STRIPES: Final = 1024
#: Blocks that a run remembers having announced; an older one is announced, and read through by a store, once more.
_KEPT: Final = 1 << 20


class Announced:
    """What this run has told the listener that the store holds. Thread-safe.

    Whoever changes a block's object and tells of it holds :meth:`lock` for both, so that a listener that heard
    "stored" last finds the block, and one that heard "removed" last does not.
    """

    def __init__(self, listener: Callable[[Change], None] | None) -> None:
        self._listener = listener
        self._keys: dict[bytes, None] = {}
        self._lock = threading.Lock()
        self._stripes = [threading.Lock() for _ in range(_STRIPES)]

    def lock(self, key: bytes) -> threading.Lock:
        """Return the lock over a block's name."""
        return self._stripes[hash(key) % _STRIPES]

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def stored(self, key: bytes) -> None:
        """Tell of a block that is there, once; its lock is held."""
        with self._lock:
            if key in self._keys:
                return
            self._keys[key] = None
            if len(self._keys) > _KEPT:
                del self._keys[next(iter(self._keys))]
        if self._listener is not None:
            self._listener(Change(removed=False, keys=(key,)))

    def removed(self, key: bytes) -> None:
        """Tell of a block that is there no more, also one that an earlier run may have told of; its lock is held."""
        with self._lock:
            self._keys.pop(key, None)
        if self._listener is not None:
            self._listener(Change(removed=True, keys=(key,)))
