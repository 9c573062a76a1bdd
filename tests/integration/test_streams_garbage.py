"""Garbage on a worker's own topics and in its tables, on the real Kafka: it comes back, and its index is true."""

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
from kvatlas.streams.state.damage import KEPT
from tests.integration.streams_support import (
    PARTITIONS,
    WorkerProcess,
    assert_true,
    fleet_of,
    make_topics,
    producing,
    until_true,
)


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


def files_of(table: Path) -> list[Path]:
    """Tables of RocksDB, the largest first."""
    return sorted(table.glob("*.sst"), key=lambda file: -file.stat().st_size)


@pytest.mark.timeout(400)
async def test_damaged_tables_are_rebuilt_from_a_changelog_with_bad_entries(
    brokers: str, topic_prefix: str, tmp_path: Path
) -> None:
    """A file with flipped bytes and one that is missing: set aside, told, and answered right from what Kafka has."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet, folder = fleet_of(kafka), tmp_path / "w"
    async with producing(kafka) as producer:
        fleet.serve(60)
        await fleet.flush(producer)
        for _ in range(2):  # the second start writes what the first one's logs have into files
            worker = WorkerProcess(kafka, folder)
            try:
                await worker.ready()
                assert_true(await until_true(kafka, fleet.truth()), 4)
                assert worker.terminate() == 0
            finally:
                worker.close()
        flipped, missing = sorted(path for path in folder.rglob("*block_index-*.db") if files_of(path))[:2]
        data = bytearray(files_of(flipped)[0].read_bytes())
        data[50:-100:500] = (byte ^ 1 for byte in data[50:-100:500])
        files_of(flipped)[0].write_bytes(data)
        files_of(missing)[0].unlink()
        changelog = kafka.topic(topics.changelog_topics("kvatlas")[1].name)
        known = sorted(key for tiers in fleet.truth().values() for key in tiers["gpu"])
        for partition in range(PARTITIONS):
            for key in (*known[:4], META_KEY, b"what"):
                await producer.send(changelog, b"1234", key=key, partition=partition)
        await producer.flush()
        worker = WorkerProcess(kafka, folder, supervised=True)
        try:
            await worker.ready()
            fleet.serve(20)
            await fleet.flush(producer)
            assert_true(await until_true(kafka, fleet.truth()), 4)
            kept = {path.name.rpartition("-")[0] for path in (flipped.parent / KEPT).iterdir()}
            assert kept == {flipped.name, missing.name}, worker.tail()
            for table in (flipped, missing):
                assert f"{table} is damaged and set aside" in worker.log.read_text()
            assert worker.terminate() == 0
        finally:
            worker.close()


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
