"""Bulk restore: what a changelog holds is loaded from the position on, and a partition is ours behind our own claim."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.ranges import Edges, RangeFetcher
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.streams.errors import RestoreError
from kvatlas.streams.state import restore
from kvatlas.streams.state.changelog import META_KEY, Meta, encode_meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState, Role
from kvatlas.streams.state.restore import BulkReader, lots_of

TOPIC = "changelog"
Entries = tuple[tuple[bytes | None, bytes | None], ...]


def record_batch(base: int, *entries: tuple[bytes | None, bytes | None], length: int | None = None) -> bytes:
    """Return a record batch as a broker stores it; a longer ``length`` is what compaction left of a longer one."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1 << 24)
    for number, (key, value) in enumerate(entries):
        builder.append(number, 1_000, key, value, [])
    data = bytearray(builder.build())
    data[:8] = base.to_bytes(8, "big")
    if length is not None:
        data[23:27] = (length - 1).to_bytes(4, "big")  # offset of the last record, from the first
    return bytes(data)


def batches_of(data: bytes) -> list[Any]:
    """Return the batches of an answer."""
    records, found = MemoryRecords(data), []
    while records.has_next():
        found.append(records.next_batch())
    return found


def test_entries_are_taken_from_a_position_on() -> None:
    """Keys and values of all batches in their order, and the offset up to which that is all, holes included."""
    first = record_batch(0, (b"a", b"1"), (b"b", b"2"), (b"c", None))
    data = first + record_batch(3, (b"d", b"4"), length=5) + record_batch(8, (None, b"9"), length=2)
    ((pairs, last),) = lots_of(batches_of(data), 1)
    assert pairs == [(b"b", b"2"), (b"c", None), (b"d", b"4"), (None, b"9")]
    assert last == 9
    assert list(lots_of([], 1)) == []


def test_entries_come_in_lots_of_whole_batches() -> None:
    """Several thousand at a time, so that nobody waits for all that was fetched."""
    data, at = b"", 0
    for size in (5_000, 5_000, 9_000, 10):
        data += record_batch(at, *((b"%d" % number, b"v") for number in range(at, at + size)))
        at += size
    lots = list(lots_of(batches_of(data), 0))
    assert [last for _, last in lots] == [9_999, 18_999, 19_009]
    assert [key for pairs, _ in lots for key, _ in pairs] == [b"%d" % number for number in range(at)]


class Brokers:
    """Changelogs in memory, read as a :class:`RangeReader` reads them.

    Attributes:
        logs: partition -> its batches.
        arriving: partition -> what its former owner writes while it is read for the first time.
        fails: why it cannot be read, None while it can.
    """

    def __init__(self) -> None:
        self.logs: dict[int, list[bytes]] = {}
        self.arriving: dict[int, Entries] = {}
        self.fails: Exception | None = None
        self.cluster = SimpleNamespace(leader_for_partition=lambda _: 0)
        self._wrote = asyncio.Event()

    def append(self, partition: int, *entries: tuple[bytes | None, bytes | None]) -> int:
        """Append a batch; returns the offset of its last record."""
        base = self.end(partition)
        self.logs.setdefault(partition, []).append(record_batch(base, *entries))
        self._wrote.set()
        return base + len(entries) - 1

    def end(self, partition: int) -> int:
        """Return the offset after the last record."""
        log = self.logs.get(partition)
        return int(batches_of(log[-1])[-1].next_offset) if log else 0

    @contextlib.asynccontextmanager
    async def reader(self, *_: object) -> AsyncIterator[Brokers]:
        """Connect."""
        yield self

    async def edges(self, _topic: str, partitions: list[int]) -> dict[int, Edges]:
        """Return where partitions begin and end."""
        if self.fails is not None:
            raise self.fails
        return {number: Edges(0, self.end(number)) for number in partitions}

    async def fetcher(self, topic: str, bounds: Mapping[int, Any], *, wait_ms: int = 20) -> RangeFetcher:
        """Return what fetches a range from here."""
        return RangeFetcher(self, topic, bounds, wait_ms=wait_ms)

    async def send(self, _node: int, request: Any) -> Any:
        """Answer a fetch: one batch of each partition that has some."""
        ((topic, partitions),) = request.topics
        while True:
            self._wrote.clear()
            found = []
            for partition, position, _ in partitions:
                if entries := self.arriving.pop(partition, ()):
                    self.append(partition, *entries)
                for data in self.logs.get(partition, []):
                    if batches_of(data)[-1].next_offset > position:
                        found.append((partition, 0, self.end(partition), data))
                        break
            if found:
                return SimpleNamespace(topics=[(topic, found)])
            await self._wrote.wait()


@pytest.fixture
def brokers(monkeypatch: pytest.MonkeyPatch) -> Brokers:
    """Return changelogs that are read in the place of Kafka's."""
    made = Brokers()
    monkeypatch.setattr(restore, "RangeReader", made.reader)
    return made


@pytest.fixture
def states(tmp_path: Path) -> Iterator[dict[TopicPartition, PartitionState]]:
    """Return three partitions without local state."""
    budget = RocksBudget(1 << 20, 1 << 20)
    made = {
        TopicPartition(TOPIC, number): PartitionState(number, tmp_path / str(number), budget, 0) for number in range(3)
    }
    yield made
    for state in made.values():
        state.close()


def bulk_reader(brokers: Brokers, *, claims: bool = True) -> BulkReader:
    """Return a reader whose claims go to the changelogs."""

    async def claim(at: TopicPartition, meta: Meta) -> int:
        return brokers.append(at.partition, (META_KEY, encode_meta(meta)))

    return BulkReader(KafkaSettings(), "test", {TOPIC: "table"}, 3600.0, claim=claim if claims else None)


async def test_a_partition_is_active_behind_its_own_claim(
    brokers: Brokers, states: dict[TopicPartition, PartitionState]
) -> None:
    """All of it is loaded, what arrived during the reading too, and the claim is the last of it."""
    for number in range(2):
        for value in (b"old", b"new"):
            brokers.append(number, (b"key", value), (b"gone", value), (b"gone", None))
    brokers.arriving[1] = ((b"late", b"1"),)
    progress = await bulk_reader(brokers).restore(states)
    assert (progress.entries, progress.remaining) == (6 + 1 + 7 + 1 + 1, 0)
    for at, state in states.items():
        assert state.role is Role.ACTIVE
        assert state.changelog_offset == brokers.end(at.partition) - 1
        assert (state.meta.epoch, state.meta.owner != 0) == (1, True)
        wanted = {0: {b"key": b"new"}, 1: {b"key": b"new", b"late": b"1"}, 2: {}}
        assert dict(state.items()) == wanted[at.partition]


async def test_a_claim_that_counts_more_is_claimed_against(
    brokers: Brokers, states: dict[TopicPartition, PartitionState]
) -> None:
    """Another that claims in the same moment wins by its higher epoch, until we have read that and claim anew."""
    ((at, state),) = [*states.items()][:1]
    rivals = [Meta(epoch=5, owner=77)]

    async def claim(at: TopicPartition, meta: Meta) -> int:
        if rivals:
            brokers.append(at.partition, (META_KEY, encode_meta(rivals.pop())))
        return brokers.append(at.partition, (META_KEY, encode_meta(meta)))

    reader = BulkReader(KafkaSettings(), "test", {TOPIC: "table"}, 3600.0, claim=claim)
    await reader.restore({at: state})
    assert (state.role, state.meta.epoch) == (Role.ACTIVE, 6)
    assert brokers.end(0) == 3


async def test_only_what_the_local_state_lacks_is_read(
    brokers: Brokers, states: dict[TopicPartition, PartitionState]
) -> None:
    """A second restore goes on where the first ended."""
    brokers.append(0, *((b"%d" % number, b"v") for number in range(50)))
    await bulk_reader(brokers).restore(states)
    brokers.append(0, (b"more", b"v"))
    progress = await bulk_reader(brokers, claims=False).restore(states)
    assert progress.entries == 1
    assert len(dict(states[TopicPartition(TOPIC, 0)].items())) == 51


async def test_a_kafka_out_of_reach_is_told_as_a_restore_that_may_be_tried_again(
    brokers: Brokers, states: dict[TopicPartition, PartitionState]
) -> None:
    """The caller waits and tries again; nothing is active meanwhile."""
    brokers.fails = LogError("no answer")
    with pytest.raises(RestoreError, match="no answer") as raised:
        await bulk_reader(brokers).restore(states)
    assert raised.value.retriable
    assert {state.role for state in states.values()} == {Role.RESTORING}


async def test_a_changelog_without_the_records_it_should_have_is_given_up(
    brokers: Brokers, states: dict[TopicPartition, PartitionState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end was cut off while it was read: waiting for it would take for ever."""
    monkeypatch.setattr(restore, "_STALLED_SECONDS", 0.1)

    async def edges(_topic: str, partitions: list[int]) -> dict[int, Edges]:
        return dict.fromkeys(partitions, Edges(0, 5))

    monkeypatch.setattr(brokers, "edges", edges)
    with pytest.raises(RestoreError, match="no record for"):
        await bulk_reader(brokers).restore(states)


async def test_standbys_follow_their_changelogs(brokers: Brokers, states: dict[TopicPartition, PartitionState]) -> None:
    """They may answer once they have what was there at the start, and take what comes after."""
    for number in range(2):
        brokers.append(number, (b"key", b"old"))
    told = asyncio.Queue[int]()

    def caught_up() -> None:
        told.put_nowait(sum(state.role is Role.STANDBY for state in states.values()))

    following = asyncio.create_task(bulk_reader(brokers).follow(states, caught_up))
    while await asyncio.wait_for(told.get(), 90) < len(states):
        pass
    brokers.append(2, (b"key", b"new"))
    state = states[TopicPartition(TOPIC, 2)]
    while state.changelog_offset != 0:
        await asyncio.sleep(0.01)
    assert state.get(b"key") == b"new"
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
