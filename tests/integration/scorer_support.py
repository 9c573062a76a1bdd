"""What the tests of the scorer share: a fleet on the log with the questions that its traffic makes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model.block_key import partition_of
from kvatlas.bridge.model.pod_ids import pod_key
from kvatlas.bridge.model.records import PodRecord, WorkerRecord, encode
from kvatlas.bridge.runtime.methods import add_service
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.client import AsyncScorerClient
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.columns import answer_columns
from kvatlas.streams.v1 import block_index_pb2 as index_pb
from tests.log_fleet import LogFleet

Score = tuple[int, int, float]


class TableWorker:
    """A worker over a dict: its lookup service, announced on ``kv-workers``."""

    def __init__(self, kafka: KafkaSettings, producer: AIOKafkaProducer, table: dict[bytes, bytes]) -> None:
        self._kafka, self._producer, self._table = kafka, producer, table
        self._server = grpc.aio.server()
        add_service(self._server, index_pb, self)

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        keys = [request.keys[at : at + 16] for at in range(0, len(request.keys), 16)]
        values, index = answer_columns([self._table.get(key) for key in keys])
        touched = {partition_of(key, self._kafka.partitions) for key in keys}
        states = [index_pb.PartitionState(partition=p, role=index_pb.PartitionState.ACTIVE) for p in touched]
        return index_pb.LookupResponse(values=values, index=index, partitions=states, worker="w")

    async def start(self) -> None:
        endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        now, count = time.time_ns(), self._kafka.partitions
        worker = WorkerRecord(
            worker="w",
            endpoint=endpoint,
            partitions=list(range(count)),
            partition_count=count,
            updated_ns=now,
            expires_ns=now + 600_000_000_000,
        )
        await self._producer.send_and_wait(self._kafka.topic("kv-workers"), encode(worker), key=b"w")

    async def stop(self) -> None:
        await self._server.stop(0)


async def announce_pod(kafka: KafkaSettings, producer: AIOKafkaProducer, name: str, epoch: int) -> None:
    """Put a pod's record on ``kv-pods``, as the workers do."""
    record = PodRecord(pod=name, writer="streams", model="m", block_size_tokens=16, epoch=epoch, valid_from=epoch)
    await producer.send_and_wait(kafka.topic("kv-pods"), encode(record), key=pod_key("streams", name))


class ScoringFleet:
    """Pods on the log, the prompts they were given, and what each pod must score for one.

    Attributes:
        prompts: the latest requests, with their outputs as the next turn sends them.
    """

    def __init__(self, kafka: KafkaSettings, pods: int, blocks: int = 256, keep: int = 60, **settings: Any) -> None:
        settings = {"cpu_blocks": 64, "lora_share": 0.1, "system_tokens": 128, "sessions": 16, **settings}
        options = SimPlan(pods=pods, blocks=blocks, **settings)
        self.model = options.model
        self.prompts: list[Request] = []
        self._keep = keep
        self._fleet = LogFleet(kafka, kafka.partitions, options)

    @property
    def pods(self) -> list[str]:
        """Names of the pods."""
        return list(self._fleet.pods)

    async def serve(self, producer: AIOKafkaProducer, count: int) -> None:
        """Run requests and put their events on the log."""
        self.prompts = [*self.prompts, *self._fleet.serve(count)][-self._keep :]
        await self._fleet.flush(producer)

    def disturb(self, clear: float, restart: float) -> None:
        """Clear or restart a random pod with these probabilities; its events go with the next requests'."""
        self._fleet.disturb(clear, restart)

    def expected(self, prompt: Request) -> dict[str, Score]:
        """Return matched blocks, tokens and score per pod that has any."""
        found = {}
        for name, pod in self._fleet.pods.items():
            answer = pod.expect(
                [*prompt.tokens, *prompt.output],
                model=self.model,
                cache_salt=prompt.cache_salt,
                lora=prompt.lora,
            )
            if answer is not None:
                found[name] = (answer.matched_blocks, answer.matched_tokens, round(answer.score, 6))
        return found

    def hits(self) -> int:
        """Return the pods that hold something of the prompts, over all prompts."""
        return sum(len(self.expected(prompt)) for prompt in self.prompts)

    async def ask(self, client: AsyncScorerClient, prompt: Request) -> pb.ScoreResponse:
        """Ask for a prompt's scores."""
        return await client.score(
            self.model,
            tokens=[*prompt.tokens, *prompt.output],
            cache_salt=prompt.cache_salt,
            lora=prompt.lora,
        )


def got(answer: pb.ScoreResponse) -> dict[str, Score]:
    """Return an answer as :meth:`ScoringFleet.expected` says it."""
    return {
        name: (entry.matched_blocks, entry.matched_tokens, round(entry.score, 6))
        for name, entry in answer.scores.items()
    }


async def until_right(client: AsyncScorerClient, fleet: ScoringFleet, timeout: float = 120.0) -> list[pb.ScoreResponse]:
    """Ask all prompts until every answer is complete and the oracle's; returns the answers."""
    deadline = time.monotonic() + timeout
    expected = [fleet.expected(prompt) for prompt in fleet.prompts]
    while True:
        answers = [await fleet.ask(client, prompt) for prompt in fleet.prompts]
        wrong = [
            (number, answer.freshness.partial, truth, got(answer))
            for number, (truth, answer) in enumerate(zip(expected, answers, strict=True))
            if answer.freshness.partial or got(answer) != truth
        ]
        if not wrong:
            return answers
        assert time.monotonic() < deadline, (len(wrong), wrong[:3])
        await asyncio.sleep(0.2)


def addresses_of(ready: str) -> tuple[str, str]:
    """Split what a worker with a scorer says when it is ready: addresses of lookups and of scores."""
    lookups, _, scorer = ready.partition(" scorer=")
    assert scorer, ready
    return lookups, scorer
