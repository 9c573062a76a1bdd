"""Page-aligned memory for direct I/O: a bounded pool of reusable buffers."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvatlas.connector.files.fs import Buffer
from kvatlas.connector.files.layout import ALIGNMENT, round_up


def is_aligned(buffer: Buffer) -> bool:
    """Return whether address and length of ``buffer`` suit direct I/O."""
    return len(buffer) % ALIGNMENT == 0 and address(buffer) % ALIGNMENT == 0


def address(buffer: Buffer) -> int:
    """Return the address of the first byte; 0 for an empty buffer."""
    return int(np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0]) if len(buffer) else 0


class AlignedPool:
    """Aligned buffers of at most ``limit_bytes`` together; who asks for more waits for one to come back.

    Buffers come in power-of-two sizes. A holder never asks for a second buffer, so waiting always ends.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._free: dict[int, list[mmap.mmap]] = {}
        self._changed = threading.Condition()

    @contextmanager
    def take(self, size: int) -> Iterator[Buffer]:
        """Lend a buffer of exactly ``size`` bytes, rounded up to a page; its content is undefined."""
        wanted = round_up(max(size, 1))
        capacity = 1 << (wanted - 1).bit_length()
        memory = self._acquire(capacity)
        view = memoryview(memory)
        part = view[:wanted]
        try:
            yield part
        finally:
            part.release()
            view.release()
            with self._changed:
                self._free.setdefault(capacity, []).append(memory)
                self._used -= capacity
                self._changed.notify_all()

    def _acquire(self, capacity: int) -> mmap.mmap:
        with self._changed:
            # A buffer above the limit is lent when nothing else is out: slow, but never stuck.
            self._changed.wait_for(lambda: self._used + capacity <= self._limit or self._used == 0)
            self._used += capacity
            stock = self._free.get(capacity)
            if stock:
                return stock.pop()
            self._trim(capacity)
        return mmap.mmap(-1, capacity)

    def _trim(self, needed: int) -> None:
        """Give idle buffers of other sizes back, so that lent and idle ones stay within the limit."""
        idle = sum(size * len(stock) for size, stock in self._free.items())
        for size, stock in list(self._free.items()):
            while stock and self._used + idle > self._limit and size != needed:
                stock.pop().close()
                idle -= size
