"""What the tests of the scorer share: a fleet on the log with the questions that its traffic makes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from aiokafka import AIOKafkaProducer

from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.client import AsyncScorerClient
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.log_fleet import LogFleet

Score = tuple[int, int, float]


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
