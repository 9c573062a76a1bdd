"""How many transfers may be in I/O at once: reads before writes, and writes never all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class IoGate:
    """Places in I/O.

    There are more threads than places, so that checksums are computed while other transfers use the disk; without
    the gate those threads would only deepen the disk's queue. A place is held for one file's calls and nothing else is
    waited for while holding it, except memory whose holders wait for no place.

    Args:
        places: transfers in I/O at once.
        writes: how many of them may be writes; a waiting read goes before every waiting write.
    """

    def __init__(self, places: int, writes: int) -> None:
        self._places = places
        self._writes = writes
        self._reading = 0
        self._writing = 0
        self._reads_waiting = 0
        lock = threading.Lock()
        self._read_may = threading.Condition(lock)
        self._write_may = threading.Condition(lock)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold a place for a read."""
        with self._read_may:
            self._reads_waiting += 1
            while self._reading + self._writing >= self._places:
                self._read_may.wait()
            self._reads_waiting -= 1
            self._reading += 1
        try:
            yield
        finally:
            with self._read_may:
                self._reading -= 1
                self._pass_on()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold a place for a write."""
        with self._write_may:
            while not self._write_fits():
                self._write_may.wait()
            self._writing += 1
        try:
            yield
        finally:
            with self._write_may:
                self._writing -= 1
                self._pass_on()

    def _write_fits(self) -> bool:
        free = self._places - self._reading - self._writing - self._reads_waiting
        return free > 0 and self._writing < self._writes

    def _pass_on(self) -> None:
        if self._reads_waiting:
            self._read_may.notify()
        elif self._write_fits():
            self._write_may.notify()
