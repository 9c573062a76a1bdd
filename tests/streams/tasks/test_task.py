"""Tests of partition tasks: apply, send, commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from kvatlas.streams.errors import ChangelogError, StoreError
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import PartitionState
from kvatlas.streams.tasks.task import PartitionTask, TaskLimits, TaskParts
from kvatlas.streams.tasks.task_set import TaskSet


def fetched(*offsets: int, partition: int = 0) -> dict[int, list[Any]]:
    return {partition: [SimpleNamespace(offset=offset, partition=partition) for offset in offsets]}


class NumbersTask(PartitionTask):
    """Writes each record's offset under a key of its own; sends the offsets when told to, and fails as told."""

    agent: ClassVar[str] = "t"

    def __init__(self, parts: TaskParts, rig: Rig) -> None:
        super().__init__(parts)
        self.rig = rig
        self.applied: list[int] = []

    async def apply(self, records: Iterator[Any]) -> bool:
        self.applied = []
        for record in records:
            self.overlay.put(b"%08d" % record.offset, b"x")
            self.applied.append(record.offset)
            self.took(1)
            await self.give_way(1)
        self.advance(self.applied[-1], 1, updates=len(self.applied), counts={})
        return self.rig.sends

    async def send(self) -> None:
        if self.rig.failures:
            raise self.rig.failures.pop()
        self.rig.log.append(("send", tuple(self.applied)))


class Rig:
    """A source topic and a table of one partition; commits when the gate is open, fails as told, keeps a log.

    Args:
        state: the partition.
        ours: whether it is ours to write.
        sends: whether something is to be sent after each slice.
    """

    def __init__(self, state: PartitionState, *, ours: bool = True, sends: bool = False) -> None:
        self.state, self.ours, self.sends = state, ours, sends
        self.log: list[Any] = []
        self.seeks: list[Any] = []
        self.failures: list[Exception] = []
        self.failed: list[BaseException] = []
        self.gate = asyncio.Event()
        self.sure = True

    def partition(self, number: int) -> PartitionState | None:
        return self.state if self.ours else None

    def rewind(self, number: int, offset: int) -> None:
        self.seeks.append((number, offset))

    def committed(self, number: int, offset: int) -> None:
        self.log.append(("done", offset))

    async def commit(self, state: PartitionState, changes: ChangeSet) -> None:
        assert state.lock.locked()
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        state.write(changes.writes, changes.source_offset, Meta(changes.source_offset, changes.receive_ns))
        state.overlay.committed(changes)
        self.log.append(("commit", tuple(int(key) for key in changes.writes)))


Make = Callable[..., tuple[TaskSet, Rig]]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Make task sets over a partition that reflects ``applied``."""
    states: list[PartitionState] = []
    made: list[tuple[TaskSet, Rig]] = []

    def tasks(
        *failures: Exception,
        applied: int | None = -1,
        limit: int = 100,
        most: int = 1000,
        sends: bool = False,
        interval: float = 0.0,
        gate: bool = True,
    ) -> tuple[TaskSet, Rig]:
        path = tmp_path / f"{len(states)}.db"
        state = PartitionState(0, path, RocksBudget(1 << 20, 8 << 20), 1 << 20)
        states.append(state)
        if applied is not None and applied >= 0:
            state.write({}, 1, Meta(applied))
        rig = Rig(state, ours=applied is not None, sends=sends)
        rig.failures = list(failures)
        if gate:
            rig.gate.set()
        task_set = TaskSet(
            "t",
            rig,
            TaskLimits(1000, most, 1000, interval),
            make_task=lambda parts: NumbersTask(parts, rig),
            buffer_records=limit,
            on_failed=rig.failed.append,
        )
        made.append((task_set, rig))
        return task_set, rig

    yield tasks
    for task_set, rig in made:
        rig.gate.set()
        await task_set.stop(60)
    for state in states:
        state.close()


async def reach(log: list[Any], entries: int) -> None:
    """Wait until the log has so many entries, for as long as a busy machine may need."""
    async with asyncio.timeout(60):
        while len(log) < entries:
            await asyncio.sleep(0.005)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_comes_during_a_commit_is_the_next_flush(make: Make) -> None:
    """Flushes grow with load; a record is done only after its flush is committed."""
    tasks, rig = make(gate=False)
    for offset in range(4):
        await tasks.offer(fetched(offset))
        await settle()
    assert rig.log == []
    rig.gate.set()
    await settle()
    assert rig.log == [
        ("commit", (0,)),
        ("done", 0),
        ("commit", (1, 2, 3)),
        ("done", 3),
    ]


async def test_records_that_the_table_reflects_are_dropped(make: Make) -> None:
    """Source records at or below the stored offset are not applied again."""
    tasks, rig = make(applied=5)
    for offset in (4, 5, 6):
        await tasks.offer(fetched(offset))
    await settle()
    assert rig.log == [("commit", (6,)), ("done", 6)]
    assert tasks.skipped == 2


async def test_a_retriable_failure_is_committed_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changelog that is not acknowledged is sent again, and nothing is done before."""
    monkeypatch.setattr("kvatlas.streams.tasks.task._BACKOFF_FIRST_SECONDS", 0.001)
    tasks, rig = make(ChangelogError("away"), ChangelogError("away"))
    await tasks.offer(fetched(0))
    await reach(rig.log, 2)
    assert rig.log == [("commit", (0,)), ("done", 0)]
    assert rig.failed == []


async def test_a_failure_that_is_not_retriable_ends_the_app(make: Make) -> None:
    """The error is handed on, and nothing is done."""
    tasks, rig = make(StoreError("disk"))
    await tasks.offer(fetched(0))
    await settle()
    assert [str(error) for error in rig.failed] == ["disk"]
    assert rig.log == []


async def test_a_stop_commits_what_was_applied_and_drops_the_queue_until_resumed(make: Make) -> None:
    """A rebalance waits for the commits; queued records are read again by whoever owns them next."""
    tasks, rig = make(most=1, gate=False)
    for offset in range(3):
        await tasks.offer(fetched(offset))
        await settle()
    stopping = asyncio.create_task(tasks.stop(60))
    await settle()
    rig.gate.set()
    await stopping
    await tasks.offer(fetched(3))
    await settle()
    assert rig.log == [("commit", (0,)), ("done", 0), ("commit", (1,)), ("done", 1)]
    assert tasks.held == 0
    tasks.resume()
    await tasks.offer(fetched(0, 1, 2))
    await settle()
    assert rig.log[4:] == [("commit", (2,)), ("done", 2)]
    assert rig.state.get(b"%08d" % 2) == b"x"


async def test_a_partition_that_is_not_ours_is_not_written(make: Make) -> None:
    """Records of a partition that is not active here are dropped."""
    tasks, rig = make(applied=None)
    await tasks.offer(fetched(0))
    await settle()
    assert rig.log == []


async def test_the_agent_waits_while_too_much_is_queued(make: Make) -> None:
    """Queues are bounded over all partitions together."""
    tasks, rig = make(limit=2, gate=False)
    await tasks.offer(fetched(0))
    await settle()
    waiting = asyncio.create_task(tasks.offer(fetched(1)))
    await settle()
    assert not waiting.done()
    rig.gate.set()
    await asyncio.wait_for(waiting, 60)


async def test_records_lost_on_their_way_are_read_again(make: Make) -> None:
    """A record beyond the next one is not taken: its partition is read from the next one on, once."""
    tasks, rig = make(applied=9)
    for offset in (10, 14, 15, 16, 11, 12, 13, 14):
        await tasks.offer(fetched(offset))
        await settle()
    assert [entry for entry in rig.log if entry[0] == "commit"] == [("commit", (offset,)) for offset in range(10, 15)]
    assert rig.seeks == [(0, 11)]
    assert tasks.rewinds == 1


async def test_records_that_the_topic_has_lost_are_passed_over_after_two_readings(make: Make) -> None:
    """When reading again begins behind the hole twice, the records are gone: the task goes on and counts them."""
    tasks, rig = make(applied=-1)
    for offset in (50, 51, 50, 51, 50, 51):
        await tasks.offer(fetched(offset))
    await settle()
    assert rig.seeks == [(0, 0), (0, 0)]
    assert rig.log == [("commit", (50, 51)), ("done", 51)]
    assert tasks.missed == 50


async def test_a_task_tells_what_it_waits_for(make: Make) -> None:
    """The next offset when it is idle, nothing while it works or is stopped, or the partition is not ours."""
    tasks, rig = make(applied=4, gate=False)
    assert tasks.waiting(0) == 5
    await tasks.offer(fetched(5))
    await settle()
    assert tasks.waiting(0) is None
    rig.gate.set()
    await settle()
    assert tasks.waiting(0) == 6
    await tasks.stop(60)
    assert tasks.waiting(0) is None
    elsewhere, rig = make(applied=None, gate=False)
    assert elsewhere.waiting(0) is None


async def test_commits_wait_while_the_group_may_have_others_write(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is kept until this worker is sure again that its partitions are its own."""
    monkeypatch.setattr("kvatlas.streams.tasks.task._BACKOFF_FIRST_SECONDS", 0.001)
    tasks, rig = make()
    rig.sure = False
    await tasks.offer(fetched(0))
    await asyncio.sleep(0.02)
    assert rig.log == []
    rig.sure = True
    await reach(rig.log, 2)
    assert rig.log == [("commit", (0,)), ("done", 0)]
    assert rig.failed == []


async def test_records_are_applied_and_sent_while_a_commit_is_under_way(make: Make) -> None:
    """What follows from a record does not wait for the commit of those before it."""
    tasks, rig = make(sends=True, gate=False)
    for offset in range(3):
        await tasks.offer(fetched(offset))
        await settle()
    assert rig.log == [("send", (0,)), ("send", (1,)), ("send", (2,))]
    rig.gate.set()
    await settle()
    assert rig.log[3:] == [("commit", (0,)), ("done", 0), ("commit", (1, 2)), ("done", 2)]


async def test_a_full_task_is_committed_before_more_is_applied(make: Make) -> None:
    """What waits for a commit is bounded: the queue grows behind it."""
    tasks, rig = make(sends=True, most=2, gate=False)
    await tasks.offer(fetched(*range(7)))
    await settle()
    assert rig.log == [("send", (0, 1)), ("send", (2, 3))]
    assert tasks.queued(0) == 3
    rig.gate.set()
    await reach(rig.log, 12)
    assert [entry for entry in rig.log if entry[0] == "commit"] == [
        ("commit", (0, 1)),
        ("commit", (2, 3)),
        ("commit", (4, 5)),
        ("commit", (6,)),
    ]


async def test_commits_keep_their_distance_unless_the_task_is_full(make: Make) -> None:
    """The first commit is at once, the next after the interval or when much was applied; a stop waits for none."""
    tasks, rig = make(interval=3600.0, most=3)
    for offset in range(2):
        await tasks.offer(fetched(offset))
        await settle()
    assert rig.log == [("commit", (0,)), ("done", 0)]
    for offset in range(2, 5):
        await tasks.offer(fetched(offset))
        await settle()
    assert rig.log[2:] == [("commit", (1, 2, 3)), ("done", 3)]
    await tasks.stop(60)
    assert rig.log[4:] == [("commit", (4,)), ("done", 4)]


async def test_what_waits_for_its_time_is_committed_when_that_comes(make: Make) -> None:
    """Nothing that was applied stays uncommitted for want of more."""
    tasks, rig = make(interval=0.02)
    for offset in range(2):
        await tasks.offer(fetched(offset))
        await settle()
    await reach(rig.log, 4)
    assert rig.log == [("commit", (0,)), ("done", 0), ("commit", (1,)), ("done", 1)]
    assert tasks.waiting(0) == 2


async def test_what_could_not_be_sent_is_not_committed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is stopped while Kafka is away leaves the records to the partition's next owner."""
    monkeypatch.setattr("kvatlas.streams.tasks.task._BACKOFF_FIRST_SECONDS", 0.001)
    tasks, rig = make(*[ChangelogError("away")] * 1000, sends=True)
    await tasks.offer(fetched(0))
    await asyncio.sleep(0.02)
    await tasks.stop(60)
    assert rig.log == []
    assert rig.failed == []
    assert tasks.held == 0
    assert rig.state.overlay.values == {}


async def test_a_commit_that_is_not_retriable_ends_the_task_with_records_behind_it(make: Make) -> None:
    """The error of a commit reaches the app also while later records are applied."""
    tasks, rig = make(StoreError("disk"), gate=False)
    for offset in range(3):
        await tasks.offer(fetched(offset))
        await settle()
    rig.gate.set()
    await settle()
    assert [str(error) for error in rig.failed] == ["disk"]
    assert rig.log == []
