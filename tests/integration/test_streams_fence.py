"""Workers that stood still, on the real Kafka: what they write afterwards harms nobody, and they notice."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import read_records
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.service import WorkerService
from kvatlas.streams.state.changelog import META_KEY, Meta, decode_meta, encode_meta, send_batch, send_claim
from kvatlas.streams.v1 import block_index_pb2 as pb
from tests.integration.streams_support import (
    PARTITIONS,
    WorkerProcess,
    assert_true,
    fleet_of,
    lookup_over,
    make_topics,
    producing,
    unread_bytes,
    until_true,
    wait_answer,
    wait_roles,
)

FLAGS = ("--session-timeout-seconds=4",)


def index_changelog(kafka: KafkaSettings) -> str:
    return kafka.topic(topics.changelog_topics("kvatlas")[1].name)


@pytest.mark.timeout(400)
async def test_a_worker_that_stood_still_in_the_middle_of_its_work_harms_nothing(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """Stopped past its session and continued: flagged answers, then a true index, also from the changelog alone."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    workers += [WorkerProcess(kafka, tmp_path / name, *FLAGS) for name in ("a", "b")]
    addresses = [await worker.ready() for worker in workers]
    async with producing(kafka) as producer, grpc.aio.insecure_channel(addresses[0]) as channel:
        fleet.serve(60)
        await fleet.flush(producer)
        assert_true(await until_true(kafka, fleet.truth()), 4)
        await channel.channel_ready()  # a connection takes both sides
        keys = sorted(key for tiers in fleet.truth().values() for key in tiers["gpu"])[:400]
        for turn in range(3):  # no flush may be waited for: the work is to be in progress
            fleet.serve(20)
            await fleet.flush(producer)
            if turn == 1:
                workers[0].process.send_signal(signal.SIGSTOP)
        await wait_roles(addresses[1], keys, {pb.PartitionState.ACTIVE})
        fleet.serve(60)
        fleet.disturb(clear=0.5, restart=0.5)
        await fleet.flush(producer)
        await wait_answer(addresses[1], keys, lambda answer: not any(state.lag_records for state in answer.partitions))
        before = unread_bytes(addresses[0])
        asked = lookup_over(channel, keys)  # waits there: the first thing that it does then
        async with asyncio.timeout(90):
            while unread_bytes(addresses[0]) == before:
                await asyncio.sleep(0.05)
        workers[0].process.send_signal(signal.SIGCONT)
        assert pb.PartitionState.ACTIVE not in {state.role for state in (await asked).partitions}
        fleet.serve(40)
        await fleet.flush(producer)
    assert_true(await until_true(kafka, fleet.truth()), 4)
    for worker in workers:
        worker.kill()
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    workers.append(WorkerProcess(kafka, tmp_path / "c", *FLAGS))
    await workers[2].ready()
    assert_true(await until_true(kafka, fleet.truth()), 4)


async def test_batches_of_a_replaced_writer_are_dropped_and_written_over(
    brokers: str, topic_prefix: str, tmp_path: Path
) -> None:
    """What an older owner appends to the changelog does not reach a restore, and the owner writes its own again."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    service = WorkerService(WorkerSettings(state_dir=str(tmp_path / "w")), kafka)
    await service.start()
    try:
        await asyncio.wait_for(service.ready.wait(), 90)
        async with producing(kafka) as producer:
            fleet.serve(60)
            await fleet.flush(producer)
            assert_true(await until_true(kafka, fleet.truth()), 4)
            written = {number: dict(state.items()) for number, state in service._index_states().items()}
            await spoil(producer, kafka, written, epoch=0)
            fleet.serve(20)
            await fleet.flush(producer)
            assert_true(await until_true(kafka, fleet.truth()), 4)
            deadline = time.monotonic() + 90
            while any(
                state.meta.source_offset < 0 or state.foreign or state.overlay.reflected is not None
                for state in service._index_states().values()
            ):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
        state = {number: dict(state.items()) for number, state in service._index_states().items()}
    finally:
        await service.stop()
    shutil.rmtree(tmp_path / "w")
    again = WorkerService(WorkerSettings(state_dir=str(tmp_path / "v")), kafka)
    await again.start()
    try:
        await asyncio.wait_for(again.ready.wait(), 90)
        assert {number: dict(state.items()) for number, state in again._index_states().items()} == state
        assert_true(await until_true(kafka, fleet.truth()), 4)
    finally:
        await again.stop()


async def test_a_worker_whose_partitions_were_claimed_ends_and_comes_back(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """A claim above its own ends the process at its next commit; the next one claims anew, goes on, and tells why."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    telemetry = f"127.0.0.1:{free_ports(1)[0]}"
    worker = WorkerProcess(kafka, tmp_path / "w", *FLAGS, f"--telemetry-listen={telemetry}", supervised=True)
    workers.append(worker)
    await worker.ready()
    async with producing(kafka) as producer:
        fleet.serve(40)
        await fleet.flush(producer)
        assert_true(await until_true(kafka, fleet.truth()), 4)
        before = await newest_metas(kafka)
        for number, meta in before.items():
            claim = meta._replace(epoch=meta.epoch + 5, owner=77)
            await send_claim(producer, index_changelog(kafka), number, encode_meta(claim))
        fleet.serve(40)
        await fleet.flush(producer)
        await worker.ready()
        assert_true(await until_true(kafka, fleet.truth()), 4)
    assert all(meta.epoch > before[number].epoch + 5 for number, meta in (await newest_metas(kafka)).items())
    pages = {page: await asyncio.to_thread(page_of, telemetry, page) for page in ("metrics", "readyz")}
    assert 'kvatlas_process_restarts_total{code="1"}' in pages["metrics"]
    assert "another worker took over while this one stood still" in pages["readyz"]
    assert pages["readyz"].startswith("ready\nrestarts: ")
    assert worker.terminate() == 0


def page_of(address: str, page: str) -> str:
    with urllib.request.urlopen(f"http://{address}/{page}", timeout=90) as answer:
        return str(answer.read().decode())


async def newest_metas(kafka: KafkaSettings) -> dict[int, Meta]:
    """The newest meta record of each changelog partition."""
    found: dict[int, Meta] = {}

    def take(record: Any) -> None:
        if record.key == META_KEY:
            found[record.partition] = decode_meta(record.value)

    await read_records(kafka, topics.changelog_topics("kvatlas")[1].name, take)
    return found


async def spoil(
    producer: AIOKafkaProducer, kafka: KafkaSettings, written: dict[int, dict[bytes, bytes]], epoch: int
) -> None:
    """Write to each changelog partition as an owner of an older epoch would: removals of what is there."""
    meta = encode_meta(Meta(10**9, 0, time.time_ns(), epoch, 5))
    assert len(written) == PARTITIONS
    for number, entries in written.items():
        await send_batch(producer, index_changelog(kafka), number, dict.fromkeys(entries), before=meta, after=meta)
