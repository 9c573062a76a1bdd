"""The indexer library on the log: a full replica of what bridge and workers wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvatlas.bridge.errors import LogError, SettingsError
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer import Indexer, IndexerOptions
from kvatlas.scorer.errors import InputError
from kvatlas.scorer.library.backends.redis import RedisBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from tests.integration import pipeline_support as support
from tests.integration.pipeline_support import RecordedEngine, Service
from tests.integration.redis_support import RedisServer

pytestmark = pytest.mark.kafka


@pytest.fixture
def engines() -> Iterator[list[RecordedEngine]]:
    """The two recorded engines."""
    made = [RecordedEngine(pod) for pod in support.PODS]
    yield made
    for engine in made:
        engine.close()


async def wrong(indexer: Indexer, engine: RecordedEngine) -> int:
    """Count recorded queries that score otherwise than the engine's own hit."""
    count = 0
    for query in engine.queries:
        scored = await indexer.score_tokens(
            query["tokens"], support.MODEL, cache_salt=query["cache_salt"], pods=[engine.pod]
        )
        found = scored.scores.get(engine.pod)
        count += (found.matched_tokens if found else 0) != query["hit_tokens"]
    return count


async def test_a_replica_follows_the_log(
    engines: list[RecordedEngine], tmp_path: Path, brokers: str, topic_prefix: str
) -> None:
    """A replica has what was on the log before it, over all partitions, and what comes after; it needs no worker."""
    first, second = engines
    flags = [engine.flag for engine in engines]
    where = (f"--brokers={brokers}", f"--topic-prefix={topic_prefix}", "--partitions=4")
    up = Service(tmp_path / "up.log", "up", *flags, f"--state-dir={tmp_path}", "--scorer-listen=127.0.0.1:0", *where)
    try:
        await asyncio.to_thread(up.ready, 180)
        first.play()
        kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix)
        async with Indexer.from_kafka(kafka) as indexer:
            second.play()
            async with asyncio.timeout(120):
                while sum([await wrong(indexer, engine) for engine in engines]):
                    await asyncio.sleep(0.2)
            assert [record.pod for record in indexer.pods(support.MODEL)] == list(support.PODS)
            with pytest.raises(InputError, match="bridge"):
                await indexer.add_engine("tcp://127.0.0.1:1")
        up.close()
        async with Indexer.from_kafka(kafka) as late:  # nothing runs but the broker
            await late.caught_up()
            assert [await wrong(late, engine) for engine in engines] == [0, 0]
    finally:
        up.close()


async def test_what_a_replica_cannot_do(brokers: str, topic_prefix: str, tmp_path: Path) -> None:
    """Without topics it says how to make them; a shared index is refused: the workers fill that."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix)
    with pytest.raises(LogError, match="kvatlas topics"):
        await Indexer.from_kafka(kafka, options=IndexerOptions(start_timeout_seconds=5)).start()
    with pytest.raises(LogError, match="kvatlas topics"):
        await Indexer.from_kafka(kafka, RocksBackend(tmp_path / "index")).start()
    server = RedisServer(tmp_path)
    server.start()
    try:
        with pytest.raises(SettingsError, match="--mirror"):
            await Indexer.from_kafka(kafka, RedisBackend(server.url)).start()
    finally:
        server.kill()
