"""A running replica of the log: a part that is gone before it was read, a move to another version, broken tasks."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from kvatlas.bridge.errors import TaskEndedError
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.block_key import partition_of
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.records import IndexCatalog, IndexVersion, PodRecord, WorkerRecord
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.scorer import Indexer
from kvatlas.scorer.errors import NotReadyError
from kvatlas.scorer.library.backends import Backend, MemoryBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from kvatlas.scorer.library.replica import Replica
from kvatlas.scorer.scoring.answers import Scored
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, Run, encode_blocks
from kvatlas.streams.index.holders import pack_holder
from tests.faults import InjectedError, Task, break_task, name_of, tasks_since
from tests.integration.streams_support import make_topics, producing

pytestmark = pytest.mark.kafka
EPOCH = epochs.epoch_of(5)
REF = pod_ids.pod_ref("a")
FIRST, SECOND = list(range(16)), list(range(100, 116))


class Log:
    """The workers' part: one pod's updates, a block each, with one position in its stream for all of them."""

    def __init__(self, kafka: KafkaSettings, producer: AIOKafkaProducer, partitions: int, version: str) -> None:
        self.topic = kafka.topic(topics.blocks_topic(version))
        self._kafka, self._producer, self._partitions = kafka, producer, partitions
        self._sequence = 0

    async def pod(self) -> None:
        """Say that the pod lives."""
        record = PodRecord(pod="a", writer=pod_ids.WRITER_BRIDGE, epoch=EPOCH, valid_from=EPOCH, model="m")
        key = pod_ids.pod_key(pod_ids.WRITER_BRIDGE, "a")
        await self._producer.send_and_wait(self._kafka.topic(topics.PODS), records.encode(record), key=key)

    async def worker(self, name: str, value: WorkerRecord | IndexCatalog) -> None:
        """Put a record on ``kv-workers``."""
        topic = self._kafka.topic(topics.WORKERS)
        await self._producer.send_and_wait(topic, records.encode(value), key=name.encode())

    async def update(self, op: int, key: bytes) -> None:
        """Add or remove a block."""
        self._sequence += 1
        run = Run(REF, EPOCH, self._sequence, self._sequence, 1)
        value = encode_blocks([run], key, bytes([op]), pack_holder(REF, 0, Tier.GPU, 0, 0, EPOCH), 0)
        partition = partition_of(key, self._partitions)
        await self._producer.send_and_wait(self.topic, value, partition=partition)

    async def lose(self) -> None:
        """Everything so far passes its retention."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self._kafka.brokers)
        await admin.start()
        ends = {TopicPartition(self.topic, n): RecordsToDelete(before_offset=-1) for n in range(self._partitions)}
        await admin.delete_records(ends)
        await admin.close()


async def until(indexer: Indexer, right: Callable[[Scored, Scored], bool]) -> tuple[Scored, Scored]:
    """Score both prompts until it is so."""
    async with asyncio.timeout(90):
        while True:
            both = await indexer.score_tokens(FIRST, "m"), await indexer.score_tokens(SECOND, "m")
            if right(*both):
                return both
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("make", [lambda _: MemoryBackend(), RocksBackend], ids=["memory", "rocksdb"])
async def test_a_hole_in_the_log_leaves_no_ghost(
    make: Callable[[Path], Backend], brokers: str, topic_prefix: str, tmp_path: Path
) -> None:
    """What was removed while Kafka was away, in records that nobody can read any more, is not scored."""
    kafka = await make_topics(brokers, topic_prefix, 2)
    async with producing(kafka) as producer, Indexer.from_kafka(kafka, make(tmp_path / "index")) as indexer:
        log = Log(kafka, producer, 2, topics.BASE_VERSION)
        (first,), (second,) = indexer.block_keys(FIRST, "m"), indexer.block_keys(SECOND, "m")
        await log.pod()
        await log.update(OP_ADD, first)
        await until(indexer, lambda one, _: bool(one.scores))
        replica = indexer._source
        assert isinstance(replica, Replica)
        blocks = replica._followers[-1]
        await blocks.stop()
        await log.update(OP_REMOVE, first)
        await log.lose()
        await log.update(OP_ADD, second)
        blocks.start()
        one, _ = await until(indexer, lambda _, two: bool(two.scores))
        assert not one.scores
        assert indexer.counts["rebuilt"] == 1
        assert not one.partial


async def test_a_replica_moves_with_the_scorers(brokers: str, topic_prefix: str, tmp_path: Path) -> None:
    """The catalog names another version: its log, block size and pods count; what was there before is gone."""
    kafka = await make_topics(brokers, topic_prefix, 2)
    await ensure_topics(kafka, topics.version_topics("kvatlas", "v2"))
    folder = tmp_path / "index"
    async with producing(kafka) as producer:
        base, other = Log(kafka, producer, 2, topics.BASE_VERSION), Log(kafka, producer, 2, "v2")
        async with Indexer.from_kafka(kafka, RocksBackend(folder)) as indexer:
            (first,) = indexer.block_keys(FIRST, "m")
            await base.pod()
            await base.update(OP_ADD, first)
            await until(indexer, lambda one, _: bool(one.scores))
            versions = {topics.BASE_VERSION: IndexVersion(), "v2": IndexVersion(block_size_tokens=8)}
            for size, name in ((16, topics.BASE_VERSION), (8, "v2")):
                record = WorkerRecord(worker=name, endpoint="e", block_size_tokens=size, index_version=name)
                await base.worker(name, record)
            await base.worker(records.CATALOG_KEY.decode(), IndexCatalog(active="v2", versions=versions, updated_ns=1))
            await until(indexer, lambda one, _: one.block_size_tokens == 8 and not one.partial)
            halves = indexer.block_keys(SECOND, "m")
            for key in halves:
                await other.update(OP_ADD, key)
            one, two = await until(indexer, lambda _, two: "a" in two.scores and two.scores["a"].matched_blocks == 2)
            assert not one.scores
            await base.update(OP_ADD, halves[0])  # the log that it has left
        async with Indexer.from_kafka(kafka, RocksBackend(folder)) as again:  # begins with the version in use
            assert (again.counts["resumed"], again.counts["updates"]) == (1, 0)
            assert (await again.score_tokens(SECOND, "m")).scores["a"].score == two.scores["a"].score
            catalog = IndexCatalog(active=topics.BASE_VERSION, versions=versions, updated_ns=2)
            await base.worker(records.CATALOG_KEY.decode(), catalog)
            one, _ = await until(again, lambda one, _: bool(one.scores))
            assert one.block_size_tokens == 16


def placed(before: set[Task]) -> list[tuple[tuple[str, int], Task]]:
    """Return the tasks since by name, and the how manieth of its name: some come and go."""
    seen: Counter[str] = Counter()
    found = []
    for task in tasks_since(before):
        name = name_of(task)
        found.append(((name, seen[name]), task))
        seen[name] += 1
    return found


@pytest.mark.timeout(600)
async def test_an_error_in_any_task_of_a_replica_is_shown_or_repaired(brokers: str, topic_prefix: str) -> None:
    """Task by task, Kafka's clients' too: scores are refused with the reason, or what is new is read; nothing hangs."""
    kafka = await make_topics(brokers, topic_prefix, 2)
    outcomes: dict[tuple[str, int], str] = {}
    async with producing(kafka) as producer:
        log = Log(kafka, producer, 2, topics.BASE_VERSION)
        await log.pod()
        for number in itertools.count():
            before = asyncio.all_tasks()
            async with Indexer.from_kafka(kafka) as indexer:
                left = [(place, task) for place, task in placed(before) if place not in outcomes]
                if not left:
                    break
                place, task = left[0]
                await break_task(task)
                prompt = range(number * 16, number * 16 + 16)
                (key,) = indexer.block_keys(list(prompt), "m")
                await log.update(OP_ADD, key)
                try:
                    async with asyncio.timeout(90):
                        while not (await indexer.score_tokens(list(prompt), "m")).scores:
                            await asyncio.sleep(0.02)
                    outcomes[place] = "repaired"
                except NotReadyError as error:
                    outcomes[place] = type(error.__cause__).__name__
    assert set(outcomes.values()) <= {"repaired", InjectedError.__name__, TaskEndedError.__name__}, outcomes
    shown = {name for (name, _), outcome in outcomes.items() if outcome != "repaired"}
    assert shown >= {"Replica._follow_catalog", "Replica._sweep_on", "TopicFollower._run"}, outcomes
