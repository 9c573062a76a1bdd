"""When blocks were last used, as one object per writer that is replaced as a whole.

The same records as the file tier's (:mod:`kvatlas.connector.files.usage`). An object cannot be appended to, so a writer
keeps its latest uses in memory, bounded, and writes them all.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterable
from typing import Final

from kvatlas.connector.files import layout
from kvatlas.connector.files.usage import SUFFIX, encode, usage_key
from kvatlas.connector.objects.client import Objects, ObjectStoreError

#: Uses that a writer keeps: 2 MiB of records an object.
_KEPT: Final = 1 << 16


class ObjectUses:
    """The uses of one writer. Thread-safe.

    Args:
        objects: the store.
        directory: the fingerprint's prefix.
        writer: unique among processes.
        seconds: how often they are written at the most.
        monotonic: seconds that never go back.
    """

    def __init__(
        self, objects: Objects, directory: str, writer: str, seconds: float, monotonic: Callable[[], float]
    ) -> None:
        self._objects = objects
        self._path = f"{directory}/{layout.USAGE}/{writer}{SUFFIX}"
        self._seconds = seconds
        self._monotonic = monotonic
        self._uses: dict[bytes, int] = {}
        self._next = monotonic() + seconds
        self._changed = False
        self._lock = threading.Lock()

    def touch(self, keys: Iterable[bytes], now_ns: int) -> bool:
        """Note uses; returns whether a flush is due, once until the next period."""
        with self._lock:
            for key in keys:
                self._uses[usage_key(key)] = now_ns
                self._changed = True
            if len(self._uses) > 2 * _KEPT:
                self._uses = dict(heapq.nlargest(_KEPT, self._uses.items(), key=lambda item: item[1]))
            if not self._changed or self._monotonic() < self._next:
                return False
            self._next = self._monotonic() + self._seconds
            return True

    def flush(self) -> bool:
        """Write the uses; False where the store refused (they are kept for the next time)."""
        with self._lock:
            latest = heapq.nlargest(_KEPT, self._uses.items(), key=lambda item: item[1])
            changed, self._changed = self._changed, False
        if not changed:
            return True
        try:
            self._objects.put(self._path, encode(latest), part_bytes=1 << 40)
        except ObjectStoreError:
            with self._lock:
                self._changed = True
            return False
        return True
