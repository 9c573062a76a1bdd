"""Chaos on the real Kafka: workers killed at random, the broker restarted, pods clearing and restarting.

Runs for ``KVATLAS_CHAOS_SECONDS`` (default 40); the long run takes 180.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import grpc
import pytest
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import epochs, topics
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import compare, lookup_all, read_topic
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.streams.errors import StreamsError
from tests.integration.streams_support import WorkerProcess, assert_true, fleet_of, make_topics, producing, until_true
from tests.log_fleet import FIRST_INCARNATION, LogFleet

SECONDS = float(os.environ.get("KVATLAS_CHAOS_SECONDS", "40"))
PODS = 16


@pytest.mark.timeout(SECONDS + 600)
async def test_the_index_is_true_after_chaos_and_never_credits_an_ended_epoch(
    own_kafka: KafkaNode, tmp_path: Path
) -> None:
    """Through kills, a broker restart, clears and restarts: no ghost, nothing missing, no block of an ended epoch."""
    kafka = await make_topics(own_kafka.bootstrap, "chaos-", partitions=16)
    fleet = fleet_of(kafka, pods=PODS, blocks=128)
    dice = random.Random(11)
    flags = ("--session-timeout-seconds=4",)
    names = ["a", "b", "c"]
    workers = [WorkerProcess(kafka, tmp_path / name, *flags) for name in names]
    pods = PodDirectory()
    follower = TopicFollower(kafka, topics.PODS, pods.apply, client_id="chaos")
    follower.start()
    checked = kills = 0
    try:
        for worker in workers:
            await worker.ready()
        async with producing(kafka) as producer:
            began, killed_at, restarted = time.monotonic(), time.monotonic(), False
            # A slow machine gets the time for two kills and a look, however long they take.
            while (elapsed := time.monotonic() - began) < SECONDS or kills < 2 or not (checked and restarted):
                fleet.serve(8)
                fleet.disturb(clear=0.2, restart=0.0)
                await fleet.flush(producer)
                if dice.random() < 0.3:
                    checked += await restart_and_check(kafka, fleet, producer, pods, dice)
                if time.monotonic() - killed_at > 10:
                    killed_at, kills = time.monotonic(), kills + 1
                    victim = dice.randrange(3)
                    workers[victim].kill()
                    workers[victim].close()
                    workers[victim] = WorkerProcess(kafka, tmp_path / names[victim], *flags)
                if not restarted and elapsed > SECONDS / 2:
                    restarted = True
                    await asyncio.to_thread(own_kafka.restart)
                await asyncio.sleep(0.1)
        assert restarted
        assert_true(await until_true(kafka, fleet.truth(), timeout=240), PODS)
    finally:
        await follower.stop()
        for worker in workers:
            worker.close()


async def restart_and_check(
    kafka: KafkaSettings, fleet: LogFleet, producer: AIOKafkaProducer, pods: PodDirectory, dice: random.Random
) -> int:
    """Restart a pod: once its raised epoch is readable, nothing it held before is credited. Returns keys checked."""
    pod = dice.choice(list(fleet.pods.values()))
    before = sorted({bytes.fromhex(key) for keys in pod.held().values() for key in keys})
    pod.restart()
    incarnation = FIRST_INCARNATION + pod.status().incarnations  # an earlier restart may not have been read yet
    await fleet.flush(producer)
    for _ in range(50):
        found = pods.merged.get(pod.name)
        if found is not None and epochs.incarnation_of(found.valid_from) >= incarnation:
            break
        await asyncio.sleep(0.1)
    else:
        return 0  # no resolver has this pod right now: nothing is readable, nothing to check
    book = WorkerDirectory(time.time_ns)
    await read_topic(kafka, topics.WORKERS, lambda key, value, _: book.apply(key, value))
    try:
        index = await lookup_all(before, book)
    except (StreamsError, grpc.aio.AioRpcError):  # a partition that nobody answers for now is allowed
        return 0
    audits = compare(index, {pod.name: {}}, [found])
    assert [audit for audit in audits if audit.pod == pod.name and audit.ghosts] == []
    return len(before)
