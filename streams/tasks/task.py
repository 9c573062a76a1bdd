"""Partition task: one partition of one agent, from source records to a commit.

A task applies what has come as soon as it comes and sends what follows from it; all of it together is committed when
the last commit is done and ``commit_interval_seconds`` old, or when it is much. So what is known is fresh at any load,
and commits, which cost the same for one update as for a thousand, stay few. The life of a record::

    offer -> queue -> apply (to the overlay) -> send -> cut -> commit (changelog, then database) -> source.committed

The order of the steps is written down in :mod:`kvatlas.streams.faust_app.table`.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.kafka.rights import refusal_in
from kvatlas.streams import metrics
from kvatlas.streams.errors import UncertainError
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import PartitionState

logger = logging.getLogger(__name__)

_BACKOFF_FIRST_SECONDS: Final = 0.1
_BACKOFF_MOST_SECONDS: Final = 2.0
#: Commits that Kafka may refuse for want of a right before the task ends, about 3 s.
_REFUSALS: Final = 6


class SourcedTable(Protocol):
    """A table, and the agent's source topic that it reflects; by number of the partition, which both share."""

    @property
    def sure(self) -> bool:
        """Whether the group surely counts this worker in: what is ours to write may be written."""

    def partition(self, number: int) -> PartitionState | None:
        """Return the table's partition, None when it is not ours to write."""

    def rewind(self, number: int, offset: int) -> None:
        """Have the source partition read again from an offset."""

    async def commit(self, state: PartitionState, changes: ChangeSet) -> None:
        """Commit changes of a partition, steps 4 and 5; committing again after a failure is allowed.

        Raises:
            KvatlasError: with ``retriable`` set, it can be tried again.
            KafkaError: it can be tried again.
        """

    def committed(self, number: int, offset: int) -> None:
        """Take note that the table reflects the source partition up to a record, and has it durably."""


class TaskLimits(NamedTuple):
    """When a task commits, and when it gives way.

    Attributes:
        records: source records after which no more are applied before a commit.
        updates: the same in block updates.
        slice_updates: updates that are applied before the event loop is given to others.
        commit_interval_seconds: least time between the beginnings of two commits, unless one of the bounds is reached.
    """

    records: int
    updates: int
    slice_updates: int
    commit_interval_seconds: float


class TaskParts(NamedTuple):
    """What every task works with.

    Attributes:
        partition: the table's partition.
        table: the partition's, with the topic where the records come from.
        limits: when to commit and to give way.
        on_taken: told the number of records that are done with.
    """

    partition: PartitionState
    table: SourcedTable
    limits: TaskLimits
    on_taken: Callable[[int], None]


class _Flush(NamedTuple):
    """What is committed together, and what metrics are told of it."""

    changes: ChangeSet
    records: int
    updates: int
    since: float
    counts: Mapping[str, int]


class PartitionTask(abc.ABC):
    """One partition of an agent; subclasses say what applying and sending is.

    Attributes:
        agent: name of the agent, for logs and metrics.
        partition: the table's partition.
        overlay: of the partition, to apply to.
        last_offset: last source record that was queued, or that the partition reflected at first.
    """

    agent: ClassVar[str]

    def __init__(self, parts: TaskParts) -> None:
        self.partition, self._table, self._limits, self._on_taken = parts
        self.overlay = self.partition.overlay
        self.last_offset = self.partition.meta.source_offset
        self._queue: deque[Any] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        # What was applied since the last cut.
        self._records = self._size = self._updates = 0
        self._since, self._slice = 0.0, 0
        self._counts: Counter[str] = Counter()
        # Commits.
        self._due = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._commit: asyncio.Task[bool] | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """Name for logs."""
        return f"{self.agent}-{self.partition.partition}"

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Return whether everything that came is committed."""
        return not self._queue and not self._records and not self.unfinished and self._commit is None

    @property
    def unfinished(self) -> bool:
        """Return whether a record was begun, and is to be gone on with although no other has come."""
        return False

    @property
    def full(self) -> bool:
        """Return whether so much was applied since the last cut that it is committed before more is applied."""
        return self._records >= self._limits.records or self._size >= self._limits.updates

    def offer(self, record: Any) -> None:
        """Queue one source record."""
        self.last_offset = record.offset
        self._queue.append(record)
        self._wake.set()

    def start(self) -> asyncio.Task[None]:
        """Begin to work; returns what ends with an error when the app must not go on without this task."""
        self._running = asyncio.create_task(self._run(), name=f"task-{self.name}")
        return self._running

    async def stop(self, grace_seconds: float) -> None:
        """Commit what was applied, drop what is queued (it is read again), and end.

        What is not committed in time is cut off; what of it was written is found again in the changelog.
        """
        self._stopping = True
        self._wake.set()
        if self._running is not None:
            _, pending = await asyncio.wait([self._running], timeout=grace_seconds)
            if pending:
                logger.warning("%s: flush not committed within %.1f s, cut off", self.name, grace_seconds)
                self._running.cancel()
                await asyncio.wait([self._running], timeout=1.0)
        self._on_taken(len(self._queue) + self._records)
        self._queue.clear()
        self._records = 0

    # --- what an agent does -----------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def apply(self, records: Iterator[Any]) -> bool:
        """Apply records to the overlay; ``records`` ends when no more may be applied before a commit.

        A record that is put off (:meth:`put_off`) is applied by a later call; until then the offset of
        :meth:`advance` stays before it. Calls :meth:`took` for every record, :meth:`give_way` now and then, and
        :meth:`advance` at the end.

        Returns:
            Whether :meth:`send` has something to send.
        """

    @abc.abstractmethod
    async def send(self) -> None:
        """Send what follows from the records applied last; sending again after a failure is allowed.

        Raises:
            KvatlasError: with ``retriable`` set, it can be tried again.
            KafkaError: it can be tried again.
        """

    def put_off(self) -> None:
        """Take note that the record taken last is not applied yet."""
        self._records -= 1

    def caught_up(self) -> None:
        """Take note that a record that was put off is applied."""
        self._records += 1

    def took(self, updates: int) -> None:
        """Count updates towards a full flush."""
        self._size += updates

    async def give_way(self, updates: int) -> None:
        """Give the event loop to lookups and other partitions when a slice of updates was applied.

        Args:
            updates: those applied since the last call.
        """
        self._slice += updates
        if self._slice >= self._limits.slice_updates:
            self._slice = 0
            await asyncio.sleep(0)

    def advance(self, source_offset: int, receive_ns: int, *, updates: int, counts: Mapping[str, int]) -> None:
        """Take note of what the overlay reflects now; readers are told of it from here on.

        Args:
            source_offset: last source record applied.
            receive_ns: newest receive time among the records applied, bridge clock.
            updates: block updates that they brought, for metrics.
            counts: what applying met, for metrics.
        """
        if not self._since:
            self._since = time.monotonic()
        self._updates += updates
        self._counts.update(counts)
        self.overlay.advance(source_offset, receive_ns)

    def _taken(self) -> Iterator[Any]:
        """Yield queued records until no more may be applied before a commit."""
        taken = 0
        try:
            while self._queue and not self.full:
                self._records += 1
                taken += 1
                yield self._queue.popleft()
        finally:
            metrics.SOURCE_RECORDS.labels(self.agent).inc(taken)

    async def _run(self) -> None:
        try:
            while not self._stopping:
                if (self._queue or self.unfinished) and not self.full and not await self._apply():
                    return
                if not self._begin_commit() and (not (self._queue or self.unfinished) or self.full):
                    self._wake.clear()
                    await self._wake.wait()
            await self._commit_rest()
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            if self._commit is not None:
                self._commit.cancel()
                await asyncio.gather(self._commit, return_exceptions=True)
            self.overlay.drop()

    async def _apply(self) -> bool:
        """Apply what is queued and send what follows; False when the task was stopped before it could be sent."""
        return not await self.apply(self._taken()) or await self._tried(self.send, "records are not sent")

    # --- commits ----------------------------------------------------------------------------------------------------

    def _begin_commit(self) -> bool:
        """Begin to commit what was applied when that is due, or see to it that it is looked at then."""
        if self._commit is not None:
            if not self._commit.done():
                return False
            commit, self._commit = self._commit, None
            commit.result()
        now = self._loop.time()
        if not self._records:
            return False
        if now < self._due and not self.full:
            if self._alarm is None:
                self._alarm = self._loop.call_at(self._due, self._ring)
            return False
        self._due = now + self._limits.commit_interval_seconds
        self._commit = asyncio.create_task(self._committed(self._cut()), name=f"commit-{self.name}")
        self._commit.add_done_callback(lambda _: self._wake.set())
        return True

    def _ring(self) -> None:
        self._alarm = None
        self._wake.set()

    async def _commit_rest(self) -> None:
        """Commit all that was applied, the task being stopped."""
        if self._commit is not None:
            commit, self._commit = self._commit, None
            if not await commit:
                return
        if self._records:
            await self._committed(self._cut())

    def _cut(self) -> _Flush:
        flush = _Flush(self.overlay.cut(), self._records, self._updates, self._since, self._counts)
        self._records = self._size = self._updates = 0
        self._since, self._counts = 0.0, Counter()
        return flush

    async def _committed(self, flush: _Flush) -> bool:
        """Commit what was cut off; False when the task was stopped before that was possible."""
        async with self.partition.lock:
            done = await self._tried(partial(self._table.commit, self.partition, flush.changes), "not committed")
        if done:
            metrics.flushed(self.agent, flush.updates, flush.since, flush.counts)
            self._table.committed(self.partition.partition, flush.changes.source_offset)
        self._on_taken(flush.records)
        return done

    async def _tried(self, attempt: Callable[[], Awaitable[None]], failed: str) -> bool:
        """Try until it succeeds; False when the task was stopped before that."""
        backoff = _BACKOFF_FIRST_SECONDS
        refusals = 0
        while True:
            try:
                if not self._table.sure:
                    raise UncertainError("the group has not answered for a session; it may have others write this")
                await attempt()
            except (KvatlasError, KafkaError) as error:
                if isinstance(error, KvatlasError) and not error.retriable:
                    raise
                refusals += refusal_in(error) is not None
                if refusals >= _REFUSALS:
                    raise
                if self._stopping:
                    return False
                logger.warning("%s: %s, tried again in %.1f s: %s", self.name, failed, backoff, error)
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _BACKOFF_MOST_SECONDS)
            else:
                return True
