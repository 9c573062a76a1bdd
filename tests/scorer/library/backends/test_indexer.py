"""The indexer over every backend: a simulated fleet's own answers, and a server that dies in the middle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import epochs, pod_ids
from kvatlas.bridge.model.events import Tier
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer import Indexer, IndexerOptions
from kvatlas.scorer.library.backends import Backend
from kvatlas.scorer.library.backends.redis import RedisBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from kvatlas.streams.index.blocks_record import OP_ADD, BlocksRecord, Run
from kvatlas.streams.index.holders import pack_holder
from tests.integration.redis_support import RedisServer

MODEL = "sim-model"
OPTIONS = IndexerOptions()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Three pods with small caches, clears and restarts."""
    settings = SimPlan(
        pods=3, blocks=200, cpu_blocks=100, sessions=12, clear_probability=0.02, restart_probability=0.02
    )
    made = Fleet(settings, clock=time.time, monotonic=time.monotonic)
    made.start()
    yield made
    made.close()


async def check(indexer: Indexer, fleet: Fleet, served: list[Request]) -> None:
    """Wait for the pods' newest messages, then compare every prompt's scores with the fleet's."""
    async with asyncio.timeout(90):
        while {record.pod: record.last_sequence for record in indexer.pods()} != {
            status.pod: status.sequence for status in fleet.status()
        } or not indexer.counts:
            await asyncio.sleep(0.01)
        await indexer.caught_up(90)
    for request in served[-40:]:
        scored = await indexer.score_tokens(request.tokens, MODEL, cache_salt=request.cache_salt)
        expected = fleet.expect(request.tokens, cache_salt=request.cache_salt)
        assert not scored.partial
        assert {name: round(score.score, 6) for name, score in scored.scores.items()} == {
            name: round(answer.score, 6) for name, answer in expected.items()
        }


async def test_the_same_answers_from_every_backend(make_backend: Callable[[], Backend], fleet: Fleet):
    """Evictions, tiers, clears and restarts: every backend ends up with exactly what the pods hold."""
    async with Indexer(make_backend(), OPTIONS, engines=fleet.engines) as indexer:
        for _ in range(2):
            await check(indexer, fleet, fleet.serve(70))


async def test_a_server_that_dies_in_the_middle(own_redis: Any, fleet: Fleet):
    """While Redis is away scores are partial and updates wait; once it is back nothing is missing."""
    backend = RedisBackend(own_redis.url, retries=1, timeout_seconds=0.5)
    async with Indexer(backend, OPTIONS, engines=fleet.engines) as indexer:
        await check(indexer, fleet, fleet.serve(40))
        own_redis.kill()
        served = fleet.serve(40)
        assert (await indexer.score_tokens(served[-1].tokens, MODEL)).partial
        async with asyncio.timeout(90):
            while not indexer.counts["backend_retries"]:
                await asyncio.sleep(0.01)
        await asyncio.to_thread(own_redis.start)
        await check(indexer, fleet, served)


async def test_a_server_that_comes_back_empty(tmp_path: Path, fleet: Fleet):
    """What an emptied Redis had is written anew from what is known of the engines, with and without new messages."""
    server = RedisServer(tmp_path, durable=False)
    server.start()
    try:
        async with Indexer(RedisBackend(server.url, retries=1), OPTIONS, engines=fleet.engines) as indexer:
            served = fleet.serve(60)
            await check(indexer, fleet, served)
            for more in (0, 40):
                rebuilt = indexer.counts["index_rebuilt"]
                server.kill()
                served += fleet.serve(more)
                await asyncio.to_thread(server.start)
                async with asyncio.timeout(60):
                    while indexer.counts["index_rebuilt"] == rebuilt:
                        await asyncio.sleep(0.02)
                await check(indexer, fleet, served)
    finally:
        server.kill()


@pytest.mark.parametrize("block_size", [16, 64])
async def test_what_is_written_anew_is_what_was_there(redis_server: Any, tmp_path: Path, block_size: int):
    """Tiers, groups, shared canonical blocks, suspect epochs: every entry comes back as it was."""
    backend = RedisBackend(redis_server.url, prefix=tmp_path.name)
    fields = {"parent_block_hash": None, "block_size": 16}
    events = [
        {"block_hashes": list(range(12)), "token_ids": list(range(192)), "medium": "GPU"},
        {"block_hashes": [3, 5], "token_ids": [], "medium": "CPU"},
        {"block_hashes": [0, 1, 2, 3], "token_ids": [], "medium": "CPU"},
        {"block_hashes": [40], "token_ids": list(range(16)), "medium": "GPU", "group_idx": 1},
    ]
    messages = [[{"type": "BlockStored", **fields, **event}] for event in events]
    messages.append([{"type": "BlockRemoved", "block_hashes": [9], "medium": "GPU"}])
    options = msgspec.structs.replace(OPTIONS, block_size_tokens=block_size)
    async with Indexer(backend, options) as indexer:
        for sequence, message in enumerate(messages):
            number = sequence + 3 * (sequence > 2)  # messages are missing: what was there is suspect
            headers = [("sequence", str(number).encode()), ("model", b"m")]
            await indexer.apply_record(b"one", msgspec.msgpack.encode((1.0, message)), headers)
        keys = indexer.block_keys(list(range(192)), "m")
        before = await backend.lookup(keys)
        assert any(before)
        await backend.begin_anew()
        assert await backend.lookup(keys) == [None] * len(keys)
        await indexer._feed.applier.recover()
        assert await backend.lookup(keys) == before


async def test_entries_of_an_earlier_run_leave_a_lasting_index(make_lasting: Callable[[], Backend]):
    """What an earlier run left belongs to ended epochs, and is removed once its pod is heard."""
    old = [b"%016d" % number for number in range(20)]
    first = make_lasting()
    await first.start()
    held = pack_holder(pod_ids.pod_ref("one"), 0, Tier.GPU, 0, 0, epochs.epoch_of(5))
    run = Run(pod_ids.pod_ref("one"), epochs.epoch_of(5), 3, 3, len(old))
    await first.apply(BlocksRecord((run,), b"".join(old), bytes([OP_ADD]) * len(old), held * len(old), 0))
    await first.close()
    backend = make_lasting()
    async with Indexer(backend, OPTIONS) as indexer:
        assert all(await backend.lookup(old))
        headers = [("sequence", b"0"), ("model", b"m"), ("incarnation", b"9")]
        await indexer.apply_record(b"one", msgspec.msgpack.encode((1.0, [])), headers)
        async with asyncio.timeout(60):
            while any(await backend.lookup(old)):
                await asyncio.sleep(0.01)


@pytest.fixture(params=["rocksdb", "redis"])
def make_lasting(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Backend]:
    """What makes one kind of lasting backend; called again, it opens the same store."""
    if request.param == "rocksdb":
        return lambda: RocksBackend(tmp_path / "index", cache_bytes=8 * 1024 * 1024)
    server = request.getfixturevalue("redis_server")
    return lambda: RedisBackend(server.url, prefix=tmp_path.name)


async def test_a_restarted_indexer_scores_at_once(make_lasting: Callable[[], Backend], tmp_path: Path):
    """With its state kept it goes on where it was, also while no engine can be reached, and says that this is stale."""
    options = msgspec.structs.replace(OPTIONS, state_dir=str(tmp_path / "state"))
    # The engine remembers two messages only: what the first run learnt cannot be replayed.
    publisher = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@one@m", buffer_steps=2)
    publisher.start()
    engines = [f"{publisher.endpoint},{publisher.replay_endpoint}"]

    def block(number: int) -> dict[str, Any]:
        tokens = list(range(number * 16, number * 16 + 16))
        parent = number - 1 if number else None
        return {
            "type": "BlockStored",
            "block_hashes": [number],
            "parent_block_hash": parent,
            "token_ids": tokens,
            "block_size": 16,
            "medium": "GPU",
        }

    async def until(indexer: Indexer, sequence: int) -> None:
        async with asyncio.timeout(90):
            while not (pods := indexer.pods()) or pods[0].last_sequence < sequence or pods[0].state != "live":
                await asyncio.sleep(0.01)

    prompt = list(range(16 * 10))
    try:
        async with Indexer(make_lasting(), options, engines=engines) as first:
            for number in range(5):
                publisher.publish([block(number)], timestamp=1.0 + number)
                await until(first, number)
            epoch = first.pods()[0].epoch
        async with Indexer(make_lasting(), options) as alone:
            scored = await alone.score_tokens(prompt, "m")
            assert (scored.scores["one"].matched_blocks, scored.freshness["one"].state) == (5, "stale")
        publisher.publish([block(5)], timestamp=7.0)  # while no indexer is there
        async with Indexer(make_lasting(), options, engines=engines) as second:
            publisher.publish([block(6)], timestamp=8.0)
            await until(second, 6)
            found = (await second.score_tokens(prompt, "m")).scores["one"]
            assert (found.matched_blocks, found.suspect_blocks) == (7, 0)
            assert second.pods()[0].epoch == epoch
            publisher.publish([{"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"}], timestamp=9.0)
            await until(second, 7)
            assert (await second.score_tokens(prompt, "m")).scores["one"].matched_blocks == 2
    finally:
        publisher.close()


async def test_a_state_without_its_index_is_not_believed(make_lasting: Callable[[], Backend], tmp_path: Path):
    """An index that was emptied, or is another, starts anew together with the state."""
    options = msgspec.structs.replace(OPTIONS, state_dir=str(tmp_path / "state"))
    fields = {"block_hashes": [1], "parent_block_hash": None, "token_ids": list(range(16)), "block_size": 16}
    value = msgspec.msgpack.encode((1.0, [{"type": "BlockStored", "medium": "GPU", **fields}]))
    async with Indexer(make_lasting(), options) as first:
        await first.apply_record(b"one", value, [("sequence", b"0"), ("model", b"m")])
        assert (await first.score_tokens(range(16), "m")).best == "one"
    async with Indexer(RocksBackend(tmp_path / "another"), options) as other:
        assert other.pods() == []
    with pytest.raises(SettingsError, match="state_dir"):
        await Indexer(options=options).start()
