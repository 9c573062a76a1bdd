"""All flows of one agent: records go to their partitions' flows, each once and in order, and no more than may wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from kvatlas.streams import metrics
from kvatlas.streams.tasks.flow import Flow, Stage
from kvatlas.streams.tasks.hole import Verdict

logger = logging.getLogger(__name__)


class Flows:
    """All flows of one agent on this worker.

    Args:
        name: the agent's name.
        make_stage: partition -> its stage.
        source_offset: partition -> last source offset that the table reflects, None when it is not ours to write.
        buffer_records: records of all partitions that may wait to be committed before the agent waits for them.
        on_failed: called with the error that ended a flow: the app must not go on without it.
        may_commit: whether this worker is sure to own its partitions; commits wait while it is not.
        rewind: has a partition read again from an offset.
        pass_hole: told of a partition and the offset before which the topic has lost records.
        on_committed: told of a partition and the offset of the last record that was committed.
        commit_interval_seconds: least time between two commits of a partition, unless much was applied.

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
        commit_interval_seconds: float,
    ) -> None:
        self.name = name
        self.skipped = 0
        self.rewinds = 0
        self.missed = 0
        self._may_commit = may_commit
        self._rewind = rewind
        self._pass_hole = pass_hole
        self._on_committed = on_committed
        self._commit_interval = commit_interval_seconds
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
        """Return the number of records that came and are not committed."""
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
            commit_interval_seconds=self._commit_interval,
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
