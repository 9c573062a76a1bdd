"""One suite for every backend: the same updates give the same answers, whatever holds them."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
from pathlib import Path

import msgpack
import pytest

from kvatlas.bridge.model import block_key, epochs, pod_ids
from kvatlas.bridge.model.events import Tier
from kvatlas.scorer.library.backends import Backend
from kvatlas.scorer.scoring.walk import Fleet, Weights, walk
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, BlocksRecord, Run, decode_blocks, encode_blocks
from kvatlas.streams.index.holders import add_holder, pack_holder, remove_holder
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.engine_blocks import decode_state, state_key
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver, pod_record

DATA = Path(__file__).parents[3] / "data" / "captures"
EPOCH = epochs.epoch_of(5)


def key(number: int) -> bytes:
    """A block key of its own for each number, spread like real ones."""
    return block_key.chain(b"\0" * 16, number.to_bytes(4, "little"))


def holder(pod: int, tier: Tier = Tier.GPU, group: int = 0, epoch: int = EPOCH) -> bytes:
    """A holder of a pod reference."""
    return pack_holder(pod, group, tier, 0, 0, epoch)


def record(pod: int, sequence: int, updates: list[tuple[int, bytes, bytes]], epoch: int = EPOCH) -> BlocksRecord:
    """One pod's updates (operation, key, holder) as a record."""
    return decode_blocks(
        encode_blocks(
            [Run(pod, epoch, sequence, sequence, len(updates))],
            b"".join(at for _, at, _ in updates),
            bytes(op for op, _, _ in updates),
            b"".join(held for _, _, held in updates),
            0,
        )
    )


async def test_what_was_added_is_found_and_what_was_removed_is_not(backend: Backend):
    """Two pods on one block are told apart; an unknown block has no holder."""
    await backend.apply(record(1, 0, [(OP_ADD, key(1), holder(1)), (OP_ADD, key(2), holder(1))]))
    await backend.apply(record(2, 0, [(OP_ADD, key(1), holder(2))]))
    assert await backend.lookup([key(1), key(2), key(3)]) == [holder(1) + holder(2), holder(1), b""]
    await backend.apply(record(1, 1, [(OP_REMOVE, key(1), holder(1))]))
    assert await backend.lookup([key(1), key(2)]) == [holder(2), holder(1)]


async def test_tiers_and_groups_of_one_pod_coexist(backend: Backend):
    """Removing one tier or group leaves the others."""
    kinds = [holder(1, tier, group) for group in (0, 1) for tier in (Tier.GPU, Tier.CPU)]
    await backend.apply(record(1, 0, [(OP_ADD, key(1), held) for held in reversed(kinds)]))
    assert await backend.lookup([key(1)]) == [b"".join(kinds)]
    await backend.apply(record(1, 1, [(OP_REMOVE, key(1), holder(1, Tier.GPU, 1))]))
    assert await backend.lookup([key(1)]) == [kinds[0] + kinds[1] + kinds[3]]


async def test_a_record_that_comes_again_changes_nothing(backend: Backend):
    """A late repetition of an add does not bring a removed block back."""
    add, remove = record(1, 3, [(OP_ADD, key(1), holder(1))]), record(1, 4, [(OP_REMOVE, key(1), holder(1))])
    for each in (add, remove, add, remove, add):
        await backend.apply(each)
    assert await backend.lookup([key(1)]) == [b""]
    assert (await backend.stats()).late == 3


async def test_an_older_epoch_never_replaces_a_newer_one(backend: Backend):
    """A holder written under a newer epoch survives adds and removals of an older one."""
    newer = holder(1, epoch=EPOCH + 1)
    await backend.apply(record(1, 0, [(OP_ADD, key(1), newer)]))
    await backend.apply(record(1, 1, [(OP_ADD, key(1), holder(1)), (OP_REMOVE, key(1), holder(1))]))
    assert await backend.lookup([key(1)]) == [newer]


async def test_no_cap_on_pods_per_block(backend: Backend):
    """64 pods, 4 groups, 2 tiers: every holder is kept, in order."""
    kinds = [holder(p, tier, group) for p in range(64) for group in range(4) for tier in (Tier.GPU, Tier.CPU)]
    for pod in range(64):
        await backend.apply(record(pod, 0, [(OP_ADD, key(1), held) for held in kinds[pod * 8 : pod * 8 + 8]]))
    assert await backend.lookup([key(1)]) == [b"".join(kinds)]


async def test_dropping_an_epoch_takes_that_pod_s_old_entries_alone(backend: Backend):
    """Other pods, and the pod's newer entries, stay."""
    await backend.apply(record(1, 0, [(OP_ADD, key(n), holder(1)) for n in range(2500)]))
    await backend.apply(record(2, 0, [(OP_ADD, key(n), holder(2)) for n in range(0, 2500, 2)]))
    await backend.apply(record(1, 1, [(OP_ADD, key(7), holder(1, epoch=EPOCH + 1))]))
    assert await backend.drop_epoch(1, EPOCH + 1) == 2499
    found = await backend.lookup([key(n) for n in range(2500)])
    expected = [holder(2) if n % 2 == 0 else b"" for n in range(2500)]
    expected[7] = holder(1, epoch=EPOCH + 1)
    assert found == expected


async def test_a_narrowed_clear_drops_the_gpu_alone(backend: Backend):
    """gpu_valid_from ends GPU entries and leaves the CPU tier."""
    await backend.apply(record(1, 0, [(OP_ADD, key(1), holder(1)), (OP_ADD, key(1), holder(1, Tier.CPU))]))
    assert await backend.drop_epoch(1, EPOCH, EPOCH + 1) == 1
    assert await backend.lookup([key(1)]) == [holder(1, Tier.CPU)]


@pytest.mark.parametrize("seed", range(4))
async def test_random_updates_equal_a_plain_dict(backend: Backend, seed: int):
    """Thousands of random adds, removals, repetitions and epochs give what a dict of sets gives."""
    rng = random.Random(seed)
    model: dict[bytes, bytes] = {}
    sequences = dict.fromkeys(range(4), 0)
    log: list[BlocksRecord] = []
    for _ in range(60):
        if log and rng.random() < 0.2:
            await backend.apply(rng.choice(log))
            continue
        pod = rng.randrange(4)
        updates = []
        for _ in range(rng.randrange(1, 60)):
            tier, epoch = rng.choice([Tier.GPU, Tier.CPU]), EPOCH + rng.randrange(2)
            updates.append(
                (rng.choice([OP_ADD, OP_ADD, OP_REMOVE]), key(rng.randrange(40)), holder(pod, tier, 0, epoch))
            )
        made = record(pod, sequences[pod], updates)
        sequences[pod] += 1
        log.append(made)
        await backend.apply(made)
        for op, at, held in updates:
            changed = (add_holder if op == OP_ADD else remove_holder)(model.get(at, b""), held)
            model[at] = changed
    assert await backend.lookup([key(n) for n in range(40)]) == [model.get(key(n), b"") for n in range(40)]


async def test_eight_appliers_and_eight_readers(backend: Backend):
    """Concurrent writers of different pods lose nothing of each other; readers only see whole holders."""
    done = asyncio.Event()

    async def apply(pod: int) -> None:
        for sequence in range(30):
            await backend.apply(record(pod, sequence, [(OP_ADD, key(n), holder(pod)) for n in range(20)]))
            await asyncio.sleep(0)

    async def read() -> None:
        while not done.is_set():
            for value in await backend.lookup([key(n) for n in range(20)]):
                assert len(value) % 24 == 0
                assert value == b"".join(sorted(value[at : at + 24] for at in range(0, len(value), 24)))
            await asyncio.sleep(0.001)

    readers = [asyncio.create_task(read()) for _ in range(8)]
    await asyncio.gather(*(apply(pod) for pod in range(8)))
    done.set()
    await asyncio.gather(*readers)
    everybody = b"".join(holder(pod) for pod in range(8))
    assert await backend.lookup([key(n) for n in range(20)]) == [everybody] * 20


@pytest.mark.parametrize("pod", ["pod-a", "pod-b"])
async def test_the_recorded_streams_give_the_engine_s_own_answers(backend: Backend, pod: str):
    """Folding what a real engine sent reproduces every hit that it reported itself."""
    frames = msgpack.Unpacker(io.BytesIO(gzip.decompress((DATA / f"{pod}.frames.gz").read_bytes())), raw=True)
    resolver, view = Resolver(ResolveOptions(), 1, lambda: 0), DictView()
    for topic, sequence, payload in frames:
        effects = resolver.effects()
        headers = [("sequence", str(int.from_bytes(sequence, "big")).encode()), ("model", topic.split(b"@")[2])]
        resolver.apply(view, parse_message(pod.encode(), payload, headers), effects)
        for values in effects.encode().values():
            for value in values:
                await backend.apply(decode_blocks(value))
    state = view.get(state_key(pod_ids.pod_ref(pod).to_bytes(8, "big")))
    assert state is not None
    scene = Fleet([pod_record(decode_state(state), 0)], 16).scene("demo-model", Weights())
    truth = json.loads(gzip.decompress((DATA / f"{pod}.truth.json.gz").read_bytes()))
    for query in truth["queries"]:
        root = block_key.root_key("demo-model", None, query["cache_salt"])
        values = await backend.lookup(block_key.block_keys(root, block_key.pack_tokens(query["tokens"]), 16))
        matches, _ = walk(values, scene, len(query["tokens"]), whole_prompt=True)
        assert (matches[0].tokens if matches else 0) == query["hit_tokens"]


async def test_a_store_on_disk_or_on_a_server_survives_its_user(make_backend, request: pytest.FixtureRequest):
    """Opened again, a lasting backend has its entries and still drops what it had applied; memory starts empty."""
    first = make_backend()
    await first.start()
    add, remove = record(1, 0, [(OP_ADD, key(1), holder(1))]), record(1, 1, [(OP_REMOVE, key(1), holder(1))])
    await first.apply(add)
    await first.apply(record(2, 0, [(OP_ADD, key(1), holder(2))]))
    await first.apply(remove)
    await first.close()
    second = make_backend()
    await second.start()
    await second.apply(add)
    lasting = first.name in ("rocksdb", "redis")
    assert await second.lookup([key(1)]) == [holder(2) if lasting else holder(1)]
    await second.close()
