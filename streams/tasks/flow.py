"""Flows: one partition of one agent, from source records to a committed flush.

A flow applies what has come as soon as it comes and sends what follows from it; all of it together is committed when
the last commit is done and ``commit_interval_seconds`` old, or when it is much. So what is known is fresh at any load,
and commits, which cost the same for one update as for a thousand, stay few.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.kafka.rights import refusal_in
from kvatlas.streams.errors import UncertainError
from kvatlas.streams.tasks.hole import Hole

logger = logging.getLogger(__name__)

_BACKOFF_FIRST_SECONDS: Final = 0.1
_BACKOFF_MOST_SECONDS: Final = 2.0
#: Commits that Kafka may refuse for want of a right before the flow ends, about 3 s.
_REFUSALS: Final = 6


class Step(Protocol):
    """What follows from records that were applied."""

    async def send(self) -> None:
        """Send it; sending again after a failure is allowed.

        Raises:
            KvatlasError: with ``retriable`` set, it can be tried again.
            KafkaError: it can be tried again.
        """


class Work(Protocol):
    """A flush that waits to be committed."""

    async def commit(self) -> None:
        """Commit it; committing again after a failure is allowed.

        Raises:
            KvatlasError: with ``retriable`` set, it can be tried again.
            KafkaError: it can be tried again.
        """


class Stage(Protocol):
    """What an agent does with the records of one partition; one instance a partition.

    Attributes:
        lock: held for a commit; the sweep takes it too.
    """

    lock: asyncio.Lock

    @property
    def full(self) -> bool:
        """Whether so much was applied since the last cut that it should be committed before more is."""

    async def apply(self, take: Callable[[], Any | None]) -> Step | None:
        """Apply records until ``take`` returns None or the stage is full; None when there was nothing."""

    def cut(self) -> Work:
        """Return what was applied since the last cut, all of which was sent, to be committed."""

    def drop(self) -> None:
        """Forget what was applied and is not committed."""


class Flow:
    """One partition of an agent.

    Args:
        name: for logs.
        stage: applies records.
        on_taken: called with the number of records that are done with.
        on_failed: called with the error that ended the flow.
        may_commit: whether this worker is sure to own the partition.
        on_committed: called with the offset of the last record of each flush.
        commit_interval_seconds: least time between the beginnings of two commits, unless the stage is full.
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
        commit_interval_seconds: float,
    ) -> None:
        self.name = name
        self.last_offset = -1
        self._may_commit = may_commit
        self._on_committed = on_committed
        self._interval = commit_interval_seconds
        self.hole = Hole()
        self._stage = stage
        self._on_taken = on_taken
        self._queue: deque[Any] = deque()
        self._applied = 0
        self._applied_offset = -1
        self._wake = asyncio.Event()
        self._stopping = False
        self._on_failed = on_failed
        self._loop = asyncio.get_running_loop()
        self._due = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._commit: asyncio.Task[bool] | None = None
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
        return not self._queue and not self._applied and self._commit is None

    async def stop(self, grace_seconds: float) -> None:
        """Commit what was applied, drop what is queued (it is read again), and end.

        What is not committed in time is cut off; what of it was written is found again in the changelog.
        """
        self._stopping = True
        self._wake.set()
        _, pending = await asyncio.wait([self._task], timeout=grace_seconds)
        if pending:
            logger.warning("%s: flush not committed within %.1f s, cut off", self.name, grace_seconds)
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1.0)
        self._on_taken(len(self._queue) + self._applied)
        self._queue.clear()
        self._applied = 0

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: flow ended", self.name, exc_info=error)
            self._on_failed(error)

    def _take(self) -> Any | None:
        if not self._queue:
            return None
        record = self._queue.popleft()
        self._applied += 1
        self._applied_offset = record.offset
        return record

    async def _run(self) -> None:
        try:
            while not self._stopping:
                if self._queue and not self._stage.full and not await self._step():
                    return
                if not self._begin_commit() and (not self._queue or self._stage.full):
                    self._wake.clear()
                    await self._wake.wait()
            await self._commit_rest()
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            if self._commit is not None:
                self._commit.cancel()
                await asyncio.gather(self._commit, return_exceptions=True)
            self._stage.drop()

    async def _step(self) -> bool:
        """Apply what is queued and send what follows; False when the flow was stopped before it could be sent."""
        step = await self._stage.apply(self._take)
        return step is None or await self._tried(step.send, "records are not sent")

    def _begin_commit(self) -> bool:
        """Begin to commit what was applied when that is due, or see to it that it is looked at then."""
        if self._commit is not None:
            if not self._commit.done():
                return False
            commit, self._commit = self._commit, None
            commit.result()
        now = self._loop.time()
        if not self._applied:
            return False
        if now < self._due and not self._stage.full:
            if self._alarm is None:
                self._alarm = self._loop.call_at(self._due, self._ring)
            return False
        self._due = now + self._interval
        self._commit = asyncio.create_task(self._commit_cut(), name=f"commit-{self.name}")
        self._commit.add_done_callback(lambda _: self._wake.set())
        return True

    def _ring(self) -> None:
        self._alarm = None
        self._wake.set()

    async def _commit_rest(self) -> None:
        """Commit all that was applied, the flow being stopped."""
        if self._commit is not None:
            commit, self._commit = self._commit, None
            if not await commit:
                return
        if self._applied:
            await self._commit_cut()

    def _commit_cut(self) -> Coroutine[Any, Any, bool]:
        """Cut off what was applied and return what commits it; False of that when the flow was stopped before."""
        work, records, offset = self._stage.cut(), self._applied, self._applied_offset
        self._applied = 0

        async def commit() -> bool:
            async with self._stage.lock:
                done = await self._tried(work.commit, "not committed")
            if done:
                self._on_committed(offset)
            self._on_taken(records)
            return done

        return commit()

    async def _tried(self, attempt: Callable[[], Awaitable[None]], failed: str) -> bool:
        """Try until it succeeds; False when the flow was stopped before that."""
        backoff = _BACKOFF_FIRST_SECONDS
        refusals = 0
        while True:
            try:
                if not self._may_commit():
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
