"""The indexer over every backend: a simulated fleet's own answers, and a server that dies in the middle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvatlas.bridge.options import BridgeSettings
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimSettings
from kvatlas.scorer import Indexer, IndexerOptions
from kvatlas.scorer.backends import Backend
from kvatlas.scorer.backends.redis import RedisBackend

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
