"""The scorer on a real Kafka: pods and workers from their topics, decisions between two scorers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, partition_of, root_key
from kvatlas.bridge.model.pod_ids import pod_key, pod_ref
from kvatlas.bridge.model.records import PodRecord, WorkerRecord, encode
from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.methods import add_service, stub_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.scorer.client import AsyncScorerClient, score_request
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.scorer.v1 import indexer_pb2
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.columns import answer_columns
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.v1 import block_index_pb2 as index_pb

PARTITIONS = 4
TOKENS = list(range(500, 500 + 96))
KEYS = block_keys(root_key("m"), pack_tokens(TOKENS), 16)


class Index:
    """A lookup service over a dict."""

    def __init__(self, table: dict[bytes, bytes]) -> None:
        self.table = table

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        keys = [request.keys[at : at + 16] for at in range(0, len(request.keys), 16)]
        values, index = answer_columns([self.table.get(key) for key in keys])
        touched = {partition_of(key, PARTITIONS) for key in keys}
        states = [index_pb.PartitionState(partition=p, role=index_pb.PartitionState.ACTIVE) for p in touched]
        return index_pb.LookupResponse(values=values, index=index, partitions=states, worker="w")


async def test_two_scorers_follow_the_topics_and_share_decisions(
    brokers: str, topic_prefix: str, tmp_path: Any
) -> None:
    """Pods and workers come from Kafka, raised epochs take effect, a decision reaches the other scorer."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=PARTITIONS)
    await ensure_topics(kafka, TOPICS)
    server = grpc.aio.server()
    table = {key: pack_holder(pod_ref("a"), 0, 1, 0, 0, 5) for key in KEYS[:4]}
    add_service(server, index_pb, Index(table))
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await producer.start()

    async def put_pod(name: str, epoch: int) -> None:
        record = PodRecord(pod=name, writer="streams", model="m", block_size_tokens=16, epoch=epoch, valid_from=epoch)
        await producer.send_and_wait(kafka.topic("kv-pods"), encode(record), key=pod_key("streams", name))

    await put_pod("a", 5)
    await put_pod("b", 5)
    now = time.time_ns()
    worker = WorkerRecord(
        worker="w",
        endpoint=endpoint,
        partitions=list(range(PARTITIONS)),
        partition_count=PARTITIONS,
        updated_ns=now,
        expires_ns=now + 600_000_000_000,
    )
    await producer.send_and_wait(kafka.topic("kv-workers"), encode(worker), key=b"w")

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

            await put_pod("a", 6)  # restarted: nothing stored before is there

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
        await server.stop(0)
