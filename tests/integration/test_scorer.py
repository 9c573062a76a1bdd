"""The scorer on a real Kafka: pods and workers from their topics, decisions between two scorers."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.scorer.client import AsyncScorerClient, score_request
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.scorer.v1 import indexer_pb2
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.holders import pack_holder
from tests.integration.scorer_support import TableWorker, announce_pod

PARTITIONS = 4
TOKENS = list(range(500, 500 + 96))
KEYS = block_keys(root_key("m"), pack_tokens(TOKENS), 16)


async def test_two_scorers_follow_the_topics_and_share_decisions(
    brokers: str, topic_prefix: str, tmp_path: Any
) -> None:
    """Pods and workers come from Kafka, raised epochs take effect, a decision reaches the other scorer."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=PARTITIONS)
    await ensure_topics(kafka, TOPICS)
    table = {key: pack_holder(pod_ref("a"), 0, 1, 0, 0, 5) for key in KEYS[:4]}
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await producer.start()

    await announce_pod(kafka, producer, "a", 5)
    await announce_pod(kafka, producer, "b", 5)
    worker = TableWorker(kafka, producer, table)
    await worker.start()
    socket = tmp_path / "scorer.socket"
    scorers = [
        ScorerService(ScorerSettings(listen="127.0.0.1:0", socket=str(socket), name="s0"), kafka),
        ScorerService(ScorerSettings(listen="127.0.0.1:0", name="s1"), kafka),
    ]
    try:
        for scorer in scorers:
            await scorer.start()
            await asyncio.wait_for(scorer.ready.wait(), 90)
        async with AsyncScorerClient(scorers[0].address) as one, AsyncScorerClient(scorers[1].address) as two:
            answer = await one.score("m", tokens=TOKENS)
            assert {pod: entry.score for pod, entry in answer.scores.items()} == {"a": 4.0}

            decision = pb.ReportDecisionRequest(
                request_id="r", pod="b", ttl_ms=600_000, request=score_request("m", tokens=TOKENS)
            )
            await one.call("ReportDecision", decision)

            async def speculative() -> int:
                return int((await two.score("m", tokens=TOKENS)).scores["b"].speculative_blocks)

            async def until(wanted: Any) -> None:
                async with asyncio.timeout(90):
                    while not await wanted():
                        await asyncio.sleep(0.05)

            async def held() -> bool:
                return await speculative() == len(KEYS)

            await until(held)

            await announce_pod(kafka, producer, "a", 6)  # restarted: nothing stored before is there

            async def ended() -> bool:
                return "a" not in (await two.score("m", tokens=TOKENS)).scores

            await until(ended)
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            stub = stub_of(channel, indexer_pb2)
            try:
                await stub.GetPodScores(indexer_pb2.GetPodScoresRequest(prompt="hello", model_name="m"))
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            assert code == "NOT_FOUND"  # served there; this scorer has no tokenizer for the model
    finally:
        for scorer in scorers:
            await scorer.stop()
        await producer.stop()
        await worker.stop()
