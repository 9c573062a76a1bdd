"""Garbage on a worker's own topics, on the real Kafka: it goes on, comes back, and its index is true."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.service import WorkerService
from kvatlas.streams.state.changelog import META_KEY
from tests.integration.streams_support import PARTITIONS, assert_true, fleet_of, make_topics, producing, until_true


@pytest.mark.timeout(300)
async def test_garbage_on_every_topic_changes_nothing(brokers: str, topic_prefix: str, tmp_path: Path) -> None:
    """Records that are none, on all topics and both changelogs, while the worker runs and before it restores."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    chance = random.Random(3)
    async with producing(kafka) as producer:
        for folder in ("w", "v"):  # the second one has nothing but the changelogs
            service = WorkerService(WorkerSettings(state_dir=str(tmp_path / folder)), kafka)
            await service.start()
            stop = asyncio.Event()
            running = asyncio.create_task(service.run_until(stop))
            try:
                ready = asyncio.create_task(service.ready.wait())
                await asyncio.wait({running, ready}, timeout=120, return_when=asyncio.FIRST_COMPLETED)
                assert service.ready.is_set(), running
                fleet.serve(40)
                await fleet.flush(producer)
                await spoil(producer, kafka, chance)
                fleet.serve(40)
                await fleet.flush(producer)
                assert_true(await until_true(kafka, fleet.truth()), 4)
                assert not running.done()
            finally:
                stop.set()
                await asyncio.gather(running, return_exceptions=True)
                await service.stop()
            shutil.rmtree(tmp_path / folder)


async def spoil(producer: object, kafka: KafkaSettings, chance: random.Random) -> None:
    """Write what is no record to every partition of every topic."""
    names = [topic.name for topic in (*topics.TOPICS, *topics.changelog_topics("kvatlas"))]
    headers = [
        (topics.H_SEQUENCE, b"9" * 5000),
        (topics.H_INCARNATION, b"%d" % 2**63),
        (topics.H_CONTENT_TYPE, b"control"),
    ]
    compacted = {topics.PODS, topics.WORKERS, *(topic.name for topic in topics.changelog_topics("kvatlas"))}
    for name in names:
        for partition in range(PARTITIONS):
            for value in (b"1234", b"\x96\x02" + bytes(40), b"\x81\xa1v\xa2\xff\xfe", chance.randbytes(60)):
                key = chance.choice([b"pod-0", b"bridge|pod-x", b"what", META_KEY, chance.randbytes(16)])
                if name not in compacted and chance.random() < 0.3:
                    key = None
                if name in (topics.PODS, topics.WORKERS) and key == META_KEY:
                    key = b"what"
                await producer.send(  # type: ignore[attr-defined]
                    kafka.topic(name),
                    value,
                    key=key,
                    partition=partition,
                    headers=headers if name not in compacted else [],
                )
    await producer.flush()  # type: ignore[attr-defined]
