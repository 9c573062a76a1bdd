"""Decisions between two scorers on a real Kafka: shared, ended by time and epoch, joined with outcomes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from prometheus_client import REGISTRY

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import DecisionRecord, decode
from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.scorer.client import AsyncScorerClient, score_request
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.holders import pack_holder
from tests.integration.scorer_support import TableWorker, announce_pod

PARTITIONS = 2
EPOCH = 5
DELAY_SECONDS = 4.0


class Pair:
    """Scorers A and B on one Kafka, with a worker whose table the test writes."""

    def __init__(self, kafka: KafkaSettings, producer: AIOKafkaProducer, table: dict[bytes, bytes]) -> None:
        self.kafka, self._producer, self.table = kafka, producer, table
        self.one: AsyncScorerClient
        self.two: AsyncScorerClient
        self._names = iter(range(1_000))

    async def pod(self, name: str, epoch: int = EPOCH) -> None:
        """Announce a pod."""
        await announce_pod(self.kafka, self._producer, name, epoch)

    def prompt(self, pod: str = "", blocks: int = 0, model: str = "m") -> tuple[list[int], list[bytes]]:
        """Return tokens and block keys of a new prompt of six blocks, some of them held by a pod."""
        start = 1_000 * (next(self._names) + 1)
        tokens = list(range(start, start + 96))
        keys = block_keys(root_key(model), pack_tokens(tokens), 16)
        for key in keys[:blocks]:
            self.table[key] = pack_holder(pod_ref(pod), 0, 1, 0, 0, EPOCH)
        return tokens, keys

    async def speculative(self, client: AsyncScorerClient, pod: str, tokens: list[int]) -> int:
        """Return the blocks that a pod holds by decisions alone."""
        answer = await client.score("m", tokens=tokens)
        return answer.scores[pod].speculative_blocks if pod in answer.scores else 0

    async def outcomes(self, count: int) -> dict[str, DecisionRecord]:
        """Read outcome records from the log until there are so many."""
        topic = self.kafka.topic("kv-decisions")
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=self.kafka.brokers, auto_offset_reset="earliest")
        await consumer.start()
        found: dict[str, DecisionRecord] = {}
        try:
            async with asyncio.timeout(90):
                while len(found) < count:
                    for messages in (await consumer.getmany(timeout_ms=200)).values():
                        records = (decode(DecisionRecord, message.value) for message in messages)
                        found |= {record.request_id: record for record in records if record.kind == "outcome"}
        finally:
            await consumer.stop()
        return found


@pytest.fixture
async def pair(brokers: str, topic_prefix: str) -> AsyncIterator[Pair]:
    """Two scorers; A and B judge their decisions after some seconds, so that a busy machine gets done before."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=PARTITIONS)
    await ensure_topics(kafka, TOPICS)
    async with AIOKafkaProducer(bootstrap_servers=brokers) as producer:
        made = Pair(kafka, producer, {})
        worker = TableWorker(kafka, producer, made.table)
        await worker.start()
        for name in ("a", "b"):
            await made.pod(name)
        scorers = [
            ScorerService(ScorerSettings(listen="127.0.0.1:0", name=name, outcome_delay_ms=DELAY_SECONDS * 1e3), kafka)
            for name in ("A", "B")
        ]
        try:
            for scorer in scorers:
                await scorer.start()
                await asyncio.wait_for(scorer.ready.wait(), 90)
            async with AsyncScorerClient(scorers[0].address) as one, AsyncScorerClient(scorers[1].address) as two:
                made.one, made.two = one, two
                yield made
        finally:
            for scorer in scorers:
                await scorer.stop()
            await worker.stop()


async def _until(wanted: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(90):
        while not await wanted():
            await asyncio.sleep(0.05)


def _decision(request_id: str, pod: str, tokens: list[int], **fields: Any) -> pb.ReportDecisionRequest:
    return pb.ReportDecisionRequest(request_id=request_id, pod=pod, request=score_request("m", tokens=tokens), **fields)


async def test_a_decision_reported_to_one_scorer_holds_at_the_other_until_it_ends(pair: Pair) -> None:
    """B sees the speculative blocks soon, no longer than their time, and not past the end of the pod's epoch."""
    held, _ = pair.prompt()
    await pair.one.call("ReportDecision", _decision("held", "a", held, ttl_ms=60_000))

    async def shared() -> bool:
        return await pair.speculative(pair.two, "a", held) == 6

    await _until(shared)
    picked = await pair.two.call("Pick", pb.PickRequest(request=score_request("m", tokens=held)))
    assert picked.pod == "a"  # the rest of a burst follows the first request
    short, _ = pair.prompt()
    answer = await pair.one.call("ReportDecision", _decision("short", "a", short, ttl_ms=1_000))
    await asyncio.sleep(max(answer.expires_ns - time.time_ns(), 0) / 1e9 + 0.01)
    assert [await pair.speculative(client, "a", short) for client in (pair.one, pair.two)] == [0, 0]

    long, _ = pair.prompt()
    for pod in ("a", "b"):
        await pair.one.call("ReportDecision", _decision(f"long-{pod}", pod, long, ttl_ms=600_000))

    async def both() -> bool:
        return [await pair.speculative(pair.two, pod, long) for pod in ("a", "b")] == [6, 6]

    await _until(both)
    await pair.pod("a", epoch=EPOCH + 1)

    async def ended() -> bool:
        return await pair.speculative(pair.two, "a", long) == await pair.speculative(pair.one, "a", long) == 0

    await _until(ended)
    assert await pair.speculative(pair.two, "b", long) == 6


async def test_decisions_are_joined_with_what_the_index_shows_later(pair: Pair) -> None:
    """Hits, evictions, wrong predictions and ended epochs come out as such: as records and as metrics of the model."""
    hit, _ = pair.prompt("b", 4)
    evicted, evicted_keys = pair.prompt("b", 4)
    wrong, wrong_keys = pair.prompt("b", 4)
    stale, _ = pair.prompt("a", 4)
    before = {name: _metric(name) for name in ("hit", "lost-eviction", "wrong", "lost-stale")}
    blocks = {name: _blocks(name) for name in ("predicted", "real")}
    for request_id, pod, tokens in (
        ("hit", "b", hit),
        ("evicted", "b", evicted),
        ("wrong", "b", wrong),
        ("stale", "a", stale),
    ):
        await pair.one.call("ReportDecision", _decision(request_id, pod, tokens))
    for key in evicted_keys[2:]:
        pair.table.pop(key, None)
    for key in wrong_keys:
        pair.table.pop(key, None)
    await pair.pod("a", epoch=EPOCH + 1)

    found = await pair.outcomes(4)
    assert {name: (r.outcome, r.predicted_blocks, r.real_blocks) for name, r in found.items()} == {
        "hit": ("hit", 4, 4),
        "evicted": ("lost-eviction", 4, 2),
        "wrong": ("wrong", 4, 0),
        "stale": ("lost-stale", 4, 0),
    }
    assert {(r.scorer, r.model, r.keys) for r in found.values()} == {("A", "m", b"")}
    assert all(r.decided_ns > 0 for r in found.values())
    # Both scorers are in this process, and only the one that was told judges.
    assert {name: _metric(name) - value for name, value in before.items()} == dict.fromkeys(before, 1)
    assert {name: _blocks(name) - value for name, value in blocks.items()} == {"predicted": 16, "real": 6}


def _metric(outcome: str) -> float:
    return REGISTRY.get_sample_value("kvatlas_scorer_outcomes_total", {"model": "m", "outcome": outcome}) or 0.0


def _blocks(kind: str) -> float:
    return REGISTRY.get_sample_value(f"kvatlas_scorer_{kind}_blocks_total", {"model": "m"}) or 0.0
