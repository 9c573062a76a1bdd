"""Flows: one partition of one agent, from source records to a committed flush.

Faust delivers source records one by one; a flow gathers what has come while its last flush was being committed and
applies all of it as the next one. So flushes grow with load and stay small, and fresh, without it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from aiokafka.errors import KafkaError
from mode import get_logger

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.kafka import refusal_in

logger = get_logger(__name__)

_BACKOFF_FIRST_SECONDS: Final = 0.1
_BACKOFF_MOST_SECONDS: Final = 2.0
#: Commits that Kafka may refuse for want of a right before the flow ends, about 3 s.
_REFUSALS: Final = 6


class Work(Protocol):
    """A flush that was applied and waits to be committed; committing again after a failure is allowed."""

    async def commit(self) -> None:
        """Commit it.

        Raises:
            KvatlasError: with ``retriable`` set, it can be tried again.
            KafkaError: it can be tried again.
        """


class Stage(Protocol):
    """What an agent does with the records of one partition; one instance a partition.

    Attributes:
        lock: held from the first read of a flush to its commit; the sweep takes it too.
    """

    lock: asyncio.Lock

    async def apply(self, take: Callable[[], Any | None]) -> Work | None:
        """Apply records until ``take`` returns None or the flush is large enough; None for nothing to commit."""


class Flow:
    """One partition of an agent.

    Args:
        name: for logs.
        stage: applies records.
        on_taken: called with the number of records that left the queue.
        on_failed: called with the error that ended the flow.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        on_taken: Callable[[int], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self.name = name
        self.last_offset = -1
        self._stage = stage
        self._on_taken = on_taken
        self._queue: deque[Any] = deque()
        self._taken: list[Any] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._on_failed = on_failed
        self._task = asyncio.create_task(self._run(), name=f"flow-{name}")
        self._task.add_done_callback(self._ended)

    def offer(self, event: Any) -> None:
        """Queue one source record; its acknowledgement follows the commit of its flush."""
        self.last_offset = event.message.offset
        self._queue.append(event)
        self._wake.set()

    def __len__(self) -> int:
        return len(self._queue)

    async def stop(self, grace_seconds: float) -> None:
        """Finish the flush in progress, drop what is queued (it is read again), and end.

        A flush that does not end in time is cut off; what it wrote is found again in the changelog.
        """
        self._stopping = True
        self._wake.set()
        _, pending = await asyncio.wait([self._task], timeout=grace_seconds)
        if pending:
            logger.warning("%s: flush not committed within %.1f s, cut off", self.name, grace_seconds)
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1.0)
        self._on_taken(len(self._queue))
        self._queue.clear()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: flow ended", self.name, exc_info=error)
            self._on_failed(error)

    def _take(self) -> Any | None:
        if not self._queue:
            return None
        event = self._queue.popleft()
        self._taken.append(event)
        return event

    async def _run(self) -> None:
        while not self._stopping:
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._taken = []
            async with self._stage.lock:
                work = await self._stage.apply(self._take)
                if work is not None and not await self._commit(work):
                    return
            for event in self._taken:
                event.ack()
            self._on_taken(len(self._taken))

    async def _commit(self, work: Work) -> bool:
        """Commit until it succeeds; False when the flow was stopped before that."""
        backoff = _BACKOFF_FIRST_SECONDS
        refusals = 0
        while True:
            try:
                await work.commit()
            except (KvatlasError, KafkaError) as error:
                if isinstance(error, KvatlasError) and not error.retriable:
                    raise
                refusals += refusal_in(error) is not None
                if refusals >= _REFUSALS:
                    raise
                if self._stopping:
                    self._on_taken(len(self._taken))
                    return False
                logger.warning("%s: commit failed, tried again in %.1f s: %s", self.name, backoff, error)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _BACKOFF_MOST_SECONDS)
            else:
                return True


class Flows:
    """All flows of one agent on this worker.

    Args:
        name: the agent's name.
        make_stage: partition -> its stage.
        source_offset: partition -> last source offset that the table reflects, None when it is not ours to write.
        buffer_records: records held in all queues together before the agent waits.
        on_failed: called with the error that ended a flow: the app must not go on without it.
    """

    def __init__(
        self,
        name: str,
        make_stage: Callable[[int], Stage],
        source_offset: Callable[[int], int | None],
        buffer_records: int,
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self.name = name
        self.skipped = 0
        self._paused = False
        self._make_stage = make_stage
        self._source_offset = source_offset
        self._limit = buffer_records
        self._on_failed = on_failed
        self._held = 0
        self._space = asyncio.Event()
        self._space.set()
        self._flows: dict[int, Flow] = {}

    @property
    def held(self) -> int:
        """Return the number of records queued."""
        return self._held

    def queued(self, partition: int) -> int:
        """Return the number of records queued for a partition."""
        flow = self._flows.get(partition)
        return len(flow) if flow else 0

    async def offer(self, event: Any) -> None:
        """Hand a source record to its partition's flow; waits while too many are queued.

        A record at or below the offset that the table already reflects is acknowledged and dropped.
        """
        message = event.message
        if self._paused:
            return
        flow = self._flows.get(message.partition)
        if flow is None:
            applied = self._source_offset(message.partition)
            if applied is None:
                return
            stage = self._make_stage(message.partition)
            flow = Flow(f"{self.name}-{message.partition}", stage, self._on_taken, self._on_failed)
            flow.last_offset = applied
            self._flows[message.partition] = flow
        if message.offset <= flow.last_offset:
            self.skipped += 1
            event.ack()
            return
        self._held += 1
        flow.offer(event)
        if self._held >= self._limit:
            self._space.clear()
            await self._space.wait()

    async def stop(self, grace_seconds: float) -> None:
        """Stop all flows, each after its flush in progress; records are dropped until :meth:`resume`."""
        self._paused = True
        flows, self._flows = list(self._flows.values()), {}
        if flows:
            await asyncio.gather(*(flow.stop(grace_seconds) for flow in flows))
        self._held = 0
        self._space.set()

    def resume(self) -> None:
        """Take records again."""
        self._paused = False

    def _on_taken(self, records: int) -> None:
        self._held -= records
        if self._held <= self._limit // 2:
            self._space.set()
