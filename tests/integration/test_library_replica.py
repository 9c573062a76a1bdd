"""A replica of the log in RocksDB: it goes on where it was, and starts anew where the log has forgotten."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from kvatlas.bridge.model import topics
from kvatlas.deploy.sim.cache import Request
from kvatlas.scorer import Indexer
from kvatlas.scorer.library.backends.rocks import RocksBackend
from tests.integration.streams_support import PARTITIONS, WorkerProcess, fleet_of, make_topics, producing
from tests.log_fleet import LogFleet

MODEL = "sim-model"


async def wrong(indexer: Indexer, fleet: LogFleet, served: list[Request]) -> int:
    """Count prompts that score otherwise than the pods themselves say."""
    count = 0
    for request in served:
        words: dict[str, Any] = {"lora": request.lora, "cache_salt": request.cache_salt}
        scored = await indexer.score_tokens(request.tokens, MODEL, **words)
        said = {name: pod.expect(request.tokens, model=MODEL, **words) for name, pod in fleet.pods.items()}
        expected = {name: found.matched_blocks for name, found in said.items() if found}
        count += {name: found.matched_blocks for name, found in scored.scores.items()} != expected
    return count


async def until_right(indexer: Indexer, fleet: LogFleet, served: list[Request]) -> None:
    """Wait until every prompt scores as the pods say."""
    deadline = time.monotonic() + 120
    while found := await wrong(indexer, fleet, served):
        assert time.monotonic() < deadline, f"{found} of {len(served)} prompts score wrong"
        await asyncio.sleep(0.5)


async def test_a_replica_on_disk_goes_on_where_it_was(brokers: str, topic_prefix: str, tmp_path: Path) -> None:
    """Opened again it reads only what is new; when the log has lost a part of that it is read anew."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka, pods=3, blocks=256)
    worker = WorkerProcess(kafka, tmp_path / "worker")
    served: list[Request] = []

    async def serve(requests: int) -> None:
        async with producing(kafka) as producer:
            served.extend(fleet.serve(requests))
            fleet.disturb(clear=1.0, restart=0.0)
            await fleet.flush(producer)

    try:
        await worker.ready(150)
        await serve(40)
        async with Indexer.from_kafka(kafka, RocksBackend(tmp_path / "index")) as first:
            await until_right(first, fleet, served)
            assert first.counts["resumed"] == 0
            before = first.counts["updates"]
        await serve(10)
        async with Indexer.from_kafka(kafka, RocksBackend(tmp_path / "index")) as second:
            await until_right(second, fleet, served)
            assert (second.counts["resumed"], second.counts["updates_late"]) == (1, 0)
            assert 0 < second.counts["updates"] < before / 2

        await serve(10)
        async with Indexer.from_kafka(kafka) as whole:
            await until_right(whole, fleet, served)  # so that everything is on the log
        admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
        await admin.start()
        topic = kafka.topic(topics.BLOCKS)
        await admin.delete_records(
            {TopicPartition(topic, n): RecordsToDelete(before_offset=-1) for n in range(PARTITIONS)}
        )
        await admin.close()
        async with Indexer.from_kafka(kafka, RocksBackend(tmp_path / "index")) as third:
            assert third.counts["resumed"] == 0
            scored = [await third.score_tokens(request.tokens, MODEL) for request in served]
            assert not any(answer.scores for answer in scored)  # a missed hit, never a block that may be gone
    finally:
        worker.close()
