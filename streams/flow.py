"""Flows: one partition of one agent, from source records to a committed flush.

Faust delivers source records one by one; a flow gathers what has come while its last flush was being committed and
applies all of it as the next one. So flushes grow with load and stay small, and fresh, without it.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

from aiokafka.errors import KafkaError
from mode import get_logger

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.kafka import refusal_in
from kvatlas.streams import metrics
from kvatlas.streams.errors import UncertainError

logger = get_logger(__name__)

_BACKOFF_FIRST_SECONDS: Final = 0.1
_BACKOFF_MOST_SECONDS: Final = 2.0
_READINGS: Final = 2
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


class Verdict(enum.Enum):
    """What to do with a record that does not follow the last one."""

    DROP = "drop"
    READ_AGAIN = "read again"
    ACCEPT = "accept"


class Hole:
    """Judges whether records that are missing were lost on their way, or are not in the topic.

    Records of one reading come with rising offsets; one that is not above the last begins another reading. When two
    readings that began where the hole begins have nothing there, retention took the records.
    """

    def __init__(self) -> None:
        self._after = -2
        self._seen = self._first = -1
        self._readings = 0

    def judge(self, last: int, offset: int) -> Verdict:
        """Judge a record.

        Args:
            last: offset of the last record that was taken.
            offset: offset of the one that came, beyond the next.
        """
        if last != self._after:
            self._after, self._seen, self._first, self._readings = last, offset, offset, 0
            return Verdict.READ_AGAIN
        same_reading, self._seen = offset > self._seen, offset
        if same_reading:
            return Verdict.DROP
        self._readings = self._readings + 1 if offset == self._first else 0
        self._first = offset
        return Verdict.ACCEPT if self._readings >= _READINGS else Verdict.READ_AGAIN


class Flow:
    """One partition of an agent.

    Args:
        name: for logs.
        stage: applies records.
        on_taken: called with the number of records that left the queue.
        on_failed: called with the error that ended the flow.
        may_commit: whether this worker is sure to own the partition.
        on_committed: called with the offset of the last record of each flush.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        on_taken: Callable[[int], None],
        on_failed: Callable[[BaseException], None],
        *,
        may_commit: Callable[[], bool],
        on_committed: Callable[[int], None],
    ) -> None:
        self.name = name
        self.last_offset = -1
        self._may_commit = may_commit
        self._on_committed = on_committed
        self.hole = Hole()
        self._stage = stage
        self._on_taken = on_taken
        self._queue: deque[Any] = deque()
        self._taken: list[Any] = []
        self._wake = asyncio.Event()
        self._stopping = False
        self._on_failed = on_failed
        self._task = asyncio.create_task(self._run(), name=f"flow-{name}")
        self._task.add_done_callback(self._ended)

    def offer(self, record: Any) -> None:
        """Queue one source record."""
        self.last_offset = record.offset
        self._queue.append(record)
        self._wake.set()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Return whether everything that came is committed."""
        return not self._queue and not self._taken

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
        record = self._queue.popleft()
        self._taken.append(record)
        return record

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
            taken, self._taken = self._taken, []
            if taken:
                self._on_committed(taken[-1].offset)
            self._on_taken(len(taken))

    async def _commit(self, work: Work) -> bool:
        """Commit until it succeeds; False when the flow was stopped before that."""
        backoff = _BACKOFF_FIRST_SECONDS
        refusals = 0
        while True:
            try:
                if not self._may_commit():
                    raise UncertainError("the group has not answered for a session; it may have others write this")
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
        may_commit: whether this worker is sure to own its partitions; commits wait while it is not.
        rewind: has a partition read again from an offset.
        pass_hole: told of a partition and the offset before which the topic has lost records.
        on_committed: told of a partition and the offset of the last record that was committed.

    Attributes:
        skipped: records that came again after they were applied.
        rewinds: times that records were lost on their way here and read again.
        missed: records that the topic does not have any more, though they were not applied.
    """

    def __init__(
        self,
        name: str,
        make_stage: Callable[[int], Stage],
        source_offset: Callable[[int], int | None],
        buffer_records: int,
        on_failed: Callable[[BaseException], None],
        *,
        may_commit: Callable[[], bool],
        rewind: Callable[[int, int], None],
        pass_hole: Callable[[int, int], None],
        on_committed: Callable[[int, int], None],
    ) -> None:
        self.name = name
        self.skipped = 0
        self.rewinds = 0
        self.missed = 0
        self._may_commit = may_commit
        self._rewind = rewind
        self._pass_hole = pass_hole
        self._on_committed = on_committed
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

    def waiting(self, partition: int) -> int | None:
        """Return the offset that a partition waits for; None when it has work, or is not ours to write."""
        if self._paused or not self._space.is_set():
            return None
        flow = self._flows.get(partition)
        if flow is not None:
            return flow.last_offset + 1 if flow.idle else None
        applied = self._source_offset(partition)
        return None if applied is None else applied + 1

    async def offer(self, fetched: Mapping[int, Sequence[Any]]) -> None:
        """Hand records to their partitions' flows; waits while too many are queued.

        A record at or below the offset that the table already reflects is dropped. One that does not follow the last
        is not taken: what lies between was lost on its way, and is read again. Records that come between a
        revocation and the next restore are dropped: the restore ends with a seek to the tables' offsets.

        Args:
            fetched: partition -> records in order of their offsets.
        """
        if self._paused:
            return
        for partition, records in fetched.items():
            flow = self._flow(partition)
            if flow is None:
                continue
            for record in records:
                if record.offset <= flow.last_offset:
                    self.skipped += 1
                elif record.offset == flow.last_offset + 1 or self._passes(flow, partition, record.offset):
                    self._held += 1
                    flow.offer(record)
        if self._held >= self._limit:
            self._space.clear()
            await self._space.wait()

    def _flow(self, partition: int) -> Flow | None:
        """Return a partition's flow; None when it is not ours to write."""
        flow = self._flows.get(partition)
        if flow is not None:
            return flow
        applied = self._source_offset(partition)
        if applied is None:
            return None
        flow = Flow(
            f"{self.name}-{partition}",
            self._make_stage(partition),
            self._on_taken,
            self._on_failed,
            may_commit=self._may_commit,
            on_committed=partial(self._on_committed, partition),
        )
        flow.last_offset = applied
        self._flows[partition] = flow
        return flow

    def _passes(self, flow: Flow, partition: int, offset: int) -> bool:
        """Return whether a record that does not follow the last may be taken all the same."""
        verdict = flow.hole.judge(flow.last_offset, offset)
        wanted = flow.last_offset + 1
        if verdict is Verdict.READ_AGAIN:
            self.rewinds += 1
            metrics.REWINDS.labels(self.name).inc()
            logger.info("%s: record %d came where %d was expected; read again from there", flow.name, offset, wanted)
            self._rewind(partition, wanted)
        elif verdict is Verdict.ACCEPT:
            self.missed += offset - wanted
            metrics.MISSED.labels(self.name).inc(offset - wanted)
            logger.warning(
                "%s: records %d to %d are not in the topic any more: retention took them before they were applied",
                flow.name,
                wanted,
                offset - 1,
            )
            self._pass_hole(partition, offset)
        return verdict is Verdict.ACCEPT

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
