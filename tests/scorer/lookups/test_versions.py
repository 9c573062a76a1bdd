"""Index versions at a scorer: which one answers, and when it moves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kvatlas.bridge.model import records
from kvatlas.bridge.model.block_key import partition_of
from kvatlas.bridge.model.records import IndexCatalog, IndexVersion, WorkerRecord, encode
from kvatlas.bridge.model.workers import Layout, WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.lookups.versions import VersionReader, Versions
from kvatlas.scorer.scoring.lookup import ACTIVE, Answers, Seen


class Answering:
    """Lookups that answer in the partitions of the test."""

    def __init__(self) -> None:
        self.silent: set[int] = set()

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        """Answer, but for silent partitions."""
        numbers = [partition_of(key, 2) for key in keys]
        values = [None if number in self.silent else b"" for number in numbers]
        return Answers(values, {number: Seen(ACTIVE, "w", 0, 0) for number in numbers})

    def unready(self) -> str | None:
        """Return None."""
        return None

    async def close(self) -> None:
        """Do nothing."""


class Reader(VersionReader):
    """A reader whose records come from the test."""

    def __init__(self, name: str) -> None:
        self.answering = Answering()
        super().__init__(
            name, KafkaSettings(), client_id="test", clock_ns=lambda: 0, lookups=lambda _workers: self.answering
        )
        self.stopped = False

    def start(self) -> None:
        """Take everything as read."""

    async def wait(self, timeout_seconds: float) -> None:
        """Do nothing: there is nothing to wait for."""

    def unread(self) -> str | None:
        """Return None: all is read."""
        return None

    async def stop(self) -> None:
        """Note it."""
        self.stopped = True

    def announce(self, partitions: Sequence[int], count: int = 2) -> None:
        """A worker of this version says what it answers for."""
        record = WorkerRecord(
            worker="w",
            endpoint="127.0.0.1:1",
            partitions=list(partitions),
            partition_count=count,
            expires_ns=1,
            index_version=self.name,
        )
        self.workers.apply(b"w", encode(record))

    def catalog(self, active: str, *names: str, at: int = 1) -> None:
        """The catalog changes."""
        versions = {name: IndexVersion() for name in names}
        catalog = IndexCatalog(active=active, versions=versions, updated_ns=at)
        self.workers.apply(records.CATALOG_KEY, encode(catalog))


def made(pinned: str = "") -> tuple[Versions, list[str]]:
    """Versions over readers of the test, and the names that were used in turn."""
    used: list[str] = []
    return Versions(Reader, pinned, lambda reader: used.append(reader.name)), used


def reader(versions: Versions, name: str) -> Reader:
    """The reader of a version."""
    found = versions.readers[name]
    assert isinstance(found, Reader)
    return found


async def test_moves_only_when_every_partition_is_covered() -> None:
    """The old version answers until workers of the new one own all partitions; then the new one does."""
    versions, used = made()
    base = reader(versions, "base")
    base.announce([0, 1])
    base.catalog("v2", "base", "v2")
    await versions.settle()
    assert versions.used is base
    reader(versions, "v2").announce([0])
    await versions.settle()
    assert versions.used is base
    reader(versions, "v2").announce([0, 1])
    await versions.settle()
    assert (versions.used.name, used) == ("v2", ["v2"])


async def test_moves_only_when_every_partition_has_answered() -> None:
    """A partition that somebody owns and nobody answers for holds the move up."""
    versions, used = made()
    reader(versions, "base").catalog("v2", "base", "v2")
    await versions.settle()
    other = reader(versions, "v2")
    other.announce([0, 1])
    other.answering.silent = {1}
    await versions.settle()
    assert used == []
    other.answering.silent = set()
    await versions.settle()
    assert used == ["v2"]


async def test_moves_back_and_forgets_what_was_dropped() -> None:
    """Naming the old version again moves back; a version that left the catalog is no longer read."""
    versions, used = made()
    base = reader(versions, "base")
    base.announce([0, 1])
    base.catalog("v2", "base", "v2")
    await versions.settle()
    other = reader(versions, "v2")
    other.announce([0, 1])
    await versions.settle()
    other.catalog("base", "base", "v2", at=2)
    await versions.settle()
    assert used == ["v2", "base"]
    base.catalog("base", "base", at=3)
    await versions.settle()
    assert list(versions.readers) == ["base"]
    assert other.stopped


async def test_an_older_catalog_of_another_reader_moves_nothing() -> None:
    """The newest catalog that any reader has seen counts, so a reader that lags cannot move the scorer back."""
    versions, used = made()
    reader(versions, "base").catalog("v2", "base", "v2", at=2)
    await versions.settle()
    reader(versions, "v2").announce([0, 1])
    reader(versions, "v2").catalog("base", "base", "v2", at=1)
    await versions.settle()
    await versions.settle()
    assert used == ["v2"]


async def test_a_new_scorer_begins_with_the_active_version() -> None:
    """A scorer that starts after a switch answers from the active version, also before all partitions are owned."""
    versions, used = made()
    reader(versions, "base").catalog("v2", "base", "v2")
    await versions.start(1.0)
    assert (versions.used.name, used) == ("v2", ["v2"])


async def test_a_pinned_scorer_stays() -> None:
    """A scorer with an index version of its own does not follow the catalog."""
    versions, used = made("v2")
    reader(versions, "v2").catalog("base", "base", "v2")
    await versions.start(1.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.gather(versions.run(), asyncio.Event().wait()), 0.05)
    assert (versions.used.name, used) == ("v2", [])


def test_workers_of_other_versions_are_passed_over() -> None:
    """A worker of another index version is neither asked nor refused, and one that changes its version leaves."""
    table = WorkerDirectory(lambda: 0, "v2")
    record = WorkerRecord(worker="w", endpoint="e", partitions=[0], partition_count=1, expires_ns=1, index_version="v2")
    table.apply(b"w", encode(record))
    assert table.layout == Layout(1, 16)
    assert table.covered
    table.apply(b"x", encode(WorkerRecord(worker="x", endpoint="f", partition_count=9, expires_ns=1)))
    assert (list(table.records), table.refused, table.layout) == (["w"], {}, Layout(1, 16))
    table.apply(b"w", encode(WorkerRecord(worker="w", endpoint="e", partition_count=9, expires_ns=1)))
    assert not table.records


def test_pods_of_other_versions_are_passed_over() -> None:
    """Each index version has records of its own for what a pod's events mean; the bridge's count for all."""
    table = PodTable(index_version="v2")
    for writer, epoch in (("bridge", 1), ("streams", 7), ("streams.v2", 3)):
        kind = writer.partition(".")[0]
        value = encode(records.PodRecord(pod="a", writer=kind, epoch=epoch, valid_from=epoch))
        table.apply(f"{writer}|a".encode(), value)
    assert (table.merged["a"].epoch, table.directory.rejected) == (3, 0)


async def test_watchers_hear_of_both_tables_after_a_move() -> None:
    """Who watches the pods goes on hearing of changes when another version's table takes over, and can leave."""
    old, new = PodTable(), PodTable(index_version="v2")
    async with old.watch() as queue:
        new.adopt_watchers(old)
        new.apply(b"bridge|a", encode(records.PodRecord(pod="a", writer="bridge")))
        assert await asyncio.wait_for(queue.get(), 60) == "a"
    new.apply(b"bridge|b", encode(records.PodRecord(pod="b", writer="bridge")))
    assert len(queue) == 0
