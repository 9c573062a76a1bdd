"""Places in I/O: bounded, reads before writes, and nobody is forgotten."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from kvatlas.connector.files.gate import IoGate

WAIT = 60


class Holder:
    """A thread that asks for a place, tells when it got it, and keeps it until released."""

    def __init__(self, enter: Callable[[], AbstractContextManager[None]]) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, args=(enter,))
        self._thread.start()

    def _work(self, enter: Callable[[], AbstractContextManager[None]]) -> None:
        with enter():
            self.inside.set()
            assert self.leave.wait(WAIT)

    def entered(self, seconds: float = WAIT) -> bool:
        return self.inside.wait(seconds)

    def end(self) -> None:
        self.leave.set()
        self._thread.join(WAIT)


def asks(gate: IoGate) -> None:
    """Wait until a read is waiting."""
    deadline = time.monotonic() + WAIT
    while not gate._reads_waiting and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_waiting_read_goes_before_a_write_that_came_earlier() -> None:
    """The place that becomes free is the read's, although a write has waited longer."""
    gate = IoGate(1, 1)
    first = Holder(gate.writing)
    assert first.entered()
    write = Holder(gate.writing)
    assert not write.entered(0.02)
    read = Holder(gate.reading)
    asks(gate)
    first.end()
    assert read.entered()
    assert not write.entered(0.02)
    read.end()
    assert write.entered()
    write.end()


def test_writes_never_take_every_place() -> None:
    """A read finds a place while more writes wait than may run."""
    gate = IoGate(3, 2)
    writes = [Holder(gate.writing) for _ in range(4)]
    read = Holder(gate.reading)
    assert read.entered()
    read.end()
    assert sum(write.entered(0.05) for write in writes) == 2
    for write in writes:
        write.leave.set()
    assert all(write.entered() for write in writes)
    for write in writes:
        write.end()


def test_many_threads_stay_within_the_bounds_and_all_get_through() -> None:
    """Under contention the bounds hold at every moment and no thread is left waiting."""
    gate, lock = IoGate(3, 2), threading.Lock()
    now = {"read": 0, "write": 0}
    wrong: list[dict[str, int]] = []
    done: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            kind = rng.choice(["read", "write"])
            with gate.reading() if kind == "read" else gate.writing():
                with lock:
                    now[kind] += 1
                    if now["write"] > 2 or sum(now.values()) > 3:
                        wrong.append(dict(now))
                time.sleep(rng.random() / 5000)
                with lock:
                    now[kind] -= 1
        done.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT * 3)
    assert sorted(done) == list(range(6))
    assert wrong == []


def test_an_error_inside_gives_the_place_back() -> None:
    """A transfer that fails leaves its place to the next."""
    gate = IoGate(1, 1)
    for enter in (gate.reading, gate.writing, gate.reading):
        try:
            with enter():
                raise OSError("injected")
        except OSError:
            pass
    last = Holder(gate.writing)
    assert last.entered()
    last.end()
