"""A new index version on the real Kafka: built beside the live one, compared, switched to and back under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import fold_events
from kvatlas.deploy.bench._figures import headers
from kvatlas.scorer.client import AsyncScorerClient
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.streams.resolve.resolver import ResolveOptions
from tests.engine_events import stored
from tests.integration.streams_support import WorkerProcess, fleet_of, make_topics, producing, until_true
from tests.log_fleet import LogFleet

STEADY = "steady"
MODEL = "m"
TOKENS = list(range(1_000, 1_000 + 640))
HELD = 512
#: On a machine that has no time for heartbeats a worker would lose its partitions, which is not what is tested here.
PATIENT = "--session-timeout-seconds=25"


async def reindex(kafka: KafkaSettings, *arguments: str) -> tuple[int, Any]:
    """Run ``kvatlas reindex``; returns its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvatlas.deploy",
        "reindex",
        *arguments,
        f"--brokers={kafka.brokers}",
        f"--topic-prefix={kafka.topic_prefix}",
        "--json",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, json.loads(out) if out else err.decode()


async def send_steady(kafka: KafkaSettings, producer: AIOKafkaProducer) -> None:
    """Publish a pod that holds the first :data:`HELD` tokens and never changes."""
    count = HELD // 16
    await producer.send_and_wait(
        kafka.topic(topics.EVENTS),
        encode_batch(time.time(), [stored(range(1, count + 1), TOKENS[:HELD])], 0),
        key=STEADY.encode(),
        headers=headers(0, 1, MODEL),
        partition=pod_ids.pod_partition(STEADY, kafka.partitions),
    )


async def traffic(fleet: LogFleet, producer: AIOKafkaProducer) -> None:
    """Keep the fleet busy until cancelled."""
    while True:
        fleet.serve(1)
        fleet.disturb(clear=0.02, restart=0.02)
        await fleet.flush(producer)
        await asyncio.sleep(0.1)


class Load:
    """Queries without a pause, and what came of them."""

    def __init__(self, client: AsyncScorerClient) -> None:
        self._client = client
        self.answers: Counter[tuple[int, int, bool]] = Counter()
        self.errors: list[str] = []

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            try:
                answer = await self._client.score(MODEL, tokens=TOKENS, pods=[STEADY])
            except Exception as error:  # any error at all is what the test is about
                self.errors.append(repr(error))
            else:
                tokens = answer.scores[STEADY].matched_tokens if STEADY in answer.scores else 0
                self.answers[answer.block_size_tokens, tokens, answer.freshness.partial] += 1
            await asyncio.sleep(0.01)

    async def until(self, block_size_tokens: int, timeout: float = 90.0) -> None:
        """Wait for an answer in blocks of a size."""
        deadline = time.monotonic() + timeout
        seen = self._count(block_size_tokens)
        while self._count(block_size_tokens) == seen:
            assert time.monotonic() < deadline, (self.answers, self.errors[:3])
            await asyncio.sleep(0.02)

    def _count(self, block_size_tokens: int) -> int:
        return sum(count for (size, _, _), count in self.answers.items() if size == block_size_tokens)


@contextlib.asynccontextmanager
async def background(*work: Any) -> AsyncIterator[None]:
    """Run coroutines beside the block; their errors are the test's."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome


@pytest.mark.timeout(600)
async def test_a_new_version_takes_over_under_load_and_gives_back(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """Another block size and partition count, built, compared, switched to, back, and to again under load.

    No query fails, none is answered with less than the pod holds, and in the end both versions hold exactly what the
    log says; the old one can be dropped and the new one goes on.
    """
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    workers.append(WorkerProcess(kafka, tmp_path / "base", PATIENT))
    await workers[0].ready()
    service = ScorerService(ScorerSettings(listen="127.0.0.1:0", name="s", deadline_ms=30_000), kafka)
    await service.start()
    client = AsyncScorerClient(service.address, timeout_seconds=60)
    load = Load(client)
    try:
        async with producing(kafka) as producer:
            await send_steady(kafka, producer)
            fleet.serve(40)
            await fleet.flush(producer)
            await asyncio.wait_for(service.ready.wait(), 90)
            while (await client.score(MODEL, tokens=TOKENS)).scores[STEADY].matched_tokens < HELD:
                await asyncio.sleep(0.05)
            async with background(traffic(fleet, producer), load.run()):
                code, started = await reindex(kafka, "start", "v2", "--block-size-tokens=32", "--index-partitions=6")
                assert (code, started["partitions"]) == (0, 6), started
                code, text = await reindex(kafka, "switch", "v2", "--timeout-seconds=0.5")
                assert code != 0
                assert "no worker keeps it" in text
                workers.append(WorkerProcess(kafka, tmp_path / "v2", "--index-version=v2", PATIENT))
                await workers[1].ready()
                code, progress = await reindex(kafka, "wait", "v2", "--timeout-seconds=120")
                assert (code, progress["uncovered"]) == (0, []), progress
                code, found = await reindex(kafka, "compare", "v2", "--prompts=40")
                assert (code, found["differences"]) == (0, []), found
                assert found["matches"] > 20
                for name, size in (("v2", 32), ("base", 16), ("v2", 32)):
                    code, _ = await reindex(kafka, "switch", name)
                    assert code == 0
                    await load.until(size)
            await fleet.flush(producer)
        assert load.errors == []
        assert {answer for answer in load.answers if answer[1:] != (HELD, False)} == set(), load.answers
        assert service.index_version == "v2"
        await _drained(kafka)
        for version, size in (("base", 16), ("v2", 32)):
            truth = await fold_events(kafka, ResolveOptions(block_size_tokens=size))
            pods = await until_true(kafka, truth, version=version)
            assert sum(pod.held for pod in pods) > 100
            assert not [pod for pod in pods if pod.ghosts or pod.missing], (version, pods)

        code, text = await reindex(kafka, "drop", "v2")
        assert code != 0
        assert workers[0].terminate() == 0
        code, _ = await reindex(kafka, "drop", "base")
        assert code == 0
        code, status = await reindex(kafka, "status")
        assert [(one["version"], one["active"]) for one in status] == [("v2", True)]
        assert (await client.score(MODEL, tokens=TOKENS)).scores[STEADY].matched_tokens == HELD
    finally:
        await client.close()
        await service.stop()


async def test_compare_finds_an_index_that_is_wrong(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """A version whose index lacks a pod's blocks is told apart by ``compare``, with exit code 1 and the pod's name."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    workers.append(WorkerProcess(kafka, tmp_path / "base", PATIENT))
    async with producing(kafka) as producer:
        await send_steady(kafka, producer)
        fleet.serve(40)
        await fleet.flush(producer)
        assert (await reindex(kafka, "start", "v2", "--block-size-tokens=16", "--index-partitions=3"))[0] == 0
        workers.append(WorkerProcess(kafka, tmp_path / "v2", "--index-version=v2", PATIENT))
        for worker in workers:
            await worker.ready()
        for version in ("base", "v2"):
            assert (await reindex(kafka, "wait", version, "--max-lag-records=0"))[0] == 0
        assert (await reindex(kafka, "compare", "v2"))[0] == 0
        # As if the version's own resolve agent had seen a clear that never was.
        record = records.PodRecord(
            pod=STEADY, writer=pod_ids.WRITER_STREAMS, epoch=1 << 40, valid_from=1 << 40, model=MODEL
        )
        await producer.send_and_wait(
            kafka.topic(topics.PODS),
            records.encode(record),
            key=pod_ids.pod_key(pod_ids.streams_writer("v2"), STEADY),
            partition=pod_ids.pod_partition(STEADY, kafka.partitions),
        )
    code, found = await reindex(kafka, "compare", "v2")
    assert code == 1
    assert {(one["pod"], one["before"], one["after"]) for one in found["differences"]} == {(STEADY, HELD, 0)}


async def _drained(kafka: KafkaSettings) -> None:
    for version in ("base", "v2"):
        code, _ = await reindex(kafka, "wait", version, "--max-lag-records=0", "--timeout-seconds=120")
        assert code == 0
