"""The two agents' work on one partition: apply source records to a view, then commit in the order of ``table``."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mode import get_logger

from kvatlas.bridge import records
from kvatlas.bridge.errors import WireError
from kvatlas.bridge.records import PodRecord
from kvatlas.streams import metrics
from kvatlas.streams.codec import BlocksRecord, decode_blocks
from kvatlas.streams.effects import DeadLetter, Effects
from kvatlas.streams.index import apply_blocks, table_keys_of
from kvatlas.streams.message import parse_message
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.pods import PodPublisher
from kvatlas.streams.resolve import Resolver
from kvatlas.streams.table import BulkTable, PartitionView

logger = get_logger(__name__)


class Output:
    """Records that the agents produce beside their tables.

    Args:
        producer: returns the started ``AIOKafkaProducer``.
        blocks: topic ``kv-blocks`` and its number of partitions.
        dlq: topic ``kv-events-dlq`` and its number of partitions.
        events: topic name of ``kv-events``, named as the origin of dead letters.
    """

    def __init__(self, producer: Callable[[], Any], blocks: tuple[str, int], dlq: tuple[str, int], events: str) -> None:
        self.blocks_partitions = blocks[1]
        self._producer = producer
        self._blocks = blocks[0]
        self._dlq, self._dlq_partitions = dlq
        self._events = events

    async def send_blocks(self, by_partition: Mapping[int, Sequence[bytes]]) -> None:
        """Send ``kv-blocks`` records in order per partition and wait until the brokers have them.

        Raises:
            KafkaError: not acknowledged.
        """
        producer = self._producer()
        pending = [
            await producer.send(self._blocks, value, partition=partition)
            for partition, values in by_partition.items()
            for value in values
        ]
        await asyncio.gather(*pending)

    async def send_dead(self, letters: Sequence[DeadLetter]) -> None:
        """Send dead letters and wait until the brokers have them.

        Raises:
            KafkaError: not acknowledged.
        """
        producer = self._producer()
        pending = []
        for letter in letters:
            headers = [(name, value) for name, value in letter.headers.items() if name != records.H_REASON]
            headers += [
                (records.H_REASON, letter.reason.encode()[:4096]),
                (records.H_ORIGIN, f"{self._events}/{letter.partition}/{letter.offset}".encode()),
            ]
            partition = records.pod_partition(letter.pod, self._dlq_partitions)
            pending.append(
                await producer.send(
                    self._dlq, letter.raw, key=letter.pod.encode(), partition=partition, headers=headers
                )
            )
        await asyncio.gather(*pending)

    async def send_dead_blocks(self, partition: int, offset: int, value: bytes, reason: str) -> None:
        """Dead-letter one ``kv-blocks`` record that cannot be read.

        Raises:
            KafkaError: not acknowledged.
        """
        headers = [
            (records.H_REASON, reason.encode()[:4096]),
            (records.H_ORIGIN, f"{self._blocks}/{partition}/{offset}".encode()),
        ]
        target = partition % self._dlq_partitions
        await (await self._producer().send(self._dlq, value, partition=target, headers=headers))


class ResolveStage:
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
        self.lock = table.store.local(partition).lock
        self._table = table
        self._partition = partition
        self._resolver = resolver
        self._output = output
        self._pods = pods
        self._settings = settings

    async def apply(self, take: Callable[[], Any | None]) -> ResolveWork | None:
        """Apply engine messages to a fresh view of ``engine_blocks``."""
        view = self._table.view(self._partition)
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
        metrics.SOURCE_RECORDS.labels("resolve").inc(count)
        return ResolveWork(self, view, effects, last)

    def _one(self, view: PartitionView, message: Any, effects: Effects) -> None:
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

    async def commit(self, work: ResolveWork) -> None:
        """Commit in the order written down in ``table``."""
        effects = work.effects
        if effects.urgent and not work.pods_sent:
            await self._pods.send(work.pods)
            work.pods_sent = True
        if not work.blocks_sent:
            await self._output.send_blocks(work.records)
            await self._output.send_dead(effects.dead)
            work.blocks_sent = True
        await self._table.commit(self._partition, work.view, work.source_offset, effects.receive_ns)
        if not work.pods_sent:
            self._pods.offer(work.pods)
        metrics.flushed("resolve", effects.updates, work.started, effects.receive_ns, effects.counts)


class ResolveWork:
    """One flush of resolve that waits for its commit."""

    def __init__(self, stage: ResolveStage, view: PartitionView, effects: Effects, source_offset: int) -> None:
        self.view = view
        self.effects = effects
        self.source_offset = source_offset
        self.pods: dict[str, PodRecord] = effects.pods
        self.records = effects.encode()
        self.started = time.monotonic()
        self.pods_sent = False
        self.blocks_sent = False
        self._stage = stage

    async def commit(self) -> None:
        """Commit; what was sent before a failure is not sent again."""
        await self._stage.commit(self)


class IndexStage:
    """The index agent's work on one partition of ``kv-blocks``."""

    def __init__(self, table: BulkTable, partition: int, output: Output, settings: WorkerSettings) -> None:
        self.lock = table.store.local(partition).lock
        self._table = table
        self._partition = partition
        self._output = output
        self._settings = settings

    async def apply(self, take: Callable[[], Any | None]) -> IndexWork | None:
        """Apply records of block updates to a fresh view of ``block_index``."""
        view = self._table.view(self._partition)
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
        metrics.SOURCE_RECORDS.labels("index").inc(count)
        return IndexWork(self, view, dead=dead, source_offset=last, receive_ns=receive_ns, counts=counts)

    async def commit(self, work: IndexWork) -> None:
        """Commit in the order written down in ``table``."""
        while work.dead:
            offset, value, reason = work.dead[-1]
            await self._output.send_dead_blocks(self._partition, offset, value, reason)
            work.dead.pop()
        await self._table.commit(self._partition, work.view, work.source_offset, work.receive_ns)
        metrics.flushed("index", work.counts["updates"], work.started, work.receive_ns, work.counts)


class IndexWork:
    """One flush of the index that waits for its commit."""

    def __init__(
        self,
        stage: IndexStage,
        view: PartitionView,
        *,
        dead: list[tuple[int, bytes, str]],
        source_offset: int,
        receive_ns: int,
        counts: Counter[str],
    ) -> None:
        self.view = view
        self.dead = dead
        self.source_offset = source_offset
        self.receive_ns = receive_ns
        self.counts = counts
        self.started = time.monotonic()
        self._stage = stage

    async def commit(self) -> None:
        """Commit."""
        await self._stage.commit(self)
