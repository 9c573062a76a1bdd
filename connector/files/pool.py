"""Threads for blocking I/O: reads first, writes bounded, shedding instead of piling up."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvatlas.connector.errors import ClosedError


class Task(NamedTuple):
    """One blocking piece of work.

    Attributes:
        run: does it; must handle its own errors, what escapes is counted and dropped.
        cancel: called instead of ``run`` when the pool closes first.
        cost_bytes: what it moves, for the queue bounds.
    """

    run: Callable[[], object]
    cancel: Callable[[], object]
    cost_bytes: int


def numa_cpus(node: int) -> tuple[int, ...]:
    """Return the CPUs of a NUMA node, empty when the system does not say."""
    try:
        text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text(encoding="ascii")
    except OSError:
        return ()
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


class IoPool:
    """A fixed set of threads with one queue for reads and one for writes.

    A free thread takes a read when there is one. At most ``write_threads`` threads write at a time, so a burst
    of stores never holds up a load for longer than the write in progress.

    Args:
        threads: number of threads.
        write_threads: how many of them may write at once.
        queued_write_bytes: writes waiting beyond this are refused.
        cpus: pin the threads to these CPUs; empty leaves placement to the system.
        name: prefix of the thread names.
    """

    def __init__(
        self,
        *,
        threads: int,
        write_threads: int,
        queued_write_bytes: int,
        cpus: Sequence[int] = (),
        name: str = "kvatlas-io",
    ) -> None:
        self._reads: deque[Task] = deque()
        self._writes: deque[Task] = deque()
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._write_threads = write_threads
        self._limit = queued_write_bytes
        self._queued_write_bytes = 0
        self._writing = 0
        self._busy = 0
        self._closed = False
        self._cpus = frozenset(cpus)
        self.escaped = 0
        """Exceptions that a task let escape; always zero unless there is a bug."""
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> tuple[int, int]:
        """Waiting reads and writes."""
        with self._changed:
            return len(self._reads), len(self._writes)

    def read(self, task: Task) -> None:
        """Queue a read; never refused.

        Raises:
            ClosedError: the pool is closed.
        """
        with self._changed:
            self._check_open()
            self._reads.append(task)
            self._changed.notify()

    def write(self, task: Task, *, force: bool = False) -> bool:
        """Queue a write; returns False when too much is waiting already and ``force`` is not set.

        Raises:
            ClosedError: the pool is closed.
        """
        with self._changed:
            self._check_open()
            # One write larger than the limit still gets in when nothing waits, or it never would.
            over = self._queued_write_bytes + task.cost_bytes > self._limit and self._queued_write_bytes > 0
            if over and not force:
                return False
            self._queued_write_bytes += task.cost_bytes
            self._writes.append(task)
            self._changed.notify()
            return True

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is queued or running; False when that took longer than the timeout."""
        with self._idle:
            return self._idle.wait_for(self._nothing_left, timeout_seconds)

    def _nothing_left(self) -> bool:
        return not self._reads and not self._writes and not self._busy

    def close(self, *, drain: bool = False) -> None:
        """End the threads after what they run now; queued tasks are cancelled unless ``drain``."""
        if drain:
            self.drain()
        with self._changed:
            self._closed = True
            waiting = [*self._reads, *self._writes]
            self._reads.clear()
            self._writes.clear()
            self._queued_write_bytes = 0
            self._changed.notify_all()
            if self._nothing_left():
                self._idle.notify_all()
        for task in waiting:
            task.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the I/O pool is closed")

    def _next(self) -> tuple[Task, bool] | None:
        with self._changed:
            while True:
                if self._reads:
                    self._busy += 1
                    return self._reads.popleft(), False
                if self._writes and self._writing < self._write_threads:
                    task = self._writes.popleft()
                    self._queued_write_bytes -= task.cost_bytes
                    self._writing += 1
                    self._busy += 1
                    return task, True
                if self._closed:
                    return None
                self._changed.wait()

    def _work(self) -> None:
        if self._cpus:
            with contextlib.suppress(OSError, AttributeError):
                os.sched_setaffinity(0, self._cpus)
        while (found := self._next()) is not None:
            task, writing = found
            try:
                task.run()
            except Exception:  # noqa: BLE001 - a task's bug must not take the thread along
                self.escaped += 1
                with contextlib.suppress(Exception):
                    task.cancel()
            finally:
                # The task's closures hold buffers; drop them before sleeping.
                del task, found
                with self._changed:
                    self._busy -= 1
                    self._writing -= writing
                    # This thread takes the next task itself; another one is woken only by what came meanwhile.
                    if self._nothing_left():
                        self._idle.notify_all()
