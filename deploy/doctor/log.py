"""Checks of the log: Kafka, topics, their retention, rights, the workers on it, and how far behind they are.

:func:`look_at_log` gathers, :func:`judge_log` decides; the second is pure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Final

import msgspec

from kvatlas.bridge.errors import KvatlasError, LogError, RightsError
from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.model.epochs import incarnation_of
from kvatlas.bridge.model.records import GONE, PodRecord, WorkerRecord
from kvatlas.bridge.model.topics import Topic
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.errors import TopicPolicyError
from kvatlas.deploy.brokers.rights import check_rights, contact, rights_of
from kvatlas.deploy.brokers.topics import ensure_topics, read_configs
from kvatlas.deploy.doctor.findings import Finding, State
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.lookups.versions import VersionReader, Versions

_READ_SECONDS: Final = 15.0
_TURN_SECONDS: Final = 0.25
_HOUR_MS: Final = 3_600_000
_UNLIMITED: Final = "-1"
_SHOWN: Final = 8


class LogSeen(msgspec.Struct):
    """What was seen of Kafka and of what is on it.

    Attributes:
        brokers, partitions: as the settings say them.
        away, topics, policy, rights, unread: why Kafka does not answer, topics are not as they should be, are cleaned
            otherwise, are not to be read by this account, cannot be read; empty where all is well.
        wanted: full topic name -> how the table declares it.
        configs: full topic name -> entries of its configuration, where they may be read.
        workers: the workers that have announced themselves; None where that was not reached.
        behind: pod or worker -> messages and records that were there at first and were not applied.
        still: the same after ``waited_seconds``.
        taken: topic -> records that its retention took before they were applied.
    """

    brokers: str
    partitions: int
    away: str = ""
    topics: str = ""
    policy: str = ""
    rights: str = ""
    unread: str = ""
    wanted: Mapping[str, Topic] = {}
    configs: Mapping[str, Mapping[str, str]] = {}
    workers: WorkerDirectory | None = None
    behind: dict[str, int] = {}
    still: dict[str, int] = {}
    taken: dict[str, int] = {}
    waited_seconds: float = 0.0


async def look_at_log(kafka: KafkaSettings, app: str, *, wait_seconds: float) -> LogSeen:
    """Look at Kafka, as far as it lets us; waits as long as given for workers to apply what is there now."""
    seen = LogSeen(kafka.brokers, kafka.partitions)
    try:
        (await contact(kafka)).close()
    except KvatlasError as error:
        seen.away = str(error)
        return seen
    declared = (*topics.TOPICS, *topics.changelog_topics(app))
    try:
        counts = await ensure_topics(msgspec.structs.replace(kafka, create_topics=False), declared)
        seen.wanted = {kafka.topic(topic.name): topic for topic in declared}
        seen.configs = await read_configs(kafka, counts, ("retention.ms", "retention.bytes"))
    except TopicPolicyError as error:
        seen.policy = str(error)
        return seen
    except KvatlasError as error:
        seen.topics = str(error)
        return seen
    try:
        await check_rights(kafka, rights_of("top", kafka))
    except RightsError as error:
        seen.rights = str(error)
        return seen
    try:
        await _follow(kafka, seen, wait_seconds)
    except LogError as error:
        seen.unread = str(error)
    return seen


async def _follow(kafka: KafkaSettings, seen: LogSeen, wait_seconds: float) -> None:
    """Read pods and workers of the index version that answers, and wait for what is there to be applied."""
    versions = Versions(lambda name: VersionReader(name, kafka, client_id="kvatlas-doctor"), "", lambda _used: None)
    try:
        await versions.start(_READ_SECONDS)
        used = versions.used
        seen.workers = used.workers
        if used.workers.layout is None or used.workers.uncovered():
            return
        blocks = kafka.topic(topics.blocks_topic(used.name))
        async with RangeReader(kafka, "kvatlas-doctor") as reader:
            edges = await reader.edges(blocks, range(used.workers.layout.partition_count))
        starts = {number: edge.first for number, edge in edges.items()}
        ends = {number: edge.end for number, edge in edges.items()}
        sent = _said(used.pods)
        began = time.monotonic()
        seen.behind = seen.still = _behind(used.pods, sent, used.workers, (starts, ends))
        seen.taken = {record.worker: lost for record in _alive(used.workers) if (lost := taken(record, starts))}
        while any(seen.still.values()) and time.monotonic() < began + wait_seconds:
            await asyncio.sleep(_TURN_SECONDS)
            seen.still = _behind(used.pods, sent, used.workers, (starts, ends))
        seen.waited_seconds = time.monotonic() - began
    finally:
        await versions.stop()


def _said(pods: PodTable) -> dict[str, PodRecord]:
    """Return what the bridge has put on the log, by pod."""
    found = {name: pods.parts(name).get(pod_ids.WRITER_BRIDGE) for name in pods.merged}
    return {name: record for name, record in found.items() if record is not None and record.state != GONE}


def _behind(
    pods: PodTable, sent: Mapping[str, PodRecord], workers: WorkerDirectory, bounds: tuple[dict[int, int], ...]
) -> dict[str, int]:
    found = {name: unapplied(record, pods.parts(name).get(pod_ids.WRITER_STREAMS)) for name, record in sent.items()}
    return found | {record.worker: unread(record, *bounds) for record in _alive(workers)}


def _alive(workers: WorkerDirectory) -> list[WorkerRecord]:
    return [record for record in workers.records.values() if record.expires_ns > time.time_ns()]


def unapplied(sent: PodRecord, applied: PodRecord | None) -> int:
    """Return how many messages of a pod are on the log and not applied."""
    if applied is None or incarnation_of(applied.epoch) < incarnation_of(sent.epoch):
        return sent.last_sequence + 1
    if incarnation_of(applied.epoch) > incarnation_of(sent.epoch):
        return 0
    return max(0, sent.last_sequence - applied.last_sequence)


def unread(worker: WorkerRecord, starts: Mapping[int, int], ends: Mapping[int, int]) -> int:
    """Return how many records that are there a worker has not applied, in its own partitions."""
    nexts = {part: max(worker.offsets.get(part, -1) + 1, starts[part]) for part in worker.partitions if part in starts}
    return sum(max(0, ends[part] - at) for part, at in nexts.items())


def taken(worker: WorkerRecord, starts: Mapping[int, int]) -> int:
    """Return how many records a worker was going to apply that are no longer there."""
    at = {part: worker.offsets.get(part, -1) for part in worker.partitions}
    return sum(max(0, starts.get(part, 0) - offset - 1) for part, offset in at.items() if offset >= 0)


def judge_log(seen: LogSeen) -> list[Finding]:
    """Return what is wrong with the log. Pure."""
    where = f"Kafka {seen.brokers}"
    if seen.away:
        return [Finding("kafka", where, "fail", seen.away)]
    found = [Finding("kafka", where, "ok", "answers")]
    if seen.topics:
        return [*found, Finding("topics", where, "fail", seen.topics)]
    if seen.policy:
        return [*found, Finding("retention", where, "fail", seen.policy)]
    found.append(Finding("topics", where, "ok", f"{len(seen.wanted)} topics of {seen.partitions} partitions"))
    found.append(_of_retention(where, seen))
    if seen.rights:
        return [*found, Finding("rights", where, "fail", seen.rights)]
    found.append(Finding("rights", where, "ok", "topics can be read"))
    if seen.unread or seen.workers is None:
        return [*found, Finding("workers", "workers", "fail", seen.unread)]
    workers = judge_workers(seen.workers, seen.partitions)
    return [*found, workers] if workers.state == "fail" else [*found, workers, _of_lag(seen)]


def _of_retention(where: str, seen: LogSeen) -> Finding:
    short = []
    for name, config in seen.configs.items():
        topic = seen.wanted[name]
        if not topic.retention_hours:
            continue
        kept, size = config.get("retention.ms", _UNLIMITED), config.get("retention.bytes", _UNLIMITED)
        if kept != _UNLIMITED and int(kept) < topic.retention_hours * _HOUR_MS:
            short.append(f"{name} keeps {int(kept) / _HOUR_MS:g} h of the {topic.retention_hours} h that are wanted")
        if size != _UNLIMITED:
            short.append(f"{name} keeps {size} bytes a partition, however new they are")
    if not seen.configs:
        return Finding("retention", where, "skip", "this account may not read it, or this broker keeps all")
    return Finding("retention", where, "warn" if short else "ok", "; ".join(short) or "as the topic table asks for")


def judge_workers(table: WorkerDirectory, partitions: int) -> Finding:
    """Return whether every partition of the index has a live owner. Pure."""
    if not table.records:
        return Finding("workers", "workers", "fail", "no worker has announced itself")
    lonely = [number for number in range(partitions) if not table.route(number).owners]
    if not lonely:
        return Finding("workers", "workers", "ok", f"{len(table.records)} own all {partitions} partitions")
    refused = "".join(f"; {name}: {why}" for name, why in table.refused.items())
    shown = ", ".join(map(str, lonely[:_SHOWN])) + (" and more" if len(lonely) > _SHOWN else "")
    return Finding("workers", "workers", "fail", f"{len(lonely)} of {partitions} have none: {shown}{refused}")


def _of_lag(seen: LogSeen) -> Finding:
    if seen.taken:
        lost = ", ".join(f"{name}: {count}" for name, count in seen.taken.items())
        return Finding("lag", "workers", "fail", f"records that were removed before they were applied: {lost}")
    late = sorted(((count, name) for name, count in seen.still.items() if count), reverse=True)
    if not late:
        return Finding("lag", "workers", "ok", f"all that was there was applied within {seen.waited_seconds:.0f} s")
    moves = sum(seen.still.values()) < sum(seen.behind.values())
    state: State = "warn" if moves else "fail"
    shown = ", ".join(f"{name}: {count}" for count, name in late[:_SHOWN])
    said = f"after {seen.waited_seconds:.0f} s {'still' if moves else 'as much as before is'} not applied: {shown}"
    return Finding("lag", "workers", state, said)
