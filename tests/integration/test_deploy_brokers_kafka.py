"""The real broker and the installed aiokafka: everything that the pipeline asks of a Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import IllegalStateError, KafkaConnectionError, KafkaError

from kvatlas.deploy.brokers.errors import BrokerStartError, BrokerStateError
from kvatlas.deploy.brokers.kafka import KafkaNode, read_state, stop_node


async def _send(topic: str, brokers: str, values: list[bytes], **options: Any) -> list[int]:
    producer = AIOKafkaProducer(bootstrap_servers=brokers, **options)
    await producer.start()
    try:
        return [(await producer.send_and_wait(topic, value, key=b"key")).offset for value in values]
    finally:
        await producer.stop()


async def _read(topic: str, brokers: str, count: int, **options: Any) -> list[bytes]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=brokers, auto_offset_reset="earliest", **options)
    await consumer.start()
    try:
        return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()


async def test_idempotent_producer_with_every_codec(brokers: str, create_topic) -> None:
    """Records of an idempotent producer arrive in order whichever compression they travel in."""
    topic = await create_topic(partitions=1)
    codecs = [None, "gzip", "snappy", "lz4", "zstd"]
    values = [str(codec).encode() * 100 for codec in codecs]
    for codec, value in zip(codecs, values, strict=True):
        await _send(topic, brokers, [value], enable_idempotence=True, acks="all", compression_type=codec)
    assert await _read(topic, brokers, len(values)) == values


async def test_transactions(brokers: str, create_topic) -> None:
    """A reader of committed records sees a committed transaction and nothing of an aborted one."""
    topic = await create_topic(partitions=1)
    producer = AIOKafkaProducer(bootstrap_servers=brokers, transactional_id=f"{topic}-tx")
    await producer.start()
    try:
        async with producer.transaction():
            await producer.send_and_wait(topic, b"first")
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"aborted")
        await producer.abort_transaction()
        async with producer.transaction():
            await producer.send_and_wait(topic, b"second")
    finally:
        await producer.stop()
    assert await _read(topic, brokers, 2, isolation_level="read_committed") == [b"first", b"second"]


async def test_group_of_two_shares_partitions_and_keeps_offsets(brokers: str, create_topic, group_id: str) -> None:
    """Two members split a topic, and a third takes over where they committed."""
    topic = await create_topic(partitions=4)
    options: dict[str, Any] = {
        "bootstrap_servers": brokers,
        "group_id": group_id,
        "auto_offset_reset": "earliest",
        "session_timeout_ms": 10_000,
        "heartbeat_interval_ms": 200,
        "enable_auto_commit": False,
    }
    await _send(topic, brokers, [b"1", b"2", b"3"])
    members = [AIOKafkaConsumer(topic, **options) for _ in range(2)]
    try:
        await asyncio.gather(*(member.start() for member in members))
        async with asyncio.timeout(90):
            ends = await members[0].end_offsets([TopicPartition(topic, number) for number in range(4)])
            while [await members[0].committed(tp) for tp in ends] != list(ends.values()):
                await asyncio.gather(*(member.getmany(timeout_ms=50) for member in members))
                shares = [member.assignment() for member in members]
                if [len(share) for share in shares] != [2, 2] or shares[0] & shares[1]:
                    continue
                with contextlib.suppress(KafkaError, IllegalStateError):  # shared out anew in this moment
                    for member, share in zip(members, shares, strict=True):
                        await member.commit({tp: ends[tp] for tp in share})
    finally:
        await asyncio.gather(*(member.stop() for member in members))
    await _send(topic, brokers, [b"4"])
    assert await _read(topic, brokers, 1, group_id=group_id) == [b"4"]


async def test_large_record(brokers: str, create_topic) -> None:
    """The node takes a record of 32 MB where the topic allows it."""
    topic = await create_topic(partitions=1, config={"max.message.bytes": str(40 << 20)})
    value = bytes(32 << 20)
    await _send(topic, brokers, [value], max_request_size=40 << 20)
    assert await _read(topic, brokers, 1, max_partition_fetch_bytes=40 << 20) == [value]


async def test_topics_do_not_appear_by_themselves(brokers: str, kafka_admin: AIOKafkaAdminClient) -> None:
    """Asking for a topic that nobody created does not create it."""
    (described,) = await kafka_admin.describe_topics(["kvatlas-no-such-topic"])
    assert described["error_code"] == 3  # UNKNOWN_TOPIC_OR_PARTITION
    assert "kvatlas-no-such-topic" not in await kafka_admin.list_topics()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """A node for tests that treat it as no other test would like; each leaves it running."""
    with KafkaNode(tmp_path_factory.mktemp("own")) as started:
        yield started


async def test_data_and_address_survive_kill_and_restart(node: KafkaNode) -> None:
    """After SIGKILL, and after a clean restart, the node is at its old address with all it acknowledged."""
    admin = AIOKafkaAdminClient(bootstrap_servers=node.bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic("kept", 1, 1)])
    await admin.close()
    address = node.bootstrap
    assert await _send("kept", address, [b"one"], acks="all") == [0]
    node.kill()
    assert not node.running
    assert read_state(node.data_dir) is None
    with pytest.raises(KafkaConnectionError):
        await _read("kept", address, 1)
    node.start()
    assert node.bootstrap == address
    assert await _send("kept", address, [b"two"], acks="all") == [1]
    node.restart()
    assert await _read("kept", address, 2) == [b"one", b"two"]


async def test_paused_node_answers_again_after_resume(node: KafkaNode) -> None:
    """A paused node answers nothing, and goes on where it stopped when resumed."""
    before = await _list_topics(node.bootstrap, patience_ms=60_000)
    node.pause()
    assert node.running
    with pytest.raises((KafkaConnectionError, TimeoutError)):
        await _list_topics(node.bootstrap, patience_ms=1000)
    node.resume()
    assert await _list_topics(node.bootstrap, patience_ms=60_000) == before


async def _list_topics(brokers: str, patience_ms: int) -> list[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers, request_timeout_ms=patience_ms)
    try:
        await admin.start()
        return list(await admin.list_topics())
    finally:
        await admin.close()


def test_second_start_of_a_data_folder_is_refused(node: KafkaNode) -> None:
    """A second node on a folder in use says so, and the first one goes on."""
    with pytest.raises(BrokerStateError, match="runs already"):
        KafkaNode(node.data_dir).start()
    assert node.running


def test_bad_property_shows_the_log(tmp_path: Path) -> None:
    """A node that cannot start raises with the end of Kafka's own log, and leaves no process."""
    node = KafkaNode(tmp_path, properties={"num.io.threads": "none"})
    with pytest.raises(BrokerStartError, match=r"num\.io\.threads"):
        node.start()
    assert not node.running
    node.stop()


def test_taken_port_is_an_error_that_names_it(tmp_path: Path) -> None:
    """A port that was asked for and is taken ends the start with Kafka's reason."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        node = KafkaNode(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(BrokerStartError, match="Address already in use"):
            node.start()
        node.stop()


def test_stop_from_another_object() -> None:
    """The state file is enough to stop a node, and an ephemeral one leaves no folder."""
    node = KafkaNode(detached=True)
    node.start()
    state = read_state(node.data_dir)
    assert state is not None
    assert state.alive()
    assert stop_node(node.data_dir).bootstrap == node.bootstrap
    deadline = time.monotonic() + 90
    while node.running or node.data_dir.exists():  # a busy machine ends processes late
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(BrokerStateError, match="no broker is running"):
        stop_node(node.data_dir)


def test_node_ends_with_its_parent(tmp_path: Path) -> None:
    """A node whose starter is killed with SIGKILL does not stay behind."""
    script = (
        "import sys, time; from pathlib import Path; from kvatlas.deploy.brokers.kafka import KafkaNode\n"
        "node = KafkaNode(Path(sys.argv[1])); node.start(); print('up', flush=True); time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"up\n"
    state = read_state(tmp_path)
    assert state is not None
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    deadline = time.monotonic() + 90
    while state.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read_state(tmp_path) is None
