"""The I/O threads: reads first, writers bounded, shedding, and an end for every task."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.connector.errors import ClosedError
from kvatlas.connector.files.pool import IoPool, Task, numa_cpus

WAIT = 60


class Rig:
    """A pool whose tasks wait for a gate, and what they did in order."""

    def __init__(self, **settings: int) -> None:
        self.pool = IoPool(**{"threads": 1, "write_threads": 1, "queued_write_bytes": 100, **settings})
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.done: list[str] = []

    def task(self, name: str, *, cost: int = 10, gated: bool = False) -> Task:
        def run() -> None:
            self.begun.release()
            if gated:
                assert self.gate.wait(WAIT)
            self.done.append(name)

        return Task(run, lambda: self.done.append(f"{name} cancelled"), cost)

    def occupy(self, count: int = 1, *, writes: bool = False) -> None:
        for number in range(count):
            submit: Callable[[Task], object] = self.pool.write if writes else self.pool.read
            submit(self.task(f"gate{number}", cost=0, gated=True))
            assert self.begun.acquire(timeout=WAIT)


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    """Put each rig here, to be closed at the end."""
    made: list[Rig] = []
    yield made
    for rig in made:
        rig.gate.set()
        rig.pool.close()


def test_a_waiting_read_goes_before_every_waiting_write(rigs: list[Rig]) -> None:
    """Loads overtake stores that came earlier."""
    rig = Rig()
    rigs.append(rig)
    rig.occupy()
    for number in range(3):
        assert rig.pool.write(rig.task(f"w{number}"))
    for number in range(3):
        rig.pool.read(rig.task(f"r{number}"))
    assert rig.pool.queued == (3, 3)
    rig.gate.set()
    assert rig.pool.drain(WAIT)
    assert rig.done == ["gate0", "r0", "r1", "r2", "w0", "w1", "w2"]


def test_writers_never_take_every_thread(rigs: list[Rig]) -> None:
    """While as many writes run as may, more wait and a read still gets a thread."""
    rig = Rig(threads=3, write_threads=2)
    rigs.append(rig)
    rig.occupy(2, writes=True)
    assert rig.pool.write(rig.task("w"))
    rig.pool.read(rig.task("r"))
    assert rig.begun.acquire(timeout=WAIT)
    assert rig.done == ["r"]
    assert rig.pool.queued == (0, 1)
    rig.gate.set()
    assert rig.pool.drain(WAIT)
    assert sorted(rig.done) == ["gate0", "gate1", "r", "w"]


def test_writes_beyond_the_bound_are_refused(rigs: list[Rig]) -> None:
    """Waiting writes are bounded in bytes; a forced one gets in, and a huge one when nothing else waits."""
    rig = Rig()
    rigs.append(rig)
    rig.occupy()
    assert rig.pool.write(rig.task("huge", cost=1000))
    assert not rig.pool.write(rig.task("more", cost=1))
    assert rig.pool.write(rig.task("forced", cost=1), force=True)
    rig.gate.set()
    assert rig.pool.drain(WAIT)
    assert rig.pool.write(rig.task("later", cost=100))
    assert rig.pool.drain(WAIT)
    assert rig.done == ["gate0", "huge", "forced", "later"]


@given(costs=st.lists(st.integers(1, 60), max_size=20))
@settings(max_examples=30, deadline=None)
def test_what_waits_stays_within_the_bound(costs: list[int]) -> None:
    """Accepted writes that wait never exceed the bound unless there is only one."""
    rig = Rig()
    rig.occupy()
    waiting: list[int] = []
    for cost in costs:
        accepted = rig.pool.write(rig.task("w", cost=cost))
        assert accepted == (not waiting or sum(waiting) + cost <= 100)
        waiting += [cost] * accepted
    rig.gate.set()
    assert rig.pool.drain(WAIT)
    assert rig.done.count("w") == len(waiting)
    rig.pool.close()


def test_closing_cancels_what_waits(rigs: list[Rig]) -> None:
    """What runs ends, what waits is cancelled, what comes later is an error."""
    rig = Rig()
    rigs.append(rig)
    rig.occupy()
    rig.pool.write(rig.task("w"))
    rig.pool.read(rig.task("r"))
    closing = threading.Thread(target=rig.pool.close)
    closing.start()
    while "w cancelled" not in rig.done:
        assert closing.is_alive()
    rig.gate.set()
    closing.join(WAIT)
    assert sorted(rig.done) == ["gate0", "r cancelled", "w cancelled"]
    for submit in (rig.pool.read, rig.pool.write):
        with pytest.raises(ClosedError):
            submit(rig.task("late"))


def test_draining_before_the_end_cancels_nothing(rigs: list[Rig]) -> None:
    """Closing with drain runs everything first."""
    rig = Rig()
    rigs.append(rig)
    for number in range(5):
        rig.pool.write(rig.task(f"w{number}"))
    rig.pool.close(drain=True)
    assert rig.done == [f"w{number}" for number in range(5)]


def test_an_escaping_error_costs_no_thread(rigs: list[Rig]) -> None:
    """A task with a bug is counted and cancelled, and the thread goes on."""
    rig = Rig()
    rigs.append(rig)
    rig.pool.read(Task(lambda: 1 // 0, lambda: rig.done.append("cancelled"), 0))
    rig.pool.read(rig.task("next"))
    assert rig.pool.drain(WAIT)
    assert rig.done == ["cancelled", "next"]
    assert rig.pool.escaped == 1


def test_threads_stay_on_their_cpus() -> None:
    """Threads run on the CPUs that the settings name."""
    wanted = {sorted(os.sched_getaffinity(0))[0]}
    pool = IoPool(threads=2, write_threads=1, queued_write_bytes=1, cpus=tuple(wanted))
    seen: list[set[int]] = []
    for _ in range(4):
        pool.read(Task(lambda: seen.append(os.sched_getaffinity(0)), lambda: None, 0))
    pool.close(drain=True)
    assert seen == [wanted] * 4


def test_the_cpus_of_a_numa_node() -> None:
    """The first node's CPUs are real ones; a node that is not there has none."""
    assert set(numa_cpus(0)) <= set(range(os.cpu_count() or 1))
    assert numa_cpus(9999) == ()
