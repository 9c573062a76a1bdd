"""Checks of what stands between engine and answer: Kafka, topics, rights, workers, scorer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from kvatlas.bridge.errors import KvatlasError, RightsError
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import check_rights, contact, rights_of
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.doctor.engine import EngineSeen
from kvatlas.deploy.doctor.findings import Finding
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.v1 import scorer_pb2 as pb

_READ_SECONDS: Final = 10.0


async def check_log(kafka: KafkaSettings, app: str) -> list[Finding]:
    """Check Kafka, topics, rights and the workers that have announced themselves."""
    where = f"Kafka {kafka.brokers}"
    try:
        (await contact(kafka)).close()
    except KvatlasError as error:
        return [Finding("kafka", where, "fail", str(error))]
    found = [Finding("kafka", where, "ok", "answers")]
    wanted = (*topics.TOPICS, *topics.changelog_topics(app))
    try:
        counts = await ensure_topics(msgspec.structs.replace(kafka, create_topics=False), wanted)
    except KvatlasError as error:
        return [*found, Finding("topics", where, "fail", str(error))]
    found.append(Finding("topics", where, "ok", f"{len(counts)} topics of {kafka.partitions} partitions"))
    try:
        await check_rights(kafka, rights_of("top", kafka))
    except RightsError as error:
        return [*found, Finding("rights", where, "fail", str(error))]
    found.append(Finding("rights", where, "ok", "topics can be read"))
    return [*found, await _check_workers(kafka)]


async def _check_workers(kafka: KafkaSettings) -> Finding:
    table = WorkerDirectory(time.time_ns)
    follower = TopicFollower(kafka, topics.WORKERS, table.apply, client_id="kvatlas-doctor")
    follower.start()
    try:
        await follower.wait(_READ_SECONDS)
    except KvatlasError as error:
        return Finding("workers", "workers", "fail", str(error))
    finally:
        await follower.stop()
    return judge_workers(table, kafka.partitions)


def judge_workers(table: WorkerDirectory, partitions: int) -> Finding:
    """Return whether every partition of the index has a live owner. Pure."""
    if not table.records:
        return Finding("workers", "workers", "fail", "no worker has announced itself")
    lonely = [number for number in range(partitions) if not table.route(number).owners]
    if not lonely:
        return Finding("workers", "workers", "ok", f"{len(table.records)} own all {partitions} partitions")
    refused = "".join(f"; {name}: {why}" for name, why in table.refused.items())
    shown = ", ".join(map(str, lonely[:8])) + (" and more" if len(lonely) > 8 else "")
    return Finding("workers", "workers", "fail", f"{len(lonely)} of {partitions} have none: {shown}{refused}")


async def check_scorer(client: ScorerClient, address: str, engines: Sequence[EngineSeen]) -> list[Finding]:
    """Check the scorer, and what it knows of the engines."""
    where = f"scorer {address}"
    try:
        pods = await asyncio.to_thread(client.list_pods)
    except ClientError as error:
        return [Finding("scorer", where, "fail", str(error))]
    return [Finding("scorer", where, "ok", f"knows {len(pods)} pods"), *judge_pods(pods, engines)]


async def block_size(client: ScorerClient, engines: Sequence[EngineSeen]) -> int | None:
    """Return the index's block size (tokens) as the scorer says it; None where it does not."""
    models = [seen.facts.models[0] for seen in engines if seen.facts is not None and seen.facts.models]
    try:
        answer = await asyncio.to_thread(client.score, models[0] if models else "any", tokens=[1])
    except ClientError:
        return None
    return answer.block_size_tokens or None


def judge_pods(pods: Sequence[pb.PodInfo], engines: Sequence[EngineSeen]) -> list[Finding]:
    """Return whether each engine's pods are known, live, whole, and under the engine's own model name. Pure."""
    found = []
    for seen in engines:
        if seen.facts is None or not seen.sources:
            continue
        lives = {source.source.live for source in seen.sources}
        mine = [pod for pod in pods if pod.endpoint in lives]
        if len(mine) < len(lives):
            unknown = ", ".join(sorted(lives - {pod.endpoint for pod in mine}))
            found.append(Finding("pods", seen.url, "fail", f"the scorer knows no pod of {unknown}"))
            continue
        dead = [f"{pod.pod} is {pod.state}" for pod in mine if pod.state != "live"]
        names = ", ".join(pod.pod for pod in mine)
        found.append(Finding("pods", seen.url, "fail" if dead else "ok", "; ".join(dead) or f"{names} live"))
        odd = sorted({pod.model for pod in mine} - set(seen.facts.models)) if seen.facts.models else []
        said = f"the index says {', '.join(map(repr, odd))}, the engine serves {', '.join(seen.facts.models)}"
        served = ", ".join(sorted({pod.model for pod in mine}))
        found.append(Finding("model-name", seen.url, "fail" if odd else "ok", said if odd else served))
        lost = [f"{pod.pod} lost {pod.lost} messages" for pod in mine if pod.lost]
        found.append(Finding("gaps", seen.url, "warn" if lost else "ok", "; ".join(lost) or "nothing was lost"))
    return found
