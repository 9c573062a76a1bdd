"""Ways to run stream workers, on the real Kafka: agents apart, over TLS and SASL, sweeping and forgetting."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from aiokafka import AIOKafkaProducer

from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.records import Control, PodRecord
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import read_topic
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.brokers.security import Security
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.streams.index.apply import meta_key
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.service import WorkerService
from tests.integration.streams_support import WorkerProcess, assert_true, fleet_of, make_topics, producing, until_true


async def test_resolve_and_index_run_apart(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """One worker resolves, two keep the index; the resolver and one indexer are killed and replaced; all is true."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    flags = ("--session-timeout-seconds=4",)
    for name, role in (("r", "resolve"), ("i", "index"), ("j", "index")):
        workers.append(WorkerProcess(kafka, tmp_path / name, f"--role={role}", *flags))
    for worker in workers:
        await worker.ready()
    async with producing(kafka) as producer:
        for turn in range(6):
            fleet.serve(20)
            fleet.disturb(clear=0.3, restart=0.3)
            await fleet.flush(producer)
            if turn == 3:
                workers[0].kill()
                workers[1].kill()
                workers.append(WorkerProcess(kafka, tmp_path / "r", "--role=resolve", *flags))
    await workers[3].ready()
    assert_true(await until_true(kafka, fleet.truth()), 4)
    survivor = {(tmp_path / "j" / "worker-id").read_text().strip()}
    deadline = time.monotonic() + 90
    while (owners := await announced_owners(kafka)) != survivor:  # what the killed one announced holds for a while
        assert time.monotonic() < deadline, (owners, survivor)
        await asyncio.sleep(0.5)


async def announced_owners(kafka: KafkaSettings) -> set[str]:
    """Return the workers whose announcements hold now and say that they own partitions."""
    announced: dict[bytes, bytes | None] = {}
    await read_topic(kafka, topics.WORKERS, lambda key, value, _: announced.__setitem__(key, value))
    told = [records.decode(records.WorkerRecord, value) for value in announced.values() if value]
    return {record.worker for record in told if record.partitions and record.expires_ns > time.time_ns()}


async def test_a_worker_speaks_tls_and_scram(tmp_path: Path, workers: list[WorkerProcess]) -> None:
    """Producer, consumers, restore and lookups' topics: every connection of a worker authenticates."""
    security = Security(users={"kvatlas": "a-secret"}, super_users=("kvatlas",))
    with KafkaNode(tmp_path / "kafka", security=security) as node:
        kafka = KafkaSettings(
            brokers=node.bootstrap,
            partitions=2,
            security_protocol="SASL_SSL",
            sasl_username="kvatlas",
            sasl_password="a-secret",
            ssl_cafile=str(node.certificate),
        )
        await ensure_topics(kafka, (*topics.TOPICS, *topics.changelog_topics("kvatlas")))
        secret = tmp_path / "secret"
        secret.write_text("a-secret\n")
        flags = (
            "--security-protocol=SASL_SSL",
            "--sasl-username=kvatlas",
            f"--sasl-password-file={secret}",
            f"--ssl-cafile={node.certificate}",
        )
        fleet = fleet_of(kafka)
        workers.append(WorkerProcess(kafka, tmp_path / "w", *flags))
        await workers[0].ready()
        producer = AIOKafkaProducer(**client_config(kafka, "test"))
        await producer.start()
        try:
            fleet.serve(40)
            await fleet.flush(producer)
            assert_true(await until_true(kafka, fleet.truth()), 4)
            workers[0].kill()
            fleet.serve(20)
            await fleet.flush(producer)
            workers.append(WorkerProcess(kafka, tmp_path / "v", *flags))
            await workers[1].ready()
            assert_true(await until_true(kafka, fleet.truth()), 4)
        finally:
            await producer.stop()


async def test_a_running_worker_sweeps_and_forgets(brokers: str, topic_prefix: str, tmp_path: Path) -> None:
    """Entries of ended epochs leave both tables; of a pod gone for long the state, position and record go too."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    settings = WorkerSettings(state_dir=str(tmp_path / "w"), sweep_interval_seconds=0.5, forget_gone_hours=2 / 3600)
    service = WorkerService(settings, kafka)
    await service.start()
    try:
        await asyncio.wait_for(service.ready.wait(), 90)
        async with producing(kafka) as producer:
            fleet.serve(60)
            await fleet.flush(producer)
            assert_true(await until_true(kafka, fleet.truth()), 4)
            gone = fleet.pods.pop("pod-0")
            await end(producer, kafka, gone.name)
            fleet.pods["pod-1"].clear()
            await fleet.flush(producer)
            ref = pod_ids.pod_ref(gone.name)
            app = service._app
            assert app is not None
            engine, index = app.sources[kafka.topic(topics.EVENTS)], service.index_table()

            def left() -> tuple[int, int]:
                keys = [key for table in (engine, index) for s in table.states.values() for key, _ in s.items()]
                mine = ref.to_bytes(8, "big")
                states = sum(key == eb.state_key(mine) or key == meta_key(ref) for key in keys)
                blocks = sum(key[:9] == mine + eb.KIND_BLOCK for key in keys)
                return states, blocks

            deadline = time.monotonic() + 90
            while left() != (0, 0):
                assert time.monotonic() < deadline, left()
                await asyncio.sleep(0.2)
            assert_true(await until_true(kafka, fleet.truth()), 3)
        last: dict[bytes, bytes | None] = {}
        await read_topic(kafka, topics.PODS, lambda key, value, _: last.__setitem__(key, value))
        assert last[pod_ids.pod_key(pod_ids.WRITER_STREAMS, gone.name)] is None
    finally:
        await service.stop()


async def end(producer: AIOKafkaProducer, kafka: KafkaSettings, pod: str) -> None:
    """Say that a pod is gone for good, as the bridge does: on its stream, and in the bridge's record of it."""
    incarnation = 1_800_000_000
    partition = pod_ids.pod_partition(pod, kafka.partitions)
    control = Control(type="gone", incarnation=incarnation)
    headers = [
        (topics.H_INCARNATION, str(incarnation).encode()),
        (topics.H_RECEIVE_NS, str(time.time_ns()).encode()),
        (topics.H_CONTENT_TYPE, topics.CONTENT_CONTROL.encode()),
        (topics.H_SEQUENCE, b"0"),
    ]
    await producer.send_and_wait(
        kafka.topic(topics.EVENTS), records.encode(control), key=pod.encode(), partition=partition, headers=headers
    )
    epoch = epochs.epoch_of(incarnation)
    record = PodRecord(
        pod=pod,
        writer=pod_ids.WRITER_BRIDGE,
        state=records.GONE,
        epoch=epoch,
        valid_from=epoch,
        updated_ns=time.time_ns(),
    )
    await producer.send_and_wait(
        kafka.topic(topics.PODS),
        records.encode(record),
        key=pod_ids.pod_key(pod_ids.WRITER_BRIDGE, pod),
        partition=partition,
    )
