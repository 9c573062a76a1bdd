"""Task set: all tasks of one agent on this worker.

Records go to their partitions' tasks, each once and in order, and no more than may wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvatlas.streams import metrics
from kvatlas.streams.tasks.offset_gap import OffsetGap, Verdict
from kvatlas.streams.tasks.task import PartitionTask, SourcedTable, TaskLimits, TaskParts

logger = logging.getLogger(__name__)


class TaskSet:
    """All tasks of one agent on this worker.

    Args:
        name: the agent's name.
        table: what it writes, with its source topic.
        limits: when tasks commit and give way.
        make_task: makes a partition's task.
        buffer_records: records of all partitions that may wait to be committed before the agent waits for them.
        on_failed: called with the error that ended a task: the app must not go on without it.

    Attributes:
        skipped: records that came again after they were applied.
        rewinds: times that records were lost on their way here and read again.
        missed: records that the topic does not have any more, though they were not applied.
    """

    def __init__(
        self,
        name: str,
        table: SourcedTable,
        limits: TaskLimits,
        *,
        make_task: Callable[[TaskParts], PartitionTask],
        buffer_records: int = 4_096,
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self.name = name
        self.skipped = 0
        self.rewinds = 0
        self.missed = 0
        self._table, self._limits = table, limits
        self._make_task = make_task
        self._bound = buffer_records
        self._on_failed = on_failed
        self._paused = False
        self._held = 0
        self._space = asyncio.Event()
        self._space.set()
        self._tasks: dict[int, PartitionTask] = {}
        self._gaps: dict[int, OffsetGap] = {}

    @property
    def held(self) -> int:
        """Return the number of records that came and are not committed."""
        return self._held

    def queued(self, partition: int) -> int:
        """Return the number of records queued for a partition."""
        task = self._tasks.get(partition)
        return len(task) if task else 0

    def waiting(self, partition: int) -> int | None:
        """Return the offset that a partition waits for; None when it has work, or is not ours to write."""
        if self._paused or not self._space.is_set():
            return None
        task = self._tasks.get(partition)
        if task is not None:
            return task.last_offset + 1 if task.idle else None
        state = self._table.partition(partition)
        return None if state is None else state.meta.source_offset + 1

    async def offer(self, fetched: Mapping[int, Sequence[Any]]) -> None:
        """Hand records to their partitions' tasks; waits while too many are queued.

        A record at or below the offset that the table already reflects is dropped. One that does not follow the last
        is not taken: what lies between was lost on its way, and is read again. Records that come between a
        revocation and the next restore are dropped: the restore ends with a seek to the tables' offsets.

        Args:
            fetched: partition -> records in order of their offsets.
        """
        if self._paused:
            return
        for partition, records in fetched.items():
            task = self._task(partition)
            if task is None:
                continue
            for record in records:
                if record.offset <= task.last_offset:
                    self.skipped += 1
                elif record.offset == task.last_offset + 1 or self._passes(task, partition, record.offset):
                    self._held += 1
                    task.offer(record)
        if self._held >= self._bound:
            self._space.clear()
            await self._space.wait()

    def _task(self, partition: int) -> PartitionTask | None:
        """Return a partition's task; None when it is not ours to write."""
        task = self._tasks.get(partition)
        if task is None and (state := self._table.partition(partition)) is not None:
            parts = TaskParts(state, self._table, self._limits, self._on_taken)
            task = self._tasks[partition] = self._make_task(parts)
            self._gaps[partition] = OffsetGap()
            task.start().add_done_callback(self._ended)
        return task

    def _ended(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled() and (error := running.exception()) is not None:
            logger.error("%s ended", running.get_name(), exc_info=error)
            self._on_failed(error)

    def _passes(self, task: PartitionTask, partition: int, offset: int) -> bool:
        """Return whether a record that does not follow the last may be taken all the same."""
        verdict = self._gaps[partition].judge(task.last_offset, offset)
        wanted = task.last_offset + 1
        if verdict is Verdict.READ_AGAIN:
            self.rewinds += 1
            metrics.REWINDS.labels(self.name).inc()
            logger.info("%s: record %d came where %d was expected; read again from there", task.name, offset, wanted)
            self._table.rewind(partition, wanted)
        elif verdict is Verdict.ACCEPT:
            self.missed += offset - wanted
            metrics.MISSED.labels(self.name).inc(offset - wanted)
            logger.warning(
                "%s: records %d to %d are not in the topic any more: retention took them before they were applied",
                task.name,
                wanted,
                offset - 1,
            )
        return verdict is Verdict.ACCEPT

    async def stop(self, grace_seconds: float) -> None:
        """Stop all tasks, each after its flush in progress; records are dropped until :meth:`resume`."""
        self._paused = True
        tasks, self._tasks, self._gaps = list(self._tasks.values()), {}, {}
        if tasks:
            await asyncio.gather(*(task.stop(grace_seconds) for task in tasks))
        self._held = 0
        self._space.set()

    def resume(self) -> None:
        """Take records again."""
        self._paused = False

    def _on_taken(self, records: int) -> None:
        self._held -= records
        if self._held <= self._bound // 2:
            self._space.set()
