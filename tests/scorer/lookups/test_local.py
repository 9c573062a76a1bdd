"""Tests of lookups in the tables of the same process."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, partition_of, root_key
from kvatlas.scorer.lookups.local import LocalTables, TableLookups
from kvatlas.scorer.scoring.lookup import Answers, Seen
from kvatlas.streams.state.cache import BytesCache
from kvatlas.streams.state.partition import Reflected

COUNT = 4
KEYS = block_keys(root_key("m"), pack_tokens(list(range(640))), 16)
VALUES = {key: b"holder-%d" % (number % 3) for number, key in enumerate(KEYS) if number % 5}


class Role(enum.Enum):
    """Roles by the names that the worker's tables use."""

    ACTIVE = 1
    STANDBY = 2
    RESTORING = 3


class Part:
    """A table partition over a dict, with the worker's own cache in front."""

    def __init__(self, role: Role, values: dict[bytes, bytes], offset: int = 7) -> None:
        self.role, self.values = role, values
        self.reflected = Reflected(offset, 99)
        self.overlay = SimpleNamespace(values={})
        self.cache = BytesCache(100_000)
        self.read: list[bytes] = []

    def answer(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.read += keys
        return [self.overlay.values.get(key, self.values.get(key)) for key in keys]


class Others:
    """Lookups elsewhere: answers from a dict, or says nothing of some partitions."""

    def __init__(self, values: dict[bytes, bytes], silent: frozenset[int] = frozenset()) -> None:
        self.values, self.silent = values, silent
        self.asked: list[bytes] = []
        self.closed = False

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        self.asked += keys
        parts = {partition_of(key, COUNT) for key in keys}
        return Answers(
            [None if partition_of(key, COUNT) in self.silent else self.values.get(key, b"") for key in keys],
            {p: Seen("unanswered" if p in self.silent else "active", "other", 3, 0) for p in parts},
        )

    def unready(self) -> str | None:
        return "nobody else"

    async def forget_gone(self) -> None: ...

    async def close(self) -> None:
        self.closed = True


def lookups(parts: dict[int, Part], remote: Others | None = None) -> TableLookups:
    return TableLookups(LocalTables(parts.get, lambda: COUNT, lambda: "here", "v1"), remote)


def parts(role: Role = Role.ACTIVE, **fields: int) -> dict[int, Part]:
    return {number: Part(role, VALUES, **fields) for number in range(COUNT)}


def of(*partitions: int) -> list[bytes]:
    return [key for key in KEYS if partition_of(key, COUNT) in partitions]


async def test_all_here_is_answered_in_the_order_of_the_keys() -> None:
    """Held keys give their value, others empty bytes, and each partition touched says its offset."""
    answers = await lookups(parts()).lookup(KEYS, 0.0)
    assert answers.values == [VALUES.get(key, b"") for key in KEYS]
    assert answers.partitions == {number: Seen("active", "here", 7, 99) for number in range(COUNT)}


async def test_cached_values_are_not_read_again() -> None:
    """Only what the cache lacks goes to the database."""
    tables = parts()
    for key in KEYS[:20]:
        if key in VALUES:
            tables[partition_of(key, COUNT)].cache.put(key, VALUES[key])
    answers = await lookups(tables).lookup(KEYS, 0.0)
    assert answers.values == [VALUES.get(key, b"") for key in KEYS]
    read = {key for part in tables.values() for key in part.read}
    assert read == set(KEYS) - (set(KEYS[:20]) & VALUES.keys())


async def test_what_was_applied_counts_before_the_cache_has_it() -> None:
    """A value that is cached and written over, and not committed yet, is answered as it is now."""
    tables = parts()
    key = next(key for key in KEYS if key in VALUES)
    here = tables[partition_of(key, COUNT)]
    here.cache.put(key, VALUES[key])
    here.overlay.values[key] = b"newer"
    answers = await lookups(tables).lookup(KEYS, 0.0)
    assert answers.values == [b"newer" if other == key else VALUES.get(other, b"") for other in KEYS]


async def test_what_was_removed_is_not_answered_from_the_cache() -> None:
    """A key that lost its last holder counts as held by nobody before that is committed."""
    tables = parts()
    key = next(key for key in KEYS if key in VALUES)
    here = tables[partition_of(key, COUNT)]
    here.cache.put(key, VALUES[key])
    here.overlay.values[key] = None
    answers = await lookups(tables).lookup(KEYS, 0.0)
    assert answers.values == [b"" if other == key else VALUES.get(other, b"") for other in KEYS]


async def test_partitions_elsewhere_are_asked_for_and_only_those() -> None:
    """What another worker owns, or is being restored here, comes from there."""
    tables = parts()
    del tables[1]
    tables[2].role = Role.RESTORING
    remote = Others(dict.fromkeys(KEYS, b"theirs"))
    answers = await lookups(tables, remote).lookup(KEYS, time.monotonic() + 60)
    assert remote.asked == of(1, 2)
    for key, value in zip(KEYS, answers.values, strict=True):
        assert value == (b"theirs" if partition_of(key, COUNT) in (1, 2) else VALUES.get(key, b""))
    assert {number: seen.worker for number, seen in answers.partitions.items()} == {
        0: "here",
        1: "other",
        2: "other",
        3: "here",
    }


async def test_a_copy_answers_only_when_the_owner_does_not() -> None:
    """A standby here gives way to the owner's answer, and answers, flagged, when that is away."""
    tables = parts()
    tables[0].role = tables[3].role = Role.STANDBY
    remote = Others(dict.fromkeys(KEYS, b"theirs"), silent=frozenset({3}))
    answers = await lookups(tables, remote).lookup(KEYS, time.monotonic() + 60)
    for key, value in zip(KEYS, answers.values, strict=True):
        assert value == (b"theirs" if partition_of(key, COUNT) == 0 else VALUES.get(key, b""))
    assert answers.partitions[0] == Seen("active", "other", 3, 0)
    assert answers.partitions[3] == Seen("standby", "here", 7, 99)


async def test_what_nobody_answers_is_none_never_empty() -> None:
    """A partition that is restored here and unknown elsewhere has no answer, and says so."""
    tables = parts()
    tables[2].role = Role.RESTORING
    for remote in (None, Others({}, silent=frozenset({2}))):
        answers = await lookups(tables, remote).lookup(KEYS, time.monotonic() + 60)
        assert [n for n, value in enumerate(answers.values) if value is None] == [KEYS.index(key) for key in of(2)]
        assert answers.partitions[2].role in ("restoring", "unanswered")


async def test_nothing_is_answered_before_the_worker_knows_its_partitions() -> None:
    """While the worker starts every key is without an answer."""
    tables = TableLookups(LocalTables(lambda _: None, lambda: 0, lambda: "", "v1"))
    assert (await tables.lookup(KEYS[:3], 0.0)).values == [None] * 3
    assert tables.unready()


@pytest.mark.parametrize("role", list(Role))
async def test_ready_once_a_partition_can_answer(role: Role) -> None:
    """Partitions that are being restored do not make it ready; close reaches the connections to others."""
    remote = Others({})
    tables = lookups(parts(role), remote)
    assert tables.unready() == ("nobody else" if role is Role.RESTORING else None)
    await tables.close()
    assert remote.closed


class Slow(Part):
    """A partition whose reads take time, as those of keys that are in no cache do."""

    def answer(self, keys: Sequence[bytes]) -> list[bytes | None]:
        time.sleep(len(keys) * 1e-5)
        return super().answer(keys)


async def test_many_keys_are_read_slice_by_slice_and_what_goes_meanwhile_is_asked_elsewhere() -> None:
    """The loop goes on between slices; a partition that this worker loses there is not read any more."""
    many = [number.to_bytes(16, "little") for number in range(4_096)]
    held = dict.fromkeys(many, b"held")
    here = {number: Slow(Role.ACTIVE, held) for number in range(COUNT)}
    remote = Others(dict.fromkeys(many, b"there"))
    asked = asyncio.create_task(lookups(dict(here), remote).lookup(many, 0.0))
    while not here[0].read:
        await asyncio.sleep(0)
    assert sum(len(part.read) for part in here.values()) < len(many) / 2
    here[0].role = Role.RESTORING
    answers = await asked
    assert answers.values == [b"there" if key in set(remote.asked) else b"held" for key in many]
    assert {partition_of(key, COUNT) for key in remote.asked} == {0}
    assert answers.partitions[0] == Seen("active", "other", 3, 0)
    assert len(here[0].read) + len(remote.asked) == sum(partition_of(key, COUNT) == 0 for key in many)
