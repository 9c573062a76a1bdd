"""Bulk restore: bringing tables up to the end of their changelogs with a consumer of our own.

Faust's recovery reads record by record (9,000 to 10,000 a second). Here a changelog is read in whole record batches,
without a record of the client's for each entry, and written some thousand entries at a time while the next are read;
Faust's recovery afterwards compares offsets and finds nothing to do. The
same code follows the changelogs of standby partitions for as long as they are standbys.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import Entries, fetch, only_entries, start_client
from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import end_tasks
from kvatlas.streams import metrics
from kvatlas.streams.errors import RestoreError
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.partition import PartitionState, Role

logger = logging.getLogger(__name__)

#: Local state older than this is rebuilt: a changelog drops tombstones a day after they were compacted.
MAX_LOCAL_AGE_SECONDS: Final = 12 * 3600.0
_FETCH_BYTES: Final = 8 * 1024 * 1024
_POLL_MS: Final = 500
#: While something is being written, which may be all there is to wait for.
_POLL_BUSY_MS: Final = 20
#: Lots of entries in one turn of the event loop.
_POLL_LOTS: Final = 2
_REPORT_SECONDS: Final = 2.0
_STALLED_SECONDS: Final = 120.0
_RETRY_SECONDS: Final = 1.0
_BETWEEN_SECONDS: Final = 30.0

States = Mapping[TopicPartition, PartitionState]
#: What is being written, at most one lot of a partition.
Loads = dict[TopicPartition, "asyncio.Task[Entries]"]
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
        began = time.monotonic()
        if not states:
            return Progress(0, 0, 0.0)
        consumer = self._consumer()
        try:
            await start_client(consumer)
            only_entries(consumer)
            entries = await self._restore(consumer, states, began)
        except KafkaError as error:
            raise RestoreError(f"changelogs {sorted(self._tables)}: cannot be read: {error!r}; tried again") from error
        finally:
            await consumer.stop()
        progress = Progress(entries, 0, time.monotonic() - began)
        if entries:
            logger.info(
                "restored %d partitions: %d entries in %.2f s, %.0f entries/s",
                len(states),
                entries,
                progress.seconds,
                progress.rate,
            )
        return progress

    async def follow(self, states: States, on_caught_up: Callable[[], None]) -> None:
        """Keep standby partitions close to the end of their changelogs, until cancelled.

        Args:
            states: changelog partition -> its local state.
            on_caught_up: called when partitions have become standbys that may answer.
        """
        while True:
            consumer = self._consumer()
            try:
                await start_client(consumer)
                only_entries(consumer)
                ends = await self._seek(consumer, states)
                await self._follow(consumer, states, ends, on_caught_up)
            except KafkaError as error:
                logger.warning("standby partitions cannot be followed, tried again: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
            finally:
                await consumer.stop()

    def _consumer(self) -> Any:
        return AIOKafkaConsumer(
            **client_config(self._kafka, self._client_id),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_wait_ms=200,
            check_crcs=False,  # TCP and the broker checked them; it is a tenth of the restore's time
        )

    async def _seek(self, consumer: Any, states: States) -> dict[TopicPartition, int]:
        """Position the consumer behind what each state has; returns the changelogs' ends."""
        partitions = list(states)
        consumer.assign(partitions)
        ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
        starts: dict[TopicPartition, int] = await consumer.beginning_offsets(partitions)
        for at, state in states.items():
            self._check(at, state, ends[at])
            have = -1 if state.changelog_offset is None else state.changelog_offset
            consumer.seek(at, max(have + 1, starts[at]))
        return ends

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

    async def _restore(self, consumer: Any, states: States, began: float) -> int:
        loads: Loads = {}
        try:
            return await self._read_all(consumer, states, loads, began)
        finally:
            await end_tasks(loads.values())

    async def _read_all(self, consumer: Any, states: States, loads: Loads, began: float) -> int:
        ends = await self._seek(consumer, states)
        open_ = {at: (await consumer.position(at)) for at in states}
        claims: dict[TopicPartition, int] = {}
        entries = 0
        report = _Report(self._tables, began)
        last_record = time.monotonic()
        while True:
            for at in [at for at, load in loads.items() if load.done()]:
                lot = loads.pop(at).result()
                open_[at], last_record = lot.last + 1, time.monotonic()
                entries += len(lot.pairs)
                metrics.RESTORED.labels(self._tables[at.topic]).inc(len(lot.pairs))
            reached = [at for at, position in open_.items() if position >= ends[at] and at not in loads]
            if reached:
                # The former owner's last batch may have arrived since: look again before declaring it caught up.
                ends.update(await consumer.end_offsets(reached))
                reached = [at for at in reached if open_[at] >= ends[at]]
                for at in [at for at in reached if self._owned(states[at], claims.get(at))]:
                    reached.remove(at)
                    del open_[at]
                    consumer.pause(at)
                    self._ready(states[at], ends[at])
                ends.update(await self._claim_all(reached, states, claims))
            if not open_:
                report.end()
                return entries
            if not await self._begin_loads(consumer, states, [at for at in open_ if at not in loads], loads):
                for at, position in open_.items():  # the end may be a hole that compaction left
                    open_[at] = max(position, await consumer.position(at))
                if time.monotonic() - last_record > _STALLED_SECONDS:
                    raise RestoreError(f"changelogs {sorted(map(str, open_))}: no record for {_STALLED_SECONDS} s")
            report.tick(entries, {at: ends[at] - position for at, position in open_.items()})

    async def _begin_loads(self, consumer: Any, states: States, free: Sequence[TopicPartition], loads: Loads) -> bool:
        """Read on in the partitions of which nothing is being written; False when nothing came, nor is being written.

        What was read of a partition is written while others are read, and then the next of it.
        """
        if not free:
            await asyncio.wait(loads.values(), return_when=asyncio.FIRST_COMPLETED)
            return True
        fetched = await fetch(consumer, *free, timeout_ms=_POLL_BUSY_MS if loads else _POLL_MS, max_records=1)
        for at, (lot,) in fetched.items():
            loads[at] = asyncio.create_task(_load(states[at], lot), name=f"load-{at.topic}-{at.partition}")
        return bool(loads)

    def _owned(self, state: PartitionState, claim: int | None) -> bool:
        """Return whether our claim is in the changelog, and no other before it that counts more."""
        return self._claim is None or claim == state.meta.owner

    async def _claim_all(
        self, partitions: Sequence[TopicPartition], states: States, claims: dict[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """Claim partitions whose changelogs are read to the end; returns the new ends."""
        if self._claim is None or not partitions:
            return {}
        metas = []
        for at in partitions:
            claims[at] = secrets.randbits(62) | 1
            meta = states[at].meta
            metas.append(meta._replace(written_ns=time.time_ns(), epoch=meta.epoch + 1, owner=claims[at]))
        offsets = await asyncio.gather(*map(self._claim, partitions, metas))
        return {at: offset + 1 for at, offset in zip(partitions, offsets, strict=True)}

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

    @staticmethod
    def _ready(state: PartitionState, end: int) -> None:
        if end and state.changelog_offset != end - 1:
            state.set_changelog_offset(end - 1)
        state.role = Role.ACTIVE

    async def _follow(
        self, consumer: Any, states: States, ends: dict[TopicPartition, int], on_caught_up: Callable[[], None]
    ) -> None:
        for at, state in states.items():
            if (state.changelog_offset if state.changelog_offset is not None else -1) + 1 >= ends[at]:
                state.role = Role.STANDBY
        on_caught_up()
        while True:
            fetched = await fetch(consumer, timeout_ms=_POLL_MS, max_records=_POLL_LOTS)
            behind: dict[str, int] = {}
            for at, lots in fetched.items():
                state = states[at]
                for lot in lots:
                    await _load(state, lot)
                behind[at.topic] = behind.get(at.topic, 0) + max((consumer.highwater(at) or 0) - lot.last - 1, 0)
                if state.role is Role.RESTORING and lot.last + 1 >= ends[at]:
                    state.role = Role.STANDBY
                    on_caught_up()
                await asyncio.sleep(0)
            for topic, table in self._tables.items():
                metrics.STANDBY_LAG.labels(table).set(behind.get(topic, 0))


async def _load(state: PartitionState, lot: Entries) -> Entries:
    await state.load_apart(lot.pairs, lot.last)
    return lot


class _Report:
    """Progress of a restore in logs and metrics."""

    def __init__(self, tables: Mapping[str, str], began: float) -> None:
        self._tables = tables
        self._began = began
        self._reported = began

    def tick(self, entries: int, remaining: Mapping[TopicPartition, int]) -> None:
        now = time.monotonic()
        if now - self._reported < _REPORT_SECONDS:
            return
        self._reported = now
        progress = Progress(entries, sum(remaining.values()), now - self._began)
        for topic, table in self._tables.items():
            left = sum(number for at, number in remaining.items() if at.topic == topic)
            metrics.RESTORE_REMAINING.labels(table).set(left)
            metrics.RESTORE_RATE.labels(table).set(progress.rate)
        logger.info("restoring: %d entries, %.0f entries/s, %d remaining", entries, progress.rate, progress.remaining)

    def end(self) -> None:
        for table in self._tables.values():
            metrics.RESTORE_REMAINING.labels(table).set(0)
            metrics.RESTORE_RATE.labels(table).set(0)
