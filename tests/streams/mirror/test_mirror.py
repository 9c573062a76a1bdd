"""The mirror against real servers: what it writes, who may write, and what it does when somebody was away."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kvatlas.bridge.model import block_key, epochs, pod_ids, records
from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition, Names, position_of
from kvatlas.streams.mirror.mirror import Mirror
from kvatlas.streams.mirror.part import MirrorSource
from kvatlas.streams.mirror.redis_link import connect
from kvatlas.streams.mirror.server import MirrorServer
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.partition import Role
from tests.integration.redis_support import RedisServer

PARTITIONS = 2
NAMES = Names("test")
LAYOUT = MirrorLayout(partitions=PARTITIONS, block_size_tokens=16, index_version="base")
_numbers = itertools.count()


def keys_of(partition: int, count: int) -> list[bytes]:
    """Block keys that belong to a partition."""
    made: list[bytes] = []
    while len(made) < count:
        key = block_key.chain(b"\0" * 16, next(_numbers).to_bytes(4, "little"))
        if block_key.partition_of(key, PARTITIONS) == partition:
            made.append(key)
    return made


class Table:
    """One partition of a table and its changelog, in memory, shared by the workers of a test."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.changes: list[bytes] = []


class State:
    """What the mirror reads of a partition's local state."""

    def __init__(self, table: Table) -> None:
        self.table, self.role = table, Role.ACTIVE
        self.offset = len(table.changes) - 1

    @property
    def changelog_offset(self) -> int | None:
        return self.offset if self.offset >= 0 else None

    @property
    def meta(self) -> Meta:
        return Meta(self.offset * 10, 7, 8)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.table.values.get(key) for key in keys]

    fetch = get_many

    def items(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(item for item in self.table.values.items() if item[0] >= start))


class Worker:
    """A worker with a mirror: partitions of tables, a generation, pods."""

    def __init__(self, url: str, tables: dict[int, Table], name: str, generation: int, **options: Any) -> None:
        self.states = {number: State(table) for number, table in tables.items()}
        self.generation = generation
        self.pods: dict[str, PodRecord] = {}
        self.asked: list[MirrorPosition] = []
        self.tells = True
        self.client = connect(url, retries=0)
        source = MirrorSource(
            states=lambda: self.states,  # type: ignore[arg-type, return-value]
            generation=lambda: self.generation,
            pod=self.pods.get,
            pods=self.pods.values,
            pods_known=lambda: True,
            changed=self.changed,
        )
        layout = options.pop("layout", LAYOUT)
        self.mirror = Mirror(MirrorServer(self.client, "test"), worker=name, layout=layout, source=source, **options)

    async def changed(self, partition: int, after: MirrorPosition, through: int) -> list[bytes] | None:
        self.asked.append(after)
        changes = self.states[partition].table.changes
        return changes[after.changelog_offset + 1 : through + 1] if self.tells else None

    def commit(self, partition: int, writes: dict[bytes, bytes | None]) -> None:
        """Commit a flush as the table does."""
        state = self.states[partition]
        for key, value in writes.items():
            state.table.changes.append(key)
            if value is None:
                state.table.values.pop(key, None)
            else:
                state.table.values[key] = value
        before, state.offset = state.changelog_offset, len(state.table.changes) - 1
        self.mirror.note(partition, writes, before, state.offset)


async def mirrored(worker: Worker) -> dict[bytes, bytes]:
    """Return all entries of the mirror."""
    skip = len(NAMES.blocks)
    names = [name async for name in worker.client.scan_iter(match=NAMES.blocks + b"*")]
    return {name[skip:]: await worker.client.get(name) for name in names}


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server of each kind for the module."""
    made = RedisServer(tmp_path_factory.mktemp(request.param), request.param, durable=False)
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def rig(server: RedisServer) -> AsyncIterator[SimpleNamespace]:
    """An empty server, two tables, and workers that are closed in the end."""
    tables = {number: Table() for number in range(PARTITIONS)}
    workers: list[Worker] = []

    def worker(name: str = "a", generation: int = 1, **options: Any) -> Worker:
        workers.append(Worker(server.url, tables, name, generation, **options))
        return workers[-1]

    made = SimpleNamespace(tables=tables, worker=worker, server=server)
    await worker().client.flushall()
    yield made
    for each in workers:
        await each.client.aclose()


def everything(rig: SimpleNamespace) -> dict[bytes, bytes]:
    """What the tables have."""
    return {key: value for table in rig.tables.values() for key, value in table.values.items()}


async def test_commits_arrive_and_positions_say_so(rig: SimpleNamespace):
    """Entries are set and removed; the position is the table's; what is no block key stays out."""
    worker = rig.worker()
    one, two = keys_of(0, 2)
    worker.commit(0, {one: b"h1", two: b"h2", b"\0pod12345678": b"x"})
    await worker.mirror.turn()
    assert await mirrored(worker) == {one: b"h1", two: b"h2"}
    worker.commit(0, {one: b"h3", two: None})
    await worker.mirror.turn()
    assert await mirrored(worker) == {one: b"h3"}
    position = position_of(await worker.client.get(NAMES.position(0)))
    assert position == MirrorPosition(4, 40, 7, 8)


async def test_a_partition_that_moved_goes_on_and_its_first_writer_can_write_no_more(rig: SimpleNamespace):
    """The later generation takes over with what the changelog says; the earlier one's values never come back."""
    first, keys = rig.worker("a", 1), keys_of(0, 3)
    first.commit(0, dict.fromkeys(keys, b"old"))
    await first.mirror.turn()
    # It stands still here: its table keeps the old values, and it still holds itself for the owner.
    frozen = Table()
    frozen.values, frozen.changes = dict(rig.tables[0].values), list(rig.tables[0].changes)
    first.states[0].table = frozen
    rig.tables[0].changes.append(keys[2])  # committed by it, and not mirrored any more
    rig.tables[0].values[keys[2]] = b"last"
    second = rig.worker("b", 2)
    second.commit(0, {keys[0]: b"new"})
    await second.mirror.turn()
    assert len(second.asked) == 1
    assert await mirrored(second) == {keys[0]: b"new", keys[1]: b"old", keys[2]: b"last"}
    first.commit(0, {keys[0]: b"ghost", keys[1]: b"ghost"})
    await first.mirror.turn()
    await first.mirror.turn()
    assert await mirrored(second) == {keys[0]: b"new", keys[1]: b"old", keys[2]: b"last"}


async def test_a_server_that_lost_everything_is_filled_again(rig: SimpleNamespace):
    """Also when nothing is committed meanwhile, and for more entries than one slice has."""
    worker = rig.worker()
    for number in range(PARTITIONS):
        worker.commit(number, dict.fromkeys(keys_of(number, 2500), b"h"))
    await worker.mirror.turn()
    await worker.client.flushall()
    worker.mirror._laid_out = False
    for part in worker.mirror._parts.values():
        part.claimed_at -= 60  # the next look at the server is due
    await worker.mirror.turn()
    assert await mirrored(worker) == everything(rig)
    assert len(everything(rig)) == 5000


@pytest.mark.parametrize("tells", [True, False])
async def test_a_server_that_went_back_catches_up(rig: SimpleNamespace, tells: bool):
    """From the changelog where it can tell, else by a copy that also removes what the table has not."""
    worker, keys = rig.worker(), keys_of(0, 20)
    worker.tells = tells
    worker.commit(0, dict.fromkeys(keys[:10], b"h"))
    await worker.mirror.turn()
    back = await worker.client.get(NAMES.position(0))
    worker.commit(0, {keys[0]: None, keys[10]: b"h"})
    await worker.mirror.turn()
    await worker.client.set(NAMES.position(0), back)  # as a server restarted from an older file would be
    await worker.client.set(NAMES.blocks + keys[0], b"h")
    await worker.client.delete(NAMES.blocks + keys[10])
    worker.commit(0, {keys[1]: b"x"})
    for _ in range(3):
        await worker.mirror.turn()
    assert [at.changelog_offset for at in worker.asked] == [9]
    assert await mirrored(worker) == everything(rig)


async def test_too_many_changes_are_made_good_by_a_copy(rig: SimpleNamespace):
    """What waits is bounded; nothing is missing afterwards."""
    worker = rig.worker(pending_keys=100)
    await worker.mirror.turn()
    for part in range(5):
        worker.commit(part % 2, dict.fromkeys(keys_of(part % 2, 60), b"h"))
        assert worker.mirror._pending <= 100
    await worker.mirror.turn()
    assert await mirrored(worker) == everything(rig)


async def test_commits_during_a_copy_are_not_lost(rig: SimpleNamespace):
    """Entries written and removed behind the copy's back are right in the end."""
    seed, keys = rig.worker("a", 1), keys_of(0, 6000)
    seed.commit(0, dict.fromkeys(keys, b"h"))
    worker = rig.worker("b", 2)

    async def disturb() -> None:
        for number in range(0, 6000, 3):
            worker.commit(0, {keys[number]: None if number % 2 else b"new"})
            if number % 90 == 0:
                await asyncio.sleep(0)

    await asyncio.gather(worker.mirror.turn(), disturb())
    await worker.mirror.turn()
    assert await mirrored(worker) == everything(rig)


async def test_pods_come_with_their_epochs_and_leave(rig: SimpleNamespace):
    """Records are there by pod, follow changes, and disappear with the pod."""
    worker = rig.worker()
    name = next(f"pod-{n}" for n in range(99) if pod_ids.pod_partition(f"pod-{n}", PARTITIONS) == 1)
    worker.pods[name] = PodRecord(pod=name, writer="streams", epoch=epochs.epoch_of(5))
    await worker.mirror.turn()

    async def there() -> dict[bytes, bytes]:
        return await worker.client.hgetall(NAMES.pods(1))

    assert records.decode(PodRecord, (await there())[name.encode()]).epoch == epochs.epoch_of(5)
    worker.pods[name] = PodRecord(pod=name, writer="streams", epoch=epochs.epoch_of(6))
    worker.mirror.note_pod(name)
    await worker.mirror.turn()
    assert records.decode(PodRecord, (await there())[name.encode()]).epoch == epochs.epoch_of(6)
    del worker.pods[name]
    worker.mirror.note_pod(name)
    await worker.mirror.turn()
    assert await there() == {}


async def test_another_layout_waits_until_nobody_writes_under_the_first(rig: SimpleNamespace):
    """Workers of another index version leave a kept mirror alone, and take it over once its claims have ended."""
    worker, (key,) = rig.worker(), keys_of(0, 1)
    worker.commit(0, {key: b"h"})
    await worker.mirror.turn()
    other = rig.worker("b", 9, layout=MirrorLayout(partitions=PARTITIONS, block_size_tokens=32, index_version="v2"))
    rig.tables[0].values.clear()
    await other.mirror.turn()
    assert await mirrored(worker) == {key: b"h"}
    for number in range(PARTITIONS):
        await worker.client.delete(NAMES.claim(number))
    await other.mirror.turn()
    assert await mirrored(worker) == {}


async def test_a_worker_needs_its_prefix_alone(rig: SimpleNamespace):
    """A user with all commands on the prefix's keys, and no others, is enough, also for a copy."""
    admin, (key,) = rig.worker().client, keys_of(0, 1)
    await admin.acl_setuser("writer", enabled=True, passwords=["+s3cret"], keys=["test:*"], categories=["+@all"])
    try:
        worker = Worker(f"redis://writer:s3cret@127.0.0.1:{rig.server.port}/0", rig.tables, "w", 1)
        worker.commit(0, {key: b"h"})
        await worker.mirror.turn()
        assert await mirrored(worker) == {key: b"h"}
        await worker.client.aclose()
    finally:
        await admin.acl_deluser("writer")
