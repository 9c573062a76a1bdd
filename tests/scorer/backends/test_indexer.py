"""The indexer over every backend: a simulated fleet's own answers, and a server that dies in the middle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.engine_publisher import EnginePublisher
from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimSettings
from kvatlas.scorer import Indexer, IndexerOptions
from kvatlas.scorer.backends import Backend
from kvatlas.scorer.backends.redis import RedisBackend
from kvatlas.scorer.backends.rocks import RocksBackend

MODEL = "sim-model"
OPTIONS = IndexerOptions(bridge=BridgeSettings(replay_backoff_seconds=0.02))


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Three pods with small caches, clears and restarts."""
    settings = SimSettings(
        pods=3, blocks=200, cpu_blocks=100, sessions=12, clear_probability=0.02, restart_probability=0.02
    )
    made = Fleet(settings, clock=time.time, monotonic=time.monotonic)
    made.start()
    yield made
    made.close()


async def check(indexer: Indexer, fleet: Fleet, served: list[Request]) -> None:
    """Wait for the pods' newest messages, then compare every prompt's scores with the fleet's."""
    async with asyncio.timeout(30):
        while {record.pod: record.last_sequence for record in indexer.pods()} != {
            status.pod: status.sequence for status in fleet.status()
        } or not indexer.counts:
            await asyncio.sleep(0.01)
        await indexer.caught_up(30)
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
        await asyncio.to_thread(own_redis.start)
        await check(indexer, fleet, served)
        assert indexer.counts["backend_retries"] > 0


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
        async with asyncio.timeout(20):
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
