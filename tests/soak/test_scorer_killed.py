"""One of two workers is killed while scores are asked for and updates come in: late or partial, never wrong."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer.client import AsyncScorerClient
from tests.integration.pipeline_support import Service
from tests.integration.scorer_support import ScoringFleet, got, until_right
from tests.integration.streams_support import WorkerProcess, make_topics, producing

#: Generous: on a busy machine everything takes its time, and the backlog of a takeover is read first.
_WAIT_SECONDS = 240.0
_DEADLINE_SECONDS = 60.0
_ASKERS = 4
#: A session that a busy machine does not end by itself: the worker must own its partitions when it is killed.
_WORKER = ("--session-timeout-seconds=12",)


@pytest.fixture
def started() -> Iterator[list[WorkerProcess | Service]]:
    """Put each process here, to be ended."""
    made: list[WorkerProcess | Service] = []
    yield made
    for process in made:
        process.close()


class Askers:
    """Ask for the same prompts again and again.

    Attributes:
        outcomes: answers by kind: `complete`, `partial`.
        wrong: answers that are not what the pods hold.
    """

    def __init__(self, fleet: ScoringFleet, client: AsyncScorerClient) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[object] = []
        self._fleet, self._client = fleet, client
        self._expected = [fleet.expected(prompt) for prompt in fleet.prompts]
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(_ASKERS)]

    async def _ask(self, number: int) -> None:
        while not self._stop.is_set():
            number = (number + 7) % len(self._expected)
            answer = await self._fleet.ask(self._client, self._fleet.prompts[number])
            found, expected = got(answer), self._expected[number]
            if answer.freshness.partial:
                self.outcomes["partial"] += 1
                right = all(name in expected and score <= expected[name] for name, score in found.items())
            else:
                self.outcomes["complete"] += 1
                right = found == expected
            if not right:
                self.wrong.append((number, answer.freshness.partial, expected, found))
            await asyncio.sleep(0.005)

    async def end(self) -> None:
        """Stop asking; raises the first error that a caller saw."""
        self._stop.set()
        await asyncio.gather(*self._tasks)


async def _pour(fleet: ScoringFleet, producer: AIOKafkaProducer, stop: asyncio.Event) -> None:
    while not stop.is_set():
        await fleet.serve(producer, 10)
        await asyncio.sleep(0.1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("colocated", [True, False], ids=["scorer in the survivor", "scorer apart"])
async def test_a_killed_worker_makes_answers_partial_and_never_wrong(
    brokers: str, topic_prefix: str, tmp_path: Path, started: list[WorkerProcess | Service], colocated: bool
) -> None:
    """After SIGKILL of one of two workers no caller sees an error or a wrong score, and later all is complete again."""
    kafka = await make_topics(brokers, topic_prefix)
    asked = ScoringFleet(kafka, pods=4, keep=100)
    others = ScoringFleet(kafka, pods=4, seed=5, model="other", pod_prefix="other-")
    scorer = ("--with-scorer", "--scorer-listen=127.0.0.1:0") if colocated else ()
    workers = [
        WorkerProcess(kafka, tmp_path / "w0", *_WORKER, *scorer),
        WorkerProcess(kafka, tmp_path / "w1", *_WORKER),
    ]
    started += workers
    ready = [await worker.ready() for worker in workers]
    address = ready[0].partition(" scorer=")[2] if colocated else _scorer(kafka, tmp_path, started)
    stop = asyncio.Event()
    async with producing(kafka) as producer, AsyncScorerClient(address, timeout_seconds=_DEADLINE_SECONDS) as client:
        await asked.serve(producer, 100)
        await until_right(client, asked, _WAIT_SECONDS)
        load = asyncio.create_task(_pour(others, producer, stop))
        askers = Askers(asked, client)
        await _reached(askers, "complete", 20)
        await _owned_by(client, asked, 2)
        workers[1].kill()
        before = askers.outcomes["partial"]
        await _reached(askers, "partial", before + 1)  # nobody else has its partitions before its session is over
        await until_right(client, asked, _WAIT_SECONDS)
        await _owned_by(client, asked, 1)
        await askers.end()
        stop.set()
        await load
        await until_right(client, others, _WAIT_SECONDS)
    assert not askers.wrong, (len(askers.wrong), askers.wrong[:3])


async def _reached(askers: Askers, kind: str, count: int) -> None:
    async with asyncio.timeout(_WAIT_SECONDS):
        while askers.outcomes[kind] < count:
            await asyncio.sleep(0.05)


def _scorer(kafka: KafkaSettings, folder: Path, started: list[WorkerProcess | Service]) -> str:
    flags = (f"--brokers={kafka.brokers}", f"--topic-prefix={kafka.topic_prefix}", "--listen=127.0.0.1:0")
    service = Service(folder / "scorer.log", "scorer", *flags)
    started.append(service)
    return service.ready()


async def _owned_by(client: AsyncScorerClient, fleet: ScoringFleet, workers: int) -> None:
    async with asyncio.timeout(_WAIT_SECONDS):
        while len(await _owners(client, fleet)) != workers:
            await asyncio.sleep(0.3)


async def _owners(client: AsyncScorerClient, fleet: ScoringFleet) -> set[str]:
    answers = [await fleet.ask(client, prompt) for prompt in fleet.prompts]
    return {part.worker for answer in answers for part in answer.freshness.partitions if part.role == "active"}
