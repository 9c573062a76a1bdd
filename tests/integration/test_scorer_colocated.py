"""A scorer inside a worker on the real Kafka: scores are the oracle's, with and without the other workers."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import pytest

from kvatlas.deploy.brokers.process import free_ports
from kvatlas.scorer.client import AsyncScorerClient
from tests.integration.scorer_support import ScoringFleet, addresses_of, until_right
from tests.integration.streams_support import WorkerProcess, make_topics, producing

_SCORER = ("--with-scorer", "--scorer-listen=127.0.0.1:0")
_SESSION = ("--session-timeout-seconds=4",)


@pytest.fixture
def free_port() -> int:
    return free_ports(1)[0]


async def test_one_process_ingests_and_scores(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess], free_port: int
) -> None:
    """Every score of a worker with a scorer is the oracle's, its HTTP front answers, and it stops cleanly."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = ScoringFleet(kafka, pods=4)
    http = f"--scorer-http-listen=127.0.0.1:{free_port}"
    workers.append(WorkerProcess(kafka, tmp_path / "w", *_SCORER, http, *_SESSION))
    lookups, scorer = addresses_of(await workers[0].ready())
    async with producing(kafka) as producer, AsyncScorerClient(scorer) as client:
        for _ in range(3):
            await fleet.serve(producer, 30)
            answers = await until_right(client, fleet)
            seen = {(part.role, part.worker) for answer in answers for part in answer.freshness.partitions}
            assert len(seen) == 1, seen
            assert seen.pop()[0] == "active"
        assert fleet.hits() > 50
        asked = urllib.request.Request(
            f"http://127.0.0.1:{free_port}/v1/score",
            json.dumps({"model": fleet.model, "tokens": fleet.prompts[-1].tokens}).encode(),
            {"Content-Type": "application/json"},
        )
        body = await asyncio.to_thread(lambda: urllib.request.urlopen(asked, timeout=60).read())
        assert json.loads(body)["scores"].keys() == fleet.expected(fleet.prompts[-1]).keys()
    assert lookups != scorer
    assert workers[0].terminate() == 0, workers[0].tail()


async def test_partitions_of_another_worker_are_one_hop_away(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """With two workers, one of them with a scorer, scores stay the oracle's while the other joins, owns and leaves."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = ScoringFleet(kafka, pods=4)
    workers.append(WorkerProcess(kafka, tmp_path / "w0", *_SCORER, *_SESSION))
    _, scorer = addresses_of(await workers[0].ready())
    async with producing(kafka) as producer, AsyncScorerClient(scorer) as client:
        await fleet.serve(producer, 60)
        await until_right(client, fleet)
        workers.append(WorkerProcess(kafka, tmp_path / "w1", *_SESSION))
        await workers[1].ready()
        await fleet.serve(producer, 40)

        async def owners() -> set[str]:
            answers = await until_right(client, fleet)
            return {part.worker for answer in answers for part in answer.freshness.partitions}

        async with asyncio.timeout(150):
            while len(await owners()) != 2:
                await asyncio.sleep(0.3)
        assert workers[1].terminate() == 0
        await fleet.serve(producer, 20)
        async with asyncio.timeout(150):
            while len(await owners()) != 1:
                await asyncio.sleep(0.3)
    assert fleet.hits() > 50


async def test_a_thousand_conversations_score_as_the_oracle_says(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """1,000 random conversations, evictions, clears and restarts between them: every score is the oracle's."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = ScoringFleet(kafka, pods=8, blocks=1_024, keep=250, sessions=400, salted_share=0.2)
    workers.append(WorkerProcess(kafka, tmp_path / "w", *_SCORER, *_SESSION))
    _, scorer = addresses_of(await workers[0].ready())
    asked = hits = 0
    async with producing(kafka) as producer, AsyncScorerClient(scorer) as client:
        for _ in range(4):
            await fleet.serve(producer, 250)
            asked += len(await until_right(client, fleet))
            hits += fleet.hits()
            fleet.disturb(clear=0.5, restart=0.5)
    assert asked == 1_000
    assert hits > 1_000
