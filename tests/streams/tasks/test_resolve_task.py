"""Tests of the resolve agent's task: messages that are much work give way to other pods, and nothing is lost by it."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.model import topics
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.streams.index.blocks_record import decode_blocks
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import PartitionState
from kvatlas.streams.tasks.output import Output
from kvatlas.streams.tasks.pods import PodPublisher
from kvatlas.streams.tasks.resolve_task import ResolveTask
from kvatlas.streams.tasks.sessions import SessionPublisher
from kvatlas.streams.tasks.task import TaskLimits
from kvatlas.streams.tasks.task_set import TaskSet

PARTITIONS = 4
Record = Any


class Producer:
    """Notes when the block updates of a pod's message arrive, and every dead letter."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], float] = {}
        self.order: dict[tuple[int, int], list[int]] = {}
        self.updates: dict[int, list[tuple[bytes, int]]] = {}
        self.dead: list[tuple[bytes, str]] = []

    async def send(self, topic: str, value: bytes | None, **more: Any) -> asyncio.Future[Any]:
        if topic == "blocks":
            self._blocks(more["partition"], value or b"")
        elif topic == "dlq":
            reason = next(found for name, found in more["headers"] if name == topics.H_REASON)
            self.dead.append((more["key"], reason.decode()))
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def _blocks(self, partition: int, value: bytes) -> None:
        record = decode_blocks(value)
        at = 0
        for run in record.runs:
            self.order.setdefault((partition, run.pod_ref), []).append(run.last_sequence)
            for sequence in range(run.first_sequence, run.last_sequence + 1):
                self.seen.setdefault((run.pod_ref, sequence), time.process_time())
            for number in range(at, at + run.updates):
                key = record.keys[number * 16 : number * 16 + 16]
                self.updates.setdefault(run.pod_ref, []).append((key, record.ops[number]))
            at += run.updates


class Rig:
    """A partition of ``kv-events`` and its task, without Kafka; what is committed can be cut off at any time."""

    def __init__(self, path: Path) -> None:
        self.state = PartitionState(0, path, RocksBudget(1 << 20, 32 << 20), 8 << 20)
        self.producer = Producer()
        self.failed: list[BaseException] = []
        self.sure = True
        self.tasks = self.make()

    def make(self) -> TaskSet:
        output = Output(lambda: self.producer, ("blocks", PARTITIONS), ("dlq", 1), "events")
        pods = PodPublisher(lambda: self.producer, ("pods", 1), 3600.0)
        self.sessions = SessionPublisher(lambda: self.producer, ("decisions", 1), worker="w", clock=lambda: 7)
        return TaskSet(
            "resolve",
            self,
            TaskLimits(256, 8_192, 2_048, 0.02),
            make_task=lambda parts: ResolveTask(
                parts,
                Resolver(ResolveOptions(), PARTITIONS, lambda: 7),
                output=output,
                pods=pods,
                sessions=self.sessions,
            ),
            on_failed=self.failed.append,
        )

    def partition(self, number: int) -> PartitionState | None:
        assert number == 0
        return self.state

    def rewind(self, number: int, offset: int) -> None:
        raise AssertionError((number, offset))

    def committed(self, number: int, offset: int) -> None:
        assert (number, offset) == (0, self.state.meta.source_offset)

    async def commit(self, state: PartitionState, changes: ChangeSet) -> None:
        await asyncio.sleep(0.001)
        assert changes.source_offset >= state.meta.source_offset
        state.write(changes.writes, changes.source_offset, Meta(changes.source_offset, changes.receive_ns))
        state.overlay.committed(changes)

    async def idle(self, end: int) -> None:
        """Wait until everything before an offset is committed."""
        async with asyncio.timeout(120):
            while self.tasks.waiting(0) != end:
                await asyncio.sleep(0.005)


@pytest.fixture
async def make_rig(tmp_path: Path) -> AsyncIterator[Callable[[], Rig]]:
    """Make rigs, each with a state of its own."""
    rigs: list[Rig] = []

    def make_one() -> Rig:
        rigs.append(Rig(tmp_path / f"{len(rigs)}.db"))
        return rigs[-1]

    yield make_one
    for rig in rigs:
        await rig.tasks.stop(60)
        assert rig.failed == []
        rig.state.close()


def record(offset: int, pod: str, sequence: int, events: Sequence[Any]) -> Record:
    fields = {"sequence": str(sequence), "incarnation": "1", "model": "demo"}
    return SimpleNamespace(
        offset=offset,
        partition=0,
        key=pod.encode(),
        value=msgspec.msgpack.encode((1000.5, events, None)),
        headers=[(name, value.encode()) for name, value in fields.items()],
    )


def millions_of_nothing(make: Any) -> list[list[Any]]:
    return [[None] * 6_000_000]


def many_dead(make: Any) -> list[list[Any]]:
    return [[None] * 20_000] * 3


def removals(make: Any) -> list[list[Any]]:
    return [[make.removed([(1 << 63) | (at * 100_000 + key) for key in range(100_000)])] for at in range(12)]


def small_removals(make: Any) -> list[list[Any]]:
    return [[make.removed([(1 << 63) | (at * 10_000 + key) for key in range(10_000)])] for at in range(100)]


def one_block_each(make: Any) -> list[list[Any]]:
    return [[make.stored([(1 << 63) | n], [n] * 16, 16) for n in range(10_000)] for _ in range(2)]


def one_block_of_many_keys(make: Any) -> list[list[Any]]:
    return [[make.stored([(1 << 63) | n], [1] * 16, 16, lookahead_token_ids=[n]) for n in range(8_000)]]


def one_parent_of_many(make: Any) -> list[list[Any]]:
    half = make.stored([1 << 62], [1] * 8, 8)
    return [[half, *(make.stored([(1 << 63) | n], [n] * 8, 8, 1 << 62) for n in range(8_000))]]


@pytest.mark.parametrize(
    "poison",
    [
        millions_of_nothing,
        many_dead,
        removals,
        small_removals,
        one_block_each,
        one_block_of_many_keys,
        one_parent_of_many,
    ],
)
async def test_other_pods_stay_fresh_beside_a_message_that_is_much_work(
    make_rig: Callable[[], Rig], make: Any, poison: Callable[[Any], list[list[Any]]]
) -> None:
    """Their updates are out within a second of this process's work, and a message leaves a few dead letters at most."""
    rig = make_rig()
    bad = [record(at, "bad", at, events) for at, events in enumerate(poison(make))]
    began = time.monotonic()
    await rig.tasks.offer({0: bad})
    offset, sent = len(bad), {}
    while time.monotonic() - began < 1.5:
        for pod in ("good", "fine"):
            sequence = offset  # rises, which is all that counts
            message = record(offset, pod, sequence, [make.stored([(1 << 63) | offset], [offset] * 16, 16)])
            sent[pod_ref(pod), sequence] = time.process_time()
            await rig.tasks.offer({0: [message]})
            offset += 1
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        while not sent.keys() <= rig.producer.seen.keys():
            await asyncio.sleep(0.01)
    late = sorted(rig.producer.seen[name] - when for name, when in sent.items())
    assert statistics.quantiles(late, n=100)[98] < 1.0
    assert len(rig.producer.dead) <= 9 * len(bad)


#: Each key has one parent, the key of half its number, as engines' keys are hashes of a whole prefix.
FIRST, KEYS = 4, 120
SIZES = {"a": 16, "b": 8, "c": 16}


def path_to(key: int) -> list[int]:
    return [*(path_to(key // 2) if key // 2 >= FIRST else []), key]


def stretch(make: Any, chance: random.Random, size: int) -> Any:
    """Return a store of a stretch of a prompt, whose parent may be unknown."""
    path = path_to(chance.randrange(FIRST, KEYS)) + list(range(1_000, 1_000 + chance.choice((0, 0, 25))))
    begin = chance.choice((0, 0, chance.randrange(len(path))))
    keys = path[begin : chance.randrange(begin + 1, len(path) + 1)]
    parent = (1 << 63) | path[begin - 1] if begin else None
    return make.stored([(1 << 63) | key for key in keys], [key for key in keys for _ in range(size)], size, parent)


def traffic(make: Any, chance: random.Random, messages: int) -> list[Record]:
    """Return messages of a few pods: prompts in pieces, reports, removals, clears and nonsense, small and large."""
    sequences = dict.fromkeys(SIZES, 0)
    made = []
    for offset in range(messages):
        pod = chance.choice(sorted(sequences))
        events: list[Any] = []
        for _ in range(chance.choice((1, 2, 12))):
            kind = chance.randrange(20)
            if kind < 12:
                events.append(stretch(make, chance, SIZES[pod]))
            elif kind < 19:
                gone = chance.sample(range(FIRST, KEYS), chance.choice((1, 3, 20)))
                events.append(make.removed([(1 << 63) | key for key in gone]))
            else:
                events.append(chance.choice((None, make.cleared)))
        made.append(record(offset, pod, sequences[pod], events))
        sequences[pod] += 1
    return made


def plainly(records: Sequence[Record]) -> tuple[dict[bytes, bytes], dict[int, list[tuple[bytes, int]]]]:
    """Return the table and each pod's updates when messages are resolved one by one, each in one piece."""
    resolver, view, producer = Resolver(ResolveOptions(), PARTITIONS, lambda: 7), DictView(), Producer()
    for found in records:
        effects = resolver.effects()
        message = parse_message(found.key, found.value, found.headers, 0, found.offset)
        with pytest.MonkeyPatch.context() as whole:
            for module in ("slice", "resolver"):
                whole.setattr(f"kvatlas.streams.resolve.{module}.PART_BLOCKS", 1 << 40)
            resolver.apply(view, message, effects)
        for partition, values in effects.encode().items():
            for value in values:
                producer._blocks(partition, value)
    return view.values, producer.updates


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make nearly every message one that is much work."""
    for name, value in {
        "resolve.slice.PART_BLOCKS": 7,
        "resolve.slice._EVENT_BLOCKS": 1,
        "resolve.resolver.PART_BLOCKS": 7,
        "tasks.resolve_task.PART_BLOCKS": 7,
        "tasks.resolve_task.POD_BLOCKS": 30,
        "tasks.resolve_task._TURN_BLOCKS": 60,
        "tasks.resolve_task.LARGE_BYTES": 400,
        "tasks.resolve_task.MOST_LANES": 2,
        "tasks.resolve_task.MOST_LARGE": 1,
        "tasks.resolve_task.MOST_BYTES": 20_000,
    }.items():
        monkeypatch.setattr(f"kvatlas.streams.{name}", value)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("seed", range(8))
async def test_parts_and_lanes_come_to_the_same_as_one_message_after_the_other(
    make_rig: Callable[[], Rig], make: Any, seed: int
) -> None:
    """The table is the same, and so is each pod's order of messages."""
    records = traffic(make, random.Random(seed), 80)
    table, updates = plainly(records)
    rig = make_rig()
    for at in range(0, len(records), 9):
        await rig.tasks.offer({0: records[at : at + 9]})
        await asyncio.sleep(0)
    await rig.idle(len(records))
    assert dict(rig.state.items()) == table
    assert {ref: sorted(found) for ref, found in rig.producer.updates.items()} == {
        ref: sorted(found) for ref, found in updates.items()
    }
    assert all(order == sorted(order) for order in rig.producer.order.values())


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("seed", range(8))
async def test_what_is_cut_off_at_any_time_is_made_good_from_the_committed_offset(
    make_rig: Callable[[], Rig], make: Any, seed: int
) -> None:
    """A commit holds each message whole or not at all; the next owner begins behind it and comes to the same."""
    chance = random.Random(seed)
    records = traffic(make, chance, 80)
    table, _ = plainly(records)
    rig = make_rig()
    while rig.state.meta.source_offset < len(records) - 1:
        begin = rig.state.meta.source_offset + 1
        await rig.tasks.offer({0: records[begin:]})
        for _ in range(chance.randrange(400)):
            await asyncio.sleep(0)
        await asyncio.sleep(chance.choice((0, 0.002, 0.03)))
        await rig.tasks.stop(0.0 if chance.random() < 0.7 else 60)
        assert rig.state.overlay.values == {}
        rig.tasks = rig.make()
    assert dict(rig.state.items()) == table
