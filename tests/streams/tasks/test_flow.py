"""Tests of the flows: gather, apply, commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvatlas.streams.errors import ChangelogError, StoreError
from kvatlas.streams.tasks.flows import Flows


def fetched(*offsets: int, partition: int = 0) -> dict[int, list[Any]]:
    return {partition: [SimpleNamespace(offset=offset, partition=partition) for offset in offsets]}


class FakeStage:
    """Takes everything, sends at once, commits when the gate is open, fails as told; full after ``most`` records."""

    def __init__(self, log: list[Any], gate: asyncio.Event, failures: list[Exception], most: int, sends: bool) -> None:
        self.lock = asyncio.Lock()
        self._log, self._gate, self._failures, self._most = log, gate, failures, most
        self._sends = sends
        self._offsets: list[int] = []

    @property
    def full(self) -> bool:
        return len(self._offsets) >= self._most

    async def apply(self, take: Callable[[], Any | None]) -> Any:
        taken = []
        while not self.full and (record := take()) is not None:
            taken.append(record.offset)
            self._offsets.append(record.offset)
        log, failures = self._log, self._failures

        class Step:
            async def send(self) -> None:
                if failures:
                    raise failures.pop()
                log.append(("send", tuple(taken)))

        return Step() if self._sends else None

    def cut(self) -> Any:
        offsets, self._offsets = self._offsets, []
        log, gate, failures = self._log, self._gate, self._failures

        class Work:
            async def commit(self) -> None:
                await gate.wait()
                if failures:
                    raise failures.pop()
                log.append(("commit", tuple(offsets)))

        return Work()

    def drop(self) -> None:
        self._offsets.clear()


def flows_of(
    log: list[Any],
    gate: asyncio.Event,
    *failures: Exception,
    applied: int | None = -1,
    limit: int = 100,
    seeks: list[Any] | None = None,
    sure: asyncio.Event | None = None,
    most: int = 1000,
    sends: bool = False,
    interval: float = 0.0,
) -> tuple[Flows, list[BaseException]]:
    failed: list[BaseException] = []
    pending = list(failures)
    asked = [] if seeks is None else seeks
    flows = Flows(
        "t",
        lambda _: FakeStage(log, gate, pending, most, sends),
        lambda _: applied,
        limit,
        failed.append,
        may_commit=lambda: sure is None or sure.is_set(),
        rewind=lambda partition, offset: asked.append((partition, offset)),
        pass_hole=lambda partition, offset: asked.append(("hole", partition, offset)),
        on_committed=lambda _, offset: log.append(("done", offset)),
        commit_interval_seconds=interval,
    )
    return flows, failed


async def reach(log: list[Any], entries: int) -> None:
    """Wait until the log has so many entries, for as long as a busy machine may need."""
    async with asyncio.timeout(60):
        while len(log) < entries:
            await asyncio.sleep(0.005)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_comes_during_a_commit_is_the_next_flush() -> None:
    """Flushes grow with load; a record is done only after its flush is committed."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, _ = flows_of(log, gate)
    for offset in range(4):
        await flows.offer(fetched(offset))
        await settle()
    assert log == []
    gate.set()
    await settle()
    assert log == [
        ("commit", (0,)),
        ("done", 0),
        ("commit", (1, 2, 3)),
        ("done", 3),
    ]
    await flows.stop(60)


async def test_records_that_the_table_reflects_are_dropped() -> None:
    """Source records at or below the stored offset are not applied again."""
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, _ = flows_of(log, gate, applied=5)
    for offset in (4, 5, 6):
        await flows.offer(fetched(offset))
    await settle()
    assert log == [("commit", (6,)), ("done", 6)]
    assert flows.skipped == 2
    await flows.stop(60)


async def test_a_retriable_failure_is_committed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changelog that is not acknowledged is sent again, and nothing is done before."""
    monkeypatch.setattr("kvatlas.streams.tasks.flow._BACKOFF_FIRST_SECONDS", 0.001)
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, failed = flows_of(log, gate, ChangelogError("away"), ChangelogError("away"))
    await flows.offer(fetched(0))
    await reach(log, 2)
    assert log == [("commit", (0,)), ("done", 0)]
    assert failed == []
    await flows.stop(60)


async def test_a_failure_that_is_not_retriable_ends_the_app() -> None:
    """The error is handed on, and nothing is done."""
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, failed = flows_of(log, gate, StoreError("disk"))
    await flows.offer(fetched(0))
    await settle()
    assert [str(error) for error in failed] == ["disk"]
    assert log == []
    await flows.stop(60)


async def test_a_stop_commits_what_was_applied_and_drops_the_queue_until_resumed() -> None:
    """A rebalance waits for the commits; queued records are read again by whoever owns them next."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, _ = flows_of(log, gate, most=1)
    for offset in range(3):
        await flows.offer(fetched(offset))
        await settle()
    stopping = asyncio.create_task(flows.stop(60))
    await settle()
    gate.set()
    await stopping
    await flows.offer(fetched(3))
    await settle()
    assert log == [("commit", (0,)), ("done", 0), ("commit", (1,)), ("done", 1)]
    assert flows.held == 0
    flows.resume()
    await flows.offer(fetched(0))
    await settle()
    assert log[4:] == [("commit", (0,)), ("done", 0)]
    await flows.stop(60)


async def test_a_partition_that_is_not_ours_is_not_written() -> None:
    """Records of a partition that is not active here are dropped."""
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, _ = flows_of(log, gate, applied=None)
    await flows.offer(fetched(0))
    await settle()
    assert log == []
    await flows.stop(60)


async def test_the_agent_waits_while_too_much_is_queued() -> None:
    """Queues are bounded over all partitions together."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, _ = flows_of(log, gate, limit=2)
    await flows.offer(fetched(0))
    await settle()
    waiting = asyncio.create_task(flows.offer(fetched(1)))
    await settle()
    assert not waiting.done()
    gate.set()
    await asyncio.wait_for(waiting, 60)
    await flows.stop(60)


async def test_records_lost_on_their_way_are_read_again() -> None:
    """A record beyond the next one is not taken: its partition is read from the next one on, once."""
    log: list[Any] = []
    seeks: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, _ = flows_of(log, gate, applied=9, seeks=seeks)
    for offset in (10, 14, 15, 16, 11, 12, 13, 14):
        await flows.offer(fetched(offset))
        await settle()
    assert [entry for entry in log if entry[0] == "commit"] == [("commit", (offset,)) for offset in range(10, 15)]
    assert seeks == [(0, 11)]
    assert flows.rewinds == 1
    await flows.stop(60)


async def test_records_that_the_topic_has_lost_are_passed_over_after_two_readings() -> None:
    """When reading again begins behind the hole twice, the records are gone: the flow goes on and counts them."""
    log: list[Any] = []
    seeks: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, _ = flows_of(log, gate, applied=-1, seeks=seeks)
    for offset in (50, 51, 50, 51, 50, 51):
        await flows.offer(fetched(offset))
    await settle()
    assert seeks == [(0, 0), (0, 0), ("hole", 0, 50)]
    assert log == [("commit", (50, 51)), ("done", 51)]
    assert flows.missed == 50
    await flows.stop(60)


async def test_a_flow_tells_what_it_waits_for() -> None:
    """The next offset when it is idle, nothing while it works or is stopped, or the partition is not ours."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, _ = flows_of(log, gate, applied=4)
    assert flows.waiting(0) == 5
    await flows.offer(fetched(5))
    await settle()
    assert flows.waiting(0) is None
    gate.set()
    await settle()
    assert flows.waiting(0) == 6
    await flows.stop(60)
    assert flows.waiting(0) is None
    elsewhere, _ = flows_of(log, gate, applied=None)
    assert elsewhere.waiting(0) is None


async def test_commits_wait_while_the_group_may_have_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is kept until this worker is sure again that its partitions are its own."""
    monkeypatch.setattr("kvatlas.streams.tasks.flow._BACKOFF_FIRST_SECONDS", 0.001)
    log: list[Any] = []
    gate, sure = asyncio.Event(), asyncio.Event()
    gate.set()
    flows, failed = flows_of(log, gate, sure=sure)
    await flows.offer(fetched(0))
    await asyncio.sleep(0.02)
    assert log == []
    sure.set()
    await reach(log, 2)
    assert log == [("commit", (0,)), ("done", 0)]
    assert failed == []
    await flows.stop(60)


async def test_records_are_applied_and_sent_while_a_commit_is_under_way() -> None:
    """What follows from a record does not wait for the commit of those before it."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, _ = flows_of(log, gate, sends=True)
    for offset in range(3):
        await flows.offer(fetched(offset))
        await settle()
    assert log == [("send", (0,)), ("send", (1,)), ("send", (2,))]
    gate.set()
    await settle()
    assert log[3:] == [("commit", (0,)), ("done", 0), ("commit", (1, 2)), ("done", 2)]
    await flows.stop(60)


async def test_a_full_stage_is_committed_before_more_is_applied() -> None:
    """What waits for a commit is bounded: the queue grows behind it."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, _ = flows_of(log, gate, sends=True, most=2)
    await flows.offer(fetched(*range(7)))
    await settle()
    assert log == [("send", (0, 1)), ("send", (2, 3))]
    assert flows.queued(0) == 3
    gate.set()
    await reach(log, 12)
    assert [entry for entry in log if entry[0] == "commit"] == [
        ("commit", (0, 1)),
        ("commit", (2, 3)),
        ("commit", (4, 5)),
        ("commit", (6,)),
    ]
    await flows.stop(60)


async def test_commits_keep_their_distance_unless_the_stage_is_full() -> None:
    """The first commit is at once, the next after the interval or when much was applied; a stop waits for none."""
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, _ = flows_of(log, gate, interval=3600.0, most=3)
    for offset in range(2):
        await flows.offer(fetched(offset))
        await settle()
    assert log == [("commit", (0,)), ("done", 0)]
    for offset in range(2, 5):
        await flows.offer(fetched(offset))
        await settle()
    assert log[2:] == [("commit", (1, 2, 3)), ("done", 3)]
    await flows.stop(60)
    assert log[4:] == [("commit", (4,)), ("done", 4)]


async def test_what_waits_for_its_time_is_committed_when_that_comes() -> None:
    """Nothing that was applied stays uncommitted for want of more."""
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, _ = flows_of(log, gate, interval=0.02)
    for offset in range(2):
        await flows.offer(fetched(offset))
        await settle()
    await reach(log, 4)
    assert log == [("commit", (0,)), ("done", 0), ("commit", (1,)), ("done", 1)]
    assert flows.waiting(0) == 2
    await flows.stop(60)


async def test_what_could_not_be_sent_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that is stopped while Kafka is away leaves the records to the partition's next owner."""
    monkeypatch.setattr("kvatlas.streams.tasks.flow._BACKOFF_FIRST_SECONDS", 0.001)
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, failed = flows_of(log, gate, *[ChangelogError("away")] * 1000, sends=True)
    await flows.offer(fetched(0))
    await asyncio.sleep(0.02)
    await flows.stop(60)
    assert log == []
    assert failed == []
    assert flows.held == 0


async def test_a_commit_that_is_not_retriable_ends_the_flow_with_records_behind_it() -> None:
    """The error of a commit reaches the app also while later records are applied."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, failed = flows_of(log, gate, StoreError("disk"))
    for offset in range(3):
        await flows.offer(fetched(offset))
        await settle()
    gate.set()
    await settle()
    assert [str(error) for error in failed] == ["disk"]
    assert log == []
    await flows.stop(60)
