"""Tests of the flows: gather, apply, commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kvatlas.streams.errors import ChangelogError, StoreError
from kvatlas.streams.flow import Flows


def fetched(*offsets: int, partition: int = 0) -> dict[int, list[Any]]:
    return {partition: [SimpleNamespace(offset=offset, partition=partition) for offset in offsets]}


class FakeStage:
    """Takes everything, commits when the gate is open, fails as told."""

    def __init__(self, log: list[Any], gate: asyncio.Event, failures: list[Exception]) -> None:
        self.lock = asyncio.Lock()
        self._log, self._gate, self._failures = log, gate, failures

    async def apply(self, take: Callable[[], Any | None]) -> Any:
        offsets = []
        while (record := take()) is not None:
            offsets.append(record.offset)
        log, gate, failures = self._log, self._gate, self._failures

        class Work:
            async def commit(self) -> None:
                await gate.wait()
                if failures:
                    raise failures.pop()
                log.append(("commit", tuple(offsets)))

        return Work()


def flows_of(
    log: list[Any],
    gate: asyncio.Event,
    *failures: Exception,
    applied: int | None = -1,
    limit: int = 100,
    seeks: list[Any] | None = None,
    sure: asyncio.Event | None = None,
) -> tuple[Flows, list[BaseException]]:
    failed: list[BaseException] = []
    pending = list(failures)
    asked = [] if seeks is None else seeks
    flows = Flows(
        "t",
        lambda _: FakeStage(log, gate, pending),
        lambda _: applied,
        limit,
        failed.append,
        may_commit=lambda: sure is None or sure.is_set(),
        rewind=lambda partition, offset: asked.append((partition, offset)),
        pass_hole=lambda partition, offset: asked.append(("hole", partition, offset)),
        on_committed=lambda _, offset: log.append(("done", offset)),
    )
    return flows, failed


async def reach(log: list[Any], entries: int) -> None:
    """Wait until the log has so many entries, for as long as a busy machine may need."""
    for _ in range(1000):
        if len(log) >= entries:
            return
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
    await flows.stop(1.0)


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
    await flows.stop(1.0)


async def test_a_retriable_failure_is_committed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changelog that is not acknowledged is sent again, and nothing is done before."""
    monkeypatch.setattr("kvatlas.streams.flow._BACKOFF_FIRST_SECONDS", 0.001)
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, failed = flows_of(log, gate, ChangelogError("away"), ChangelogError("away"))
    await flows.offer(fetched(0))
    await asyncio.sleep(0.05)
    assert log == [("commit", (0,)), ("done", 0)]
    assert failed == []
    await flows.stop(1.0)


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
    await flows.stop(1.0)


async def test_a_stop_finishes_the_flush_and_drops_the_queue_until_resumed() -> None:
    """A rebalance waits for the flush in progress; queued records are read again by whoever owns them next."""
    log: list[Any] = []
    gate = asyncio.Event()
    flows, _ = flows_of(log, gate)
    await flows.offer(fetched(0))
    await settle()
    await flows.offer(fetched(1))
    stopping = asyncio.create_task(flows.stop(5.0))
    await settle()
    gate.set()
    await stopping
    await flows.offer(fetched(2))
    await settle()
    assert log == [("commit", (0,)), ("done", 0)]
    assert flows.held == 0
    flows.resume()
    for offset in range(2):
        await flows.offer(fetched(offset))
    await settle()
    assert log[2:] == [("commit", (0, 1)), ("done", 1)]
    await flows.stop(1.0)


async def test_a_partition_that_is_not_ours_is_not_written() -> None:
    """Records of a partition that is not active here are dropped."""
    log: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    flows, _ = flows_of(log, gate, applied=None)
    await flows.offer(fetched(0))
    await settle()
    assert log == []
    await flows.stop(1.0)


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
    await asyncio.wait_for(waiting, 1.0)
    await flows.stop(1.0)


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
    await flows.stop(1.0)


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
    await flows.stop(1.0)


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
    await flows.stop(1.0)
    assert flows.waiting(0) is None
    elsewhere, _ = flows_of(log, gate, applied=None)
    assert elsewhere.waiting(0) is None


async def test_commits_wait_while_the_group_may_have_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is kept until this worker is sure again that its partitions are its own."""
    monkeypatch.setattr("kvatlas.streams.flow._BACKOFF_FIRST_SECONDS", 0.001)
    log: list[Any] = []
    gate, sure = asyncio.Event(), asyncio.Event()
    gate.set()
    flows, failed = flows_of(log, gate, sure=sure)
    await flows.offer(fetched(0))
    await asyncio.sleep(0.02)
    assert log == []
    sure.set()
    await asyncio.sleep(0.05)
    assert log == [("commit", (0,)), ("done", 0)]
    assert failed == []
    await flows.stop(1.0)
