"""Bulk restore: bringing tables up to the end of their changelogs with a reader of our own.

Faust's recovery reads record by record (9,000 to 10,000 a second). Here a changelog is read in whole record batches
and written some thousand entries at a time while the next are fetched; Faust's recovery afterwards compares offsets
and finds nothing to do. The same code follows the changelogs of standby partitions for as long as they are standbys.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import KvatlasError, LogError, RightsError
from kvatlas.bridge.kafka.ranges import Edges, RangeReader
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import end_tasks
from kvatlas.streams import metrics
from kvatlas.streams.errors import RestoreError
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.partition import Entry, PartitionState, Role

logger = logging.getLogger(__name__)

#: Local state older than this is rebuilt: a changelog drops tombstones a day after they were compacted.
MAX_LOCAL_AGE_SECONDS: Final = 12 * 3600.0
#: Partitions that are read side by side: each has two fetched stretches of up to 4 MiB in memory.
_AT_ONCE: Final = 8
#: Entries of small batches that are written together.
_LOT_ENTRIES: Final = 8_192
_STANDBY_WAIT_MS: Final = 200
_FOR_EVER: Final = sys.maxsize
_REPORT_SECONDS: Final = 2.0
_STALLED_SECONDS: Final = 120.0
_RETRY_SECONDS: Final = 1.0
_BETWEEN_SECONDS: Final = 30.0

States = Mapping[TopicPartition, PartitionState]
#: What a reader says when Kafka does not answer, or not as it should.
_KAFKA_ERRORS: Final = (KafkaError, LogError, RightsError)
Claim = Callable[[TopicPartition, Meta], Awaitable[int]]


class Progress(NamedTuple):
    """How far a restore is.

    Attributes:
        entries: changelog entries read.
        remaining: entries left, by offsets.
        seconds: since it began.
    """

    entries: int
    remaining: int
    seconds: float

    @property
    def rate(self) -> float:
        """Return entries per second."""
        return self.entries / self.seconds if self.seconds else 0.0


class Lot(NamedTuple):
    """Changelog entries that follow each other in a partition, and the offset up to which that is all."""

    pairs: list[Entry]
    last: int


class BulkReader:
    """Reads changelogs in bulk.

    Args:
        kafka: how to reach the brokers.
        client_id: name in the brokers' logs.
        tables: changelog topic -> name of the table, for metrics.
        max_local_age_seconds: local state written longer ago is rebuilt from nothing: a compacted topic forgets
            tombstones, so a copy that has missed them would keep entries that are gone.
        claim: writes a claim to a changelog and returns its offset, see ``fence``; None reads without claiming.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        client_id: str,
        tables: Mapping[str, str],
        max_local_age_seconds: float,
        claim: Claim | None = None,
    ) -> None:
        self._kafka = kafka
        self._client_id = client_id
        self._tables = tables
        self._claim = claim
        self._max_age_ns = int(max_local_age_seconds * 1e9)

    async def restore(self, states: States) -> Progress:
        """Bring partitions up to the end of their changelogs and make them active.

        Partitions become active one by one, each as soon as it is caught up.

        Args:
            states: changelog partition -> its local state.

        Raises:
            RestoreError: Kafka does not answer, or the changelog gives no records for a long time.
        """
        if not states:
            return Progress(0, 0, 0.0)
        try:
            async with RangeReader(self._kafka, self._client_id) as reader:
                restore = _Restore(reader, self._tables, self._claim)
                edges = await self._edges(reader, states)
                await _all(restore.bring_up(at, states[at], edges[at]) for at in states)
        except _KAFKA_ERRORS as error:
            raise RestoreError(f"changelogs {sorted(self._tables)}: cannot be read: {error!r}; tried again") from error
        return restore.end()

    async def follow(self, states: States, on_caught_up: Callable[[], None]) -> None:
        """Keep standby partitions close to the end of their changelogs, until cancelled.

        Args:
            states: changelog partition -> its local state.
            on_caught_up: called when partitions have become standbys that may answer.
        """
        by_topic: dict[str, dict[TopicPartition, PartitionState]] = {}
        for at, state in states.items():
            by_topic.setdefault(at.topic, {})[at] = state
        while True:
            try:
                await _all(self._follow(topic, found, on_caught_up) for topic, found in by_topic.items())
            except _KAFKA_ERRORS as error:
                logger.warning("standby partitions cannot be followed, tried again: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _edges(self, reader: RangeReader, states: States) -> dict[TopicPartition, Edges]:
        """Return from where on each changelog is to be read, behind what its state has, and where it ends now."""
        found = {}
        for topic in {at.topic for at in states}:
            edges = await reader.edges(topic, [at.partition for at in states if at.topic == topic])
            for partition, (first, end) in edges.items():
                at = TopicPartition(topic, partition)
                state = states[at]
                self._check(at, state, end)
                have = -1 if state.changelog_offset is None else state.changelog_offset
                found[at] = Edges(max(have + 1, first), end)
        return found

    def _check(self, at: TopicPartition, state: PartitionState, end: int) -> None:
        if state.changelog_offset is None:
            return
        age_ns = time.time_ns() - state.meta.written_ns
        if state.changelog_offset >= end:
            why = f"it reflects offset {state.changelog_offset}, the topic ends at {end}: the topic was made anew"
        elif age_ns > self._max_age_ns:
            why = f"it was written {age_ns / 3.6e12:.1f} hours ago; the changelog may have dropped removals since"
        else:
            return
        logger.warning("%s/%d: local state is thrown away: %s", at.topic, at.partition, why)
        state.wipe()

    async def between(self, at: TopicPartition, first: int, last: int) -> list[tuple[bytes, bytes | None]]:
        """Return keys and values of the records ``first`` to ``last`` of a changelog.

        Raises:
            RestoreError: they cannot be read.
        """
        found: list[tuple[bytes, bytes | None]] = []
        try:
            async with asyncio.timeout(_BETWEEN_SECONDS), RangeReader(self._kafka, self._client_id) as reader:
                edge = (await reader.edges(at.topic, [at.partition]))[at.partition]
                bounds = {at.partition: (max(first, edge.first), last + 1)}
                async for _, batch in reader.read(at.topic, bounds):
                    found += [(record.key, record.value) for record in batch]
        except TimeoutError:
            raise RestoreError(f"changelog {at.topic}/{at.partition}: records {first} to {last} do not come") from None
        except KvatlasError as error:
            raise RestoreError(f"changelog {at.topic}/{at.partition}: {error}; tried again") from error
        return found

    async def _follow(self, topic: str, states: States, on_caught_up: Callable[[], None]) -> None:
        """Load what comes in the changelogs of one topic; a fetch that waits must not hold up those of another."""
        async with RangeReader(self._kafka, self._client_id) as reader:
            edges = await self._edges(reader, states)
            for at in (at for at, (first, end) in edges.items() if first >= end):
                states[at].role = Role.STANDBY
            on_caught_up()
            positions = {at.partition: first for at, (first, _) in edges.items()}
            bounds = {partition: (first, _FOR_EVER) for partition, first in positions.items()}
            fetcher = await reader.fetcher(topic, bounds, wait_ms=_STANDBY_WAIT_MS)
            async with contextlib.aclosing(fetcher.batches()) as fetched:
                async for partition, batches in fetched:
                    at = TopicPartition(topic, partition)
                    state = states[at]
                    for lot in lots_of(batches, positions[partition]):
                        await state.load_apart(lot.pairs, lot.last)
                        positions[partition] = lot.last + 1
                    if state.role is Role.RESTORING and positions[partition] >= edges[at].end:
                        state.role = Role.STANDBY
                        on_caught_up()
                    behind = sum(max(end - positions[number], 0) for number, end in fetcher.ends.items())
                    metrics.STANDBY_LAG.labels(self._tables[topic]).set(behind)
                    await asyncio.sleep(0)


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run things side by side; the first error ends them all."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await end_tasks(tasks)


def lots_of(batches: Sequence[Any], first: int) -> Iterator[Lot]:
    """Yield what record batches hold from an offset on, several thousand entries of whole batches at a time."""
    pairs: list[Entry] = []
    for number, batch in enumerate(batches, 1):
        if batch.base_offset >= first:
            pairs += [(record.key, record.value) for record in batch]
        else:  # reading begins in the middle of it
            pairs += [(record.key, record.value) for record in batch if record.offset >= first]
        if len(pairs) >= _LOT_ENTRIES or number == len(batches):
            yield Lot(pairs, batch.next_offset - 1)  # also where its last records were compacted away
            pairs = []


class _Restore:
    """One restore: partitions side by side, and how far it is, for logs and metrics.

    Attributes:
        left: changelog partition -> entries left in it, by offsets.
    """

    def __init__(self, reader: RangeReader, tables: Mapping[str, str], claim: Claim | None) -> None:
        self.left: dict[TopicPartition, int] = {}
        self._reader, self._tables, self._claim = reader, tables, claim
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._entries = 0
        self._began = self._reported = time.monotonic()

    @property
    def progress(self) -> Progress:
        return Progress(self._entries, sum(self.left.values()), time.monotonic() - self._began)

    async def bring_up(self, at: TopicPartition, state: PartitionState, edges: Edges) -> None:
        """Bring one partition up to the end of its changelog, with our claim in it, and make it active."""
        position, end = edges
        claim: int | None = None
        self.left[at] = end - position
        async with self._free:
            while True:
                if position < end:
                    # What the former owner sent last may have arrived meanwhile: the end is as of the last answer.
                    position, end = await self._read(at, state, Edges(position, end))
                elif self._claim is None or claim == state.meta.owner:
                    break  # our claim is in the changelog, and no other before it that counts more
                else:
                    claim, meta = secrets.randbits(62) | 1, state.meta
                    meta = meta._replace(written_ns=time.time_ns(), epoch=meta.epoch + 1, owner=claim)
                    end = await self._claim(at, meta) + 1
            if end and state.changelog_offset != end - 1:
                state.set_changelog_offset(end - 1)
            state.role = Role.ACTIVE

    async def _read(self, at: TopicPartition, state: PartitionState, edges: Edges) -> Edges:
        """Load what a changelog has up to a given end; returns the next position, and where the changelog ends now."""
        position, end = edges
        fetcher = await self._reader.fetcher(at.topic, {at.partition: edges})
        try:
            async with asyncio.timeout(_STALLED_SECONDS) as stalled, contextlib.aclosing(fetcher.batches()) as fetched:
                async for _, batches in fetched:
                    stalled.reschedule(None)
                    for lot in lots_of(batches, position):
                        await state.load_apart(lot.pairs, lot.last)  # more is fetched while it is written
                        position = lot.last + 1
                        self._loaded(at, len(lot.pairs), end - position)
                    stalled.reschedule(asyncio.get_running_loop().time() + _STALLED_SECONDS)
        except TimeoutError:
            raise RestoreError(f"changelog {at.topic}/{at.partition}: no record for {_STALLED_SECONDS} s") from None
        position = max(position, end)  # the end may be a hole that compaction left
        return Edges(position, max(position, fetcher.ends[at.partition]))

    def _loaded(self, at: TopicPartition, entries: int, left: int) -> None:
        self._entries += entries
        self.left[at] = max(left, 0)
        metrics.RESTORED.labels(self._tables[at.topic]).inc(entries)
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS:
            return
        self._reported, so_far = now, self.progress
        for topic, table in self._tables.items():
            rest = sum(number for place, number in self.left.items() if place.topic == topic)
            metrics.RESTORE_REMAINING.labels(table).set(rest)
            metrics.RESTORE_RATE.labels(table).set(so_far.rate)
        logger.info("restoring: %d entries, %.0f/s, %d remaining", so_far.entries, so_far.rate, so_far.remaining)

    def end(self) -> Progress:
        """Take note that all is restored."""
        partitions = len(self.left)
        self.left.clear()
        for table in self._tables.values():
            metrics.RESTORE_REMAINING.labels(table).set(0)
            metrics.RESTORE_RATE.labels(table).set(0)
        progress = self.progress
        if progress.entries:
            text = "restored %d partitions: %d entries in %.2f s, %.0f entries/s"
            logger.info(text, partitions, progress.entries, progress.seconds, progress.rate)
        return progress
