"""The stream worker on the real Kafka: killed, restored, taken over, stopped; the index stays what the pods hold."""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from pathlib import Path

import grpc
import pytest

from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.deploy.audit.audit import fold_events, read_records, read_topic
from kvatlas.streams.index.columns import NOT_ANSWERED, read_index
from kvatlas.streams.resolve.resolver import ResolveOptions
from kvatlas.streams.v1 import block_index_pb2 as pb
from tests.integration.streams_support import (
    PARTITIONS,
    WorkerProcess,
    assert_true,
    fleet_of,
    lookup,
    make_topics,
    names_owner,
    producing,
    roles_in,
    until_true,
    wait_answer,
    wait_roles,
)


async def test_index_is_true_after_a_kill_in_the_middle_of_the_stream(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """A worker killed with SIGKILL while it works and started again ends with exactly what the pods hold."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    workers.append(WorkerProcess(kafka, tmp_path / "w"))
    await workers[0].ready()
    async with producing(kafka) as producer:
        for turn in range(12):
            fleet.serve(20)
            fleet.disturb(clear=0.3, restart=0.3)
            await fleet.flush(producer)
            if turn == 5:
                workers[0].kill()
                workers.append(WorkerProcess(kafka, tmp_path / "w"))
    await workers[1].ready()
    assert_true(await until_true(kafka, fleet.truth()), 4)
    assert workers[1].terminate() == 0, workers[1].tail()


async def test_index_is_restored_from_the_changelog_alone(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """A worker whose disk is gone has the whole index back from Kafka before it answers, and goes on from there."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    workers.append(WorkerProcess(kafka, tmp_path / "w"))
    await workers[0].ready()
    async with producing(kafka) as producer:
        fleet.serve(120)
        await fleet.flush(producer)
        assert_true(await until_true(kafka, fleet.truth()), 4)
        # With its last commit made: what a killed one had not written is read from the source again, after it is ready.
        assert workers[0].terminate() == 0, workers[0].tail()
        shutil.rmtree(tmp_path / "w")
        workers.append(WorkerProcess(kafka, tmp_path / "w"))
        stored = sorted({key for tiers in fleet.truth().values() for key in tiers["gpu"]})
        found = read_index((await lookup(await workers[1].ready(), stored)).index)
        assert len(found) == len(stored)
        assert not {0, NOT_ANSWERED} & set(found)
        assert_true(await until_true(kafka, fleet.truth()), 4)  # nothing was sent meanwhile
        fleet.serve(40)
        await fleet.flush(producer)
        assert_true(await until_true(kafka, fleet.truth()), 4)
    truth = await fold_events(kafka, ResolveOptions())
    held = fleet.truth()
    assert {pod: tiers.get("gpu", frozenset()) for pod, tiers in truth.items()} == {
        pod: tiers["gpu"] for pod, tiers in held.items()
    }


async def test_a_standby_answers_flagged_and_then_takes_over(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """When an owner dies its standby answers at once, flagged, and is the owner after the session timeout."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    flags = ("--standbys=1", "--session-timeout-seconds=4")
    workers.append(WorkerProcess(kafka, tmp_path / "a", *flags))
    workers.append(WorkerProcess(kafka, tmp_path / "b", *flags))
    addresses = [await worker.ready() for worker in workers]
    async with producing(kafka) as producer:
        fleet.serve(100)
        await fleet.flush(producer)
        assert_true(await until_true(kafka, fleet.truth()), 4)
        keys = sorted(key for tiers in fleet.truth().values() for key in tiers["gpu"])[:500]
        both = {pb.PartitionState.ACTIVE, pb.PartitionState.STANDBY}
        await wait_answer(addresses[1], keys, lambda answer: roles_in(answer) == both and min(read_index(answer.index)))
        workers[0].kill()
        flagged = await lookup(addresses[1], keys)
        assert NOT_ANSWERED not in read_index(flagged.index)
        assert pb.PartitionState.STANDBY in roles_in(flagged)
        await wait_roles(addresses[1], keys, {pb.PartitionState.ACTIVE})
        fleet.serve(40)
        await fleet.flush(producer)
        assert_true(await until_true(kafka, fleet.truth()), 4)


async def test_lookups_say_who_owns_what_is_not_here(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """With two workers each answers for its own partitions and names the owner of the others; wrong requests fail."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    workers += [WorkerProcess(kafka, tmp_path / name) for name in ("a", "b")]
    addresses = [await worker.ready() for worker in workers]
    async with producing(kafka) as producer:
        fleet.serve(60)
        await fleet.flush(producer)
        assert_true(await until_true(kafka, fleet.truth()), 4)
    keys = sorted(key for tiers in fleet.truth().values() for key in tiers["gpu"])[:500]
    for address, other in zip(addresses, reversed(addresses), strict=True):
        await wait_answer(address, keys, partial(names_owner, other=other))
    own = [
        {
            state.partition
            for state in (await lookup(address, keys)).partitions
            if state.role == pb.PartitionState.ACTIVE
        }
        for address in addresses
    ]
    assert own[0] | own[1] == set(range(PARTITIONS))
    assert not own[0] & own[1]
    for request, code in (
        (pb.LookupRequest(keys=b"x" * 17), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.LookupRequest(keys=b"x" * 16 * 16_385), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (pb.LookupRequest(keys=b"x" * 16, partition_count=99), grpc.StatusCode.FAILED_PRECONDITION),
    ):
        async with grpc.aio.insecure_channel(addresses[0]) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub_of(channel, pb).Lookup(request)
            assert caught.value.code() == code


async def test_what_cannot_be_applied_is_dead_lettered_and_stops_nothing(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """Garbage on kv-events and on kv-blocks ends in kv-events-dlq with a reason, and what follows it is applied."""
    kafka = await make_topics(brokers, topic_prefix)
    fleet = fleet_of(kafka)
    workers.append(WorkerProcess(kafka, tmp_path / "w"))
    await workers[0].ready()
    async with producing(kafka) as producer:
        partition = pod_ids.pod_partition("pod-0", PARTITIONS)
        events, blocks = kafka.topic(topics.EVENTS), kafka.topic(topics.BLOCKS)
        await producer.send_and_wait(
            events, b"\xc1garbage", key=b"pod-0", partition=partition, headers=[("sequence", b"0")]
        )
        await producer.send_and_wait(events, b"no key and no headers", partition=partition)
        for number in range(PARTITIONS):
            await producer.send_and_wait(blocks, b"\x93\x63", partition=number)
        fleet.serve(60)
        await fleet.flush(producer)
    assert_true(await until_true(kafka, fleet.truth()), 4)
    letters: list[dict[str, bytes]] = []
    await read_records(kafka, topics.DLQ, lambda record: letters.append(dict(record.headers)))
    assert len({letter[topics.H_ORIGIN] for letter in letters}) == 2 + PARTITIONS
    assert all(letter[topics.H_REASON] and letter[topics.H_ORIGIN] for letter in letters)


async def test_a_clean_stop_withdraws_the_announcement(
    brokers: str, topic_prefix: str, tmp_path: Path, workers: list[WorkerProcess]
) -> None:
    """SIGTERM: exit code 0, and a tombstone on kv-workers."""
    kafka = await make_topics(brokers, topic_prefix)
    workers.append(WorkerProcess(kafka, tmp_path / "w"))
    await workers[0].ready()
    last: dict[bytes, bytes | None] = {}

    async def announced() -> list[bytes | None]:
        await read_topic(kafka, topics.WORKERS, lambda key, value, _: last.__setitem__(key, value))
        return list(last.values())

    async with asyncio.timeout(90):
        while not await announced():
            await asyncio.sleep(0.1)
    assert workers[0].terminate() == 0
    assert await announced() == [None]
