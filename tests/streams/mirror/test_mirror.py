"""The mirror against real servers: what it writes, who may write, and what it does when somebody was away."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvatlas.bridge.kafka.member import Assignment
from kvatlas.bridge.model import block_key, epochs, pod_ids, records
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams.index.holders import HOLDER_BYTES
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition, Names, position_of
from kvatlas.streams.mirror.mirror import Mirror
from kvatlas.streams.mirror.redis_link import connect
from kvatlas.streams.mirror.server import MirrorServer
from tests.integration.redis_support import RedisServer
from tests.streams.mirror.rig import NOW_NS, Changelog, Member

PARTITIONS = 2
NAMES = Names("test")
LAYOUT = MirrorLayout(partitions=PARTITIONS, block_size_tokens=16, index_version="base")
_numbers = itertools.count()


def value(text: str) -> bytes:
    """An entry's value: holders of the right size."""
    return text.encode().ljust(HOLDER_BYTES, b".")


def keys_of(partition: int, count: int) -> list[bytes]:
    """Block keys that belong to a partition."""
    made: list[bytes] = []
    while len(made) < count:
        key = block_key.chain(b"\0" * 16, next(_numbers).to_bytes(4, "little"))
        if block_key.partition_of(key, PARTITIONS) == partition:
            made.append(key)
    return made


class Worker:
    """A mirror with its member of the group and its pods."""

    def __init__(self, url: str, logs: dict[int, Changelog], name: str, generation: int, **options: Any) -> None:
        self.member = Member(logs, generation)
        self.pods = PodDirectory()
        self.client = connect(url, timeout_seconds=60.0, retries=0)
        known = asyncio.Event()
        known.set()
        self.mirror = Mirror(
            MirrorServer(self.client, "test"),
            self.member,  # type: ignore[arg-type]
            pods=self.pods,
            pods_known=known,
            name=name,
            layout=options.pop("layout", LAYOUT),
            max_age_seconds=options.pop("max_age_seconds", 3600.0),
        )

    def put(self, pod: PodRecord | None, name: str) -> None:
        """Have ``kv-pods`` say something of a pod."""
        key = pod_ids.pod_key(pod_ids.WRITER_BRIDGE, name)
        self.pods.apply(key, None if pod is None else records.encode(pod))

    def reassign(self) -> None:
        """Have the group share out again."""
        number, generation, partitions = self.member.given
        self.member.given = Assignment(number + 1, generation + 1, partitions)

    async def turns(self, count: int = 3) -> None:
        """Claim, send, and see that nothing is left."""
        for _ in range(count):
            await self.mirror.turn()


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
    """An empty server, two changelogs, and mirrors that are closed in the end."""
    logs = {number: Changelog() for number in range(PARTITIONS)}
    workers: list[Worker] = []

    def worker(name: str = "a", generation: int = 1, **options: Any) -> Worker:
        workers.append(Worker(server.url, logs, name, generation, **options))
        return workers[-1]

    made = SimpleNamespace(logs=logs, worker=worker, server=server)
    await worker().client.flushall()
    yield made
    for each in workers:
        await each.client.aclose()


def everything(rig: SimpleNamespace) -> dict[bytes, bytes]:
    """What the tables have."""
    return {key: data for log in rig.logs.values() for key, data in log.entries().items()}


async def test_commits_arrive_and_positions_say_so(rig: SimpleNamespace) -> None:
    """Entries are set and removed; the position is the changelog's; what is no entry stays out."""
    worker, log = rig.worker(), rig.logs[0]
    one, two = keys_of(0, 2)
    log.commit({one: value("h1"), two: value("h2"), b"\0pod12345678": b"x"})
    log.put(keys_of(0, 1)[0], b"no holders")
    log.put(None, b"x")
    await worker.turns()
    assert await mirrored(worker) == {one: value("h1"), two: value("h2")}
    log.commit({one: value("h3"), two: None})
    await worker.turns(1)
    assert await mirrored(worker) == {one: value("h3")}
    position = position_of(await worker.client.get(NAMES.position(0)))
    assert position == MirrorPosition(log.end - 1, 19, 7, NOW_NS)


async def test_what_replaced_writers_wrote_is_dropped(rig: SimpleNamespace) -> None:
    """A writer of a lower epoch changes nothing, nor does its position; also right after a start."""
    worker, log, (key, other) = rig.worker(), rig.logs[0], keys_of(0, 2)
    log.commit({key: value("old")})
    late = log.meta
    log.meta = log.meta._replace(epoch=2, owner=2)
    log.commit({key: value("new")})
    await worker.turns()
    log.commit({key: value("ghost"), other: value("ghost")}, late)
    await worker.turns(1)
    fresh = rig.worker("b", 2)
    await fresh.turns()
    assert await mirrored(fresh) == {key: value("new")}
    log.commit({other: value("mine")})
    await fresh.turns(1)
    assert await mirrored(fresh) == {key: value("new"), other: value("mine")}


async def test_a_partition_that_moved_goes_on_and_its_first_writer_can_write_no_more(rig: SimpleNamespace) -> None:
    """The later generation goes on behind the position; the earlier one's values never come back."""
    first, keys = rig.worker("a", 1), keys_of(0, 3)
    rig.logs[0].commit(dict.fromkeys(keys, value("old")))
    await first.turns()
    # It stands still here: what it is given next is what came then, and it still holds itself for the owner.
    frozen = Changelog()
    frozen.records, frozen.end, frozen.meta = list(rig.logs[0].records), rig.logs[0].end, rig.logs[0].meta
    rig.logs[0].commit({keys[2]: value("last")})
    second = rig.worker("b", 2)
    await second.turns()
    rig.logs[0].commit({keys[0]: value("new")})
    await second.turns(1)
    first.member.logs = {**rig.logs, 0: frozen}
    frozen.commit({keys[0]: value("ghost"), keys[1]: value("ghost")})
    await first.turns()
    assert await mirrored(second) == {keys[0]: value("new"), keys[1]: value("old"), keys[2]: value("last")}


async def test_a_server_that_lost_everything_is_filled_again(rig: SimpleNamespace) -> None:
    """Also when nothing is committed meanwhile, and for more entries than one slice has."""
    worker = rig.worker()
    for number in range(PARTITIONS):
        rig.logs[number].commit(dict.fromkeys(keys_of(number, 2500), value("h")))
    await worker.turns()
    await worker.client.flushall()
    worker.mirror._laid_out = False
    for part in worker.mirror._parts.values():
        part.claimed_at -= 60  # the next look at the server is due
    await worker.turns()
    assert await mirrored(worker) == everything(rig)
    assert len(everything(rig)) == 5000


@pytest.mark.parametrize("how", ["tells", "too old", "retention", "made anew"])
async def test_a_server_that_went_back_catches_up(rig: SimpleNamespace, how: str) -> None:
    """From the changelog where it can tell, else by a copy that also removes what the table has not."""
    worker, keys, log = rig.worker(max_age_seconds=-1e18 if how == "too old" else 3600.0), keys_of(0, 20), rig.logs[0]
    log.commit(dict.fromkeys(keys[:10], value("h")))
    await worker.turns()
    back = await worker.client.get(NAMES.position(0))
    log.commit({keys[0]: None, keys[10]: value("h")})
    await worker.turns()
    await worker.client.set(NAMES.position(0), back)  # as a server restarted from an older file would be
    await worker.client.set(NAMES.blocks + keys[0], value("h"))
    await worker.client.delete(NAMES.blocks + keys[10])
    if how in ("too old", "retention"):
        log.compact()
        log.first = log.records[0].offset + 15 if how == "retention" else 0
        log.records = [record for record in log.records if record.offset >= log.first]
    if how == "made anew":
        log.records, log.end = [], 0
        log.commit({keys[4]: value("other")})
    else:
        log.commit({keys[1]: value("x")})
    copies = metric("copies")
    await worker.turns(4)
    assert await mirrored(worker) == everything(rig)
    assert (metric("copies") > copies) == (how != "tells")


def metric(name: str) -> float:
    """Value of one of the mirror's counters."""
    from kvatlas.streams import metrics  # noqa: PLC0415

    return float(getattr(metrics, f"MIRROR_{name.upper()}")._value.get())


async def test_a_copy_ends_where_compaction_left_nothing(rig: SimpleNamespace) -> None:
    """A partition without a record, and one whose last record is gone, get their positions."""
    worker, log, (key,) = rig.worker(), rig.logs[0], keys_of(0, 1)
    log.commit({key: value("h")})
    log.end += 5
    await worker.turns()
    assert await mirrored(worker) == {key: value("h")}
    assert position_of(await worker.client.get(NAMES.position(0)))[0] == log.end - 1  # type: ignore[index]
    assert position_of(await worker.client.get(NAMES.position(1)))[0] == -1  # type: ignore[index]
    rig.logs[1].commit({(other := keys_of(1, 1)[0]): value("i")})
    await worker.turns(1)
    assert await mirrored(worker) == {key: value("h"), other: value("i")}


async def test_errors_of_kafka_and_of_the_server_are_tried_again(rig: SimpleNamespace) -> None:
    """The group is joined anew after Kafka's; what was committed meanwhile arrives."""
    worker, (one, two) = rig.worker(), keys_of(0, 2)
    rig.logs[0].commit({one: value("1")})
    task = asyncio.create_task(worker.mirror.run())

    async def until(wanted: dict[bytes, bytes]) -> None:
        reader = rig.worker("reader")
        async with asyncio.timeout(90):
            while await mirrored(reader) != wanted:
                await asyncio.sleep(0.02)

    await until({one: value("1")})
    worker.member.fails = True
    async with asyncio.timeout(90):
        while not worker.member.left:
            await asyncio.sleep(0.02)
    rig.logs[0].commit({two: value("2")})
    worker.member.fails = False
    await until({one: value("1"), two: value("2")})
    await worker.client.connection_pool.disconnect()
    rig.logs[0].commit({one: None})
    await until({two: value("2")})
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


WHAT_HAPPENS = ("commit", "commit", "commit", "turn", "turn", "move", "reassign", "lose", "compact", "other")


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_the_mirror_becomes_the_table(rig: SimpleNamespace, seed: int) -> None:
    """Commits, compaction, moves, servers that go back or lose all, replaced writers, in any order."""
    chance = random.Random(seed)
    keys = {number: keys_of(number, 40) for number in range(PARTITIONS)}
    workers = [rig.worker("a", 1)]
    for step in range(60):
        number = chance.randrange(PARTITIONS)
        log, worker = rig.logs[number], workers[-1]
        match chance.choice(WHAT_HAPPENS):
            case "commit":
                some = chance.sample(keys[number], chance.randrange(1, 9))
                log.commit({key: None if chance.random() < 0.3 else value(f"{step}") for key in some})
            case "turn":
                await chance.choice(workers).turns(chance.randrange(1, 3))
            case "move":
                workers.append(rig.worker(f"w{step}", worker.member.given.generation + 1))
            case "reassign":
                worker.reassign()
            case "lose":
                await worker.client.flushall()
                for each in workers:
                    each.mirror._laid_out = False
            case "compact":
                await worker.turns(2)
                if worker.mirror._parts[number].held:
                    log.compact()
            case "other":
                log.meta = log.meta._replace(epoch=log.meta.epoch + 1, owner=step + 2)
    last = workers[-1]
    for part in last.mirror._parts.values():
        part.claimed_at -= 60
    await last.turns(4)
    assert await mirrored(last) == everything(rig)


async def test_pods_come_with_their_epochs_and_leave(rig: SimpleNamespace) -> None:
    """Records are there by pod, follow changes, and disappear with the pod."""
    worker = rig.worker()
    name = next(f"pod-{n}" for n in range(99) if pod_ids.pod_partition(f"pod-{n}", PARTITIONS) == 1)
    worker.put(PodRecord(pod=name, writer="bridge", epoch=epochs.epoch_of(5)), name)
    await worker.turns(1)

    async def there() -> dict[bytes, bytes]:
        return await worker.client.hgetall(NAMES.pods(1))

    assert records.decode(PodRecord, (await there())[name.encode()]).epoch == epochs.epoch_of(5)
    worker.put(PodRecord(pod=name, writer="bridge", epoch=epochs.epoch_of(6)), name)
    await worker.turns(1)
    assert records.decode(PodRecord, (await there())[name.encode()]).epoch == epochs.epoch_of(6)
    worker.put(None, name)
    await worker.turns(1)
    assert await there() == {}


async def test_another_layout_waits_until_nobody_writes_under_the_first(rig: SimpleNamespace) -> None:
    """Mirrors of another index version leave a kept mirror alone, and take it over once its claims have ended."""
    worker, (key,) = rig.worker(), keys_of(0, 1)
    rig.logs[0].commit({key: value("h")})
    await worker.turns()
    other = rig.worker("b", 9, layout=MirrorLayout(partitions=PARTITIONS, block_size_tokens=32, index_version="v2"))
    other.member.logs = {number: Changelog() for number in range(PARTITIONS)}
    await other.turns()
    assert await mirrored(worker) == {key: value("h")}
    for number in range(PARTITIONS):
        await worker.client.delete(NAMES.claim(number))
    await other.turns()
    assert await mirrored(worker) == {}


async def test_a_mirror_needs_its_prefix_alone(rig: SimpleNamespace) -> None:
    """A user with all commands on the prefix's keys, and no others, is enough, also for a copy."""
    admin, (key,) = rig.worker().client, keys_of(0, 1)
    await admin.acl_setuser("writer", enabled=True, passwords=["+s3cret"], keys=["test:*"], categories=["+@all"])
    try:
        worker = Worker(f"redis://writer:s3cret@127.0.0.1:{rig.server.port}/0", rig.logs, "w", 1)
        rig.logs[0].commit({key: value("h")})
        await worker.turns()
        assert await mirrored(worker) == {key: value("h")}
        await worker.client.aclose()
    finally:
        await admin.acl_deluser("writer")
