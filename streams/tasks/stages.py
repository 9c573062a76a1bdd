"""The two agents' work on one partition: apply source records, send what follows, commit, in the order of ``table``."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams import metrics
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.index.apply import apply_blocks, table_keys_of
from kvatlas.streams.index.blocks_record import BlocksRecord, decode_blocks
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve.effects import DeadLetter, Effects
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import Resolver
from kvatlas.streams.state.overlay import Overlay
from kvatlas.streams.state.partition import PartitionState
from kvatlas.streams.tasks.output import Output
from kvatlas.streams.tasks.pods import PodPublisher

logger = logging.getLogger(__name__)


class _Gathered:
    """What was applied to a partition since the last cut; what both agents' stages have in common.

    Args:
        agent: its name, for metrics.
        table: the agent's table.
        partition: the partition.
        settings: the worker's.
    """

    def __init__(self, agent: str, table: BulkTable, partition: int, settings: WorkerSettings) -> None:
        self._table, self._state = table, table.store.local(partition)
        self.lock, self.overlay = self._state.lock, self._state.overlay
        self._agent = agent
        self._settings = settings
        self._counts: Counter[str] = Counter()
        self._records = self._updates = 0
        self._since = 0.0

    @property
    def full(self) -> bool:
        """Whether so much was applied since the last cut that it should be committed before more is."""
        return self._records >= self._settings.flush_records or self._updates >= self._settings.flush_updates

    def advance(
        self, source_offset: int, receive_ns: int, *, records: int, updates: int, counts: Mapping[str, int]
    ) -> None:
        """Take note of records that were applied; readers see what they changed from here on."""
        if not self._since:
            self._since = time.monotonic()
        self._records += records
        self._updates += updates
        self._counts.update(counts)
        self.overlay.advance(source_offset, receive_ns)
        metrics.SOURCE_RECORDS.labels(self._agent).inc(records)

    def cut(self) -> Flush:
        """Return what was applied since the last cut, to be committed."""
        flush = Flush(
            self._table, self._state, self._agent, updates=self._updates, since=self._since, counts=self._counts
        )
        self._counts, self._records, self._updates, self._since = Counter(), 0, 0, 0.0
        return flush

    def drop(self) -> None:
        """Forget what was applied and is not committed."""
        self.overlay.drop()


class Flush:
    """ChangeSet that were cut off to be committed."""

    def __init__(
        self,
        table: BulkTable,
        state: PartitionState,
        agent: str,
        *,
        updates: int,
        since: float,
        counts: Mapping[str, int],
    ) -> None:
        self._table, self._state, self._cut = table, state, state.overlay.cut()
        self._agent, self._updates, self._since, self._counts = agent, updates, since, counts

    async def commit(self) -> None:
        """Commit them."""
        await self._table.commit(self._state, self._cut)
        metrics.flushed(self._agent, self._updates, self._since, self._counts)


class ResolveStage(_Gathered):
    """The resolve agent's work on one partition of ``kv-events``."""

    def __init__(
        self,
        table: BulkTable,
        partition: int,
        resolver: Resolver,
        *,
        output: Output,
        pods: PodPublisher,
        settings: WorkerSettings,
    ) -> None:
        super().__init__("resolve", table, partition, settings)
        self._resolver = resolver
        self._output = output
        self._pods = pods

    async def apply(self, take: Callable[[], Any | None]) -> ResolveStep | None:
        """Apply engine messages to ``engine_blocks``."""
        view = self.overlay
        effects = Effects(self._output.blocks_partitions)
        count, last, sliced = 0, -1, 0
        while count < self._settings.flush_records and (message := take()) is not None:
            self._one(view, message, effects)
            count += 1
            last = message.offset
            updates = effects.updates
            if updates >= self._settings.flush_updates:
                break
            if updates - sliced >= self._settings.slice_updates:
                sliced = updates
                await asyncio.sleep(0)
        if last < 0:
            return None
        self.advance(last, effects.receive_ns, records=count, updates=effects.updates, counts=effects.counts)
        return ResolveStep(effects, self._output, self._pods)

    def _one(self, view: Overlay, message: Any, effects: Effects) -> None:
        parsed = parse_message(message.key, message.value, message.headers, message.partition, message.offset)
        try:
            self._resolver.apply(view, parsed, effects)
        except Exception as error:
            # A bug of ours must not stop every pod of the partition; the letter keeps the message for a replay.
            logger.exception("kv-events/%d/%d: cannot be applied", message.partition, message.offset)
            effects.dead.append(
                DeadLetter(
                    parsed.pod,
                    bytes(message.value or b""),
                    f"internal error: {error!r}",
                    message.partition,
                    message.offset,
                    parsed.headers,
                )
            )


class ResolveStep:
    """What follows from applied messages; what was sent before a failure is not sent again."""

    def __init__(self, effects: Effects, output: Output, pods: PodPublisher) -> None:
        self._output, self._publisher = output, pods
        self._pods: dict[str, PodRecord] = effects.pods
        self._segments = effects.segments
        self._dead = effects.dead
        self._urgent = effects.urgent
        self._receive_ns = effects.receive_ns

    async def send(self) -> None:
        """Send raised epochs, block updates and dead letters, in this order; hand the other pod records over."""
        if self._urgent:
            await self._publisher.send(self._pods)
            self._urgent, self._pods = False, {}
        if self._segments:
            await self._output.send_blocks(self._segments, self._receive_ns)
            self._segments = []
        if self._dead:
            await self._output.send_dead(self._dead)
            self._dead = []
        self._publisher.offer(self._pods)
        metrics.visible("resolve", self._receive_ns)


class IndexStage(_Gathered):
    """The index agent's work on one partition of ``kv-blocks``."""

    def __init__(self, table: BulkTable, partition: int, output: Output, settings: WorkerSettings) -> None:
        super().__init__("index", table, partition, settings)
        self._partition = partition
        self._output = output

    async def apply(self, take: Callable[[], Any | None]) -> DeadBlocks | None:
        """Apply records of block updates to ``block_index``; lookups see them at once."""
        view = self.overlay
        counts: Counter[str] = Counter()
        dead: list[tuple[int, bytes, str]] = []
        taken: list[tuple[BlocksRecord, list[bytes]]] = []
        count, last, updates, receive_ns = 0, -1, 0, 0
        while count < self._settings.flush_records and (message := take()) is not None:
            value, last = message.value, message.offset
            count += 1
            try:
                record = decode_blocks(value or b"")
            except WireError as error:
                dead.append((last, value or b"", str(error)))
                counts["dead"] += 1
                continue
            taken.append((record, table_keys_of(record)))
            receive_ns = max(receive_ns, record.receive_ns)
            updates += len(record.ops)
            if updates >= self._settings.flush_updates:
                break
        await view.prefetch_apart(itertools.chain.from_iterable(keys for _, keys in taken))
        applied = 0
        for record, keys in taken:
            apply_blocks(view, record, counts, table_keys=keys)
            applied += len(record.ops)
            if applied >= self._settings.slice_updates:
                applied = 0
                await asyncio.sleep(0)
        if last < 0:
            return None
        self.advance(last, receive_ns, records=count, updates=counts["updates"], counts=counts)
        metrics.visible("index", receive_ns)
        return DeadBlocks(self._output, self._partition, dead) if dead else None


class DeadBlocks:
    """Records of block updates that cannot be read; what was sent before a failure is not sent again."""

    def __init__(self, output: Output, partition: int, dead: list[tuple[int, bytes, str]]) -> None:
        self._output, self._partition, self._dead = output, partition, dead

    async def send(self) -> None:
        """Dead-letter them."""
        while self._dead:
            offset, value, reason = self._dead[-1]
            await self._output.send_dead_blocks(self._partition, offset, value, reason)
            self._dead.pop()
