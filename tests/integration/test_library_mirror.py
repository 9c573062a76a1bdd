"""The index mirrored into a real Redis: equal to what the pods hold, through a dead server and a dead worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis.asyncio as aioredis

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.records import PodRecord, decode
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import PodAudit, compare
from kvatlas.scorer import Indexer
from kvatlas.scorer.library.backends.errors import BackendError, ReadOnlyError
from kvatlas.scorer.library.backends.mirror import MirrorBackend
from kvatlas.streams.mirror.layout import Names
from tests.integration.pipeline_support import Service
from tests.integration.redis_support import RedisServer
from tests.integration.streams_support import WorkerProcess, assert_true, fleet_of, make_topics, producing, until_true
from tests.log_fleet import LogFleet

MODEL = "sim-model"
NAMES = Names("kvatlas")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server without a disk: killed, it has lost everything."""
    made = RedisServer(tmp_path, durable=False)
    made.start()
    yield made
    made.kill()


async def audit_mirror(server: RedisServer, fleet: LogFleet) -> list[PodAudit]:
    """Compare everything in the mirror with what the pods hold."""
    client = aioredis.from_url(server.url)
    try:
        names = [name async for name in client.scan_iter(match=NAMES.blocks + b"*", count=1000)]
        values = await client.mget(names) if names else []
        pods = [
            value async for at in client.scan_iter(match=b"*:pods:*") for value in (await client.hgetall(at)).values()
        ]
    finally:
        await client.aclose()
    skip = len(NAMES.blocks)
    index = {name[skip:]: value for name, value in zip(names, values, strict=True) if value}
    assert all(len(key) == KEY_BYTES for key in index)
    return compare(index, fleet.truth(), [decode(PodRecord, value) for value in pods])


async def until_mirrored(server: RedisServer, fleet: LogFleet, seconds: float = 120) -> None:
    """Wait until the mirror is what the pods hold."""
    deadline = time.monotonic() + seconds
    while True:
        found = await audit_mirror(server, fleet)
        if found and not any(pod.ghosts or pod.missing for pod in found):
            break
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.3)
    assert_true(found, len(fleet.pods))


async def traffic(kafka: KafkaSettings, fleet: LogFleet, rounds: int) -> None:
    """Serve, clear and restart."""
    async with producing(kafka) as producer:
        for _ in range(rounds):
            fleet.serve(20)
            fleet.disturb(clear=0.1, restart=0.1)
            await fleet.flush(producer)


async def test_the_mirror_is_the_index_through_crashes(
    brokers: str, topic_prefix: str, tmp_path: Path, server: RedisServer
):
    """Equal to what the pods hold at first, after the server lost everything, and after the worker was killed."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka, pods=4, blocks=256)
    flags = (f"--mirror={server.url}", "--session-timeout-seconds=4")
    first = WorkerProcess(kafka, tmp_path / "a", *flags)
    second = None
    try:
        await first.ready()
        await traffic(kafka, fleet, 10)
        await until_mirrored(server, fleet)

        server.kill()
        await traffic(kafka, fleet, 10)
        assert_true(await until_true(kafka, fleet.truth()), 4)  # ingestion never waited for it
        server.start()
        await until_mirrored(server, fleet)

        second = WorkerProcess(kafka, tmp_path / "b", *flags)
        await second.ready()
        await traffic(kafka, fleet, 5)
        first.kill()
        await traffic(kafka, fleet, 10)
        await until_mirrored(server, fleet)
    finally:
        for worker in (first, second):
            if worker is not None:
                worker.close()


async def test_readers_score_from_the_mirror(brokers: str, topic_prefix: str, tmp_path: Path, server: RedisServer):
    """An indexer over what a `kvatlas mirror` writes is right, refuses writes, and says when it ends."""
    with pytest.raises(BackendError, match="--mirror"):
        await Indexer.from_mirror(MirrorBackend(server.url)).start()
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka, pods=3, blocks=512)
    worker = WorkerProcess(kafka, tmp_path / "a")
    log = f"--brokers={kafka.brokers}", f"--topic-prefix={topic_prefix}"
    mirror = Service(tmp_path / "mirror.log", "mirror", *log, f"--mirror={server.url}")
    try:
        await worker.ready()
        await asyncio.to_thread(mirror.ready, 150)
        async with producing(kafka) as producer:
            served = fleet.serve(60)
            await fleet.flush(producer)
        await until_mirrored(server, fleet)
        async with Indexer.from_mirror(MirrorBackend(server.url)) as indexer:
            await indexer.caught_up()
            hits = 0
            for request in served:
                scored = await indexer.score_tokens(
                    request.tokens, MODEL, lora=request.lora, cache_salt=request.cache_salt
                )
                expected = {
                    name: found.matched_blocks
                    for name, pod in fleet.pods.items()
                    if (
                        found := pod.expect(
                            request.tokens, model=MODEL, lora=request.lora, cache_salt=request.cache_salt
                        )
                    )
                }
                assert {name: found.matched_blocks for name, found in scored.scores.items()} == expected
                assert (scored.partial, scored.stale) == (False, False)
                hits += bool(expected)
            assert hits > 30
            with pytest.raises(ReadOnlyError):
                await indexer.backend.apply(None)
            server.kill()
            assert (await indexer.score_tokens(served[0].tokens, MODEL)).partial
    finally:
        mirror.close()
        worker.close()
