"""What stands in for Kafka where the mirror is tested: a changelog in memory and a member of the mirrors' group."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import NamedTuple

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.member import Assignment
from kvatlas.bridge.kafka.ranges import Edges
from kvatlas.streams.state.changelog import META_KEY, Meta, encode_meta

#: Far from now, so that no position is too old for the changelog.
NOW_NS = 4_000_000_000_000_000_000


class Record(NamedTuple):
    """A record of a changelog."""

    offset: int
    key: bytes | None
    value: bytes | None


class Changelog:
    """One partition of the changelog, in memory, shared by the mirrors of a test."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.first = 0
        self.end = 0
        self.meta = Meta(epoch=1, owner=1, written_ns=NOW_NS)

    def put(self, key: bytes | None, data: bytes | None) -> None:
        """Append a record."""
        self.records.append(Record(self.end, key, data))
        self.end += 1

    def commit(self, writes: dict[bytes, bytes | None], meta: Meta | None = None) -> None:
        """Commit a flush as the table does; with ``meta``, as another writer."""
        before = meta or self.meta
        after = before._replace(source_offset=before.source_offset + 10, receive_ns=7)
        self.put(META_KEY, encode_meta(before))
        for key, data in writes.items():
            self.put(key, data)
        self.put(META_KEY, encode_meta(after))
        if meta is None:
            self.meta = after

    def compact(self) -> None:
        """Keep the newest record of each key alone, and forget what was removed."""
        newest = {record.key: record for record in self.records}
        self.records = [record for record in newest.values() if record.value is not None]
        self.records.sort()

    def entries(self) -> dict[bytes, bytes]:
        """What the table has, with nobody replaced."""
        found: dict[bytes, bytes] = {}
        for _, key, data in self.records:
            if key is not None and key != META_KEY:
                found.pop(key, None) if data is None else found.update({key: data})
        return found


class Member:
    """A member of the mirrors' group, as the mirror uses it."""

    def __init__(self, logs: dict[int, Changelog], generation: int) -> None:
        self.logs = logs
        self.given = Assignment(1, generation, frozenset(logs))
        self.positions: dict[int, int] = {}
        self.left = 0
        self.fails = False

    async def assignment(self) -> Assignment:
        return self.given

    async def edge(self, partition: int) -> Edges:
        return Edges(self.logs[partition].first, self.logs[partition].end)

    def go_on(self, partition: int, offset: int) -> None:
        self.positions[partition] = offset

    async def position(self, partition: int) -> int:
        return self.positions[partition]

    def end(self, partition: int) -> int:
        return self.logs[partition].end

    async def fetch(self, partitions: Collection[int], *, timeout_ms: int, max_records: int) -> dict[int, list[Record]]:
        del timeout_ms
        await asyncio.sleep(0)
        if self.fails:
            raise LogError("away")
        found = {}
        for number in partitions:
            log = self.logs[number]
            if not log.first <= self.positions[number] <= log.end:  # as Kafka's client does
                self.positions[number] = log.first
            batch = [one for one in log.records if one.offset >= self.positions[number]][:max_records]
            self.positions[number] = batch[-1].offset + 1 if batch else log.end
            if batch:
                found[number] = batch
        return found

    async def leave(self) -> None:
        self.left += 1
