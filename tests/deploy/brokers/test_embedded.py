"""The embedded broker keeps the promises that its table makes: what works, and the limits a demo must live with."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import ClusterAuthorizationFailedError, KafkaError, NodeNotReadyError, RequestTimedOutError

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.fetching import fetch_wait_ms
from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.embedded import PARTITIONS, RETAINED_BYTES_PER_PARTITION, EmbeddedBroker
from kvatlas.deploy.brokers.errors import BrokerStateError, TopicMismatchError
from kvatlas.deploy.brokers.topics import ensure_topics


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as started:
        yield started


async def _produce(broker: EmbeddedBroker, topic: str, values: list[bytes], **options: Any) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, **options)
    await producer.start()
    try:
        for value in values:
            await producer.send_and_wait(topic, value, key=b"key", partition=0, headers=[("name", b"value")])
    finally:
        await producer.stop()


async def _consumer(broker: EmbeddedBroker, *topics: str, **options: Any) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        *topics,
        bootstrap_servers=broker.bootstrap,
        auto_offset_reset="earliest",
        fetch_max_wait_ms=await fetch_wait_ms(KafkaSettings(brokers=broker.bootstrap)),
        **options,
    )


async def test_topics_appear_with_four_partitions(broker: EmbeddedBroker) -> None:
    """Asking for the table's topics makes them, with the count that `PARTITIONS` names."""
    counts = await ensure_topics(KafkaSettings(brokers=broker.bootstrap, partitions=PARTITIONS), TOPICS)
    assert counts == {topic.name: PARTITIONS for topic in TOPICS}


async def test_other_partition_counts_cannot_be_had(broker: EmbeddedBroker) -> None:
    """Settings with another count are refused like on a real broker, instead of misplacing every record."""
    with pytest.raises(TopicMismatchError, match="has 4"):
        await ensure_topics(KafkaSettings(brokers=broker.bootstrap, partitions=8), TOPICS)


async def test_a_broker_that_is_too_busy_to_answer_is_asked_again(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another try may mend is no refusal; what it cannot mend is told at once."""
    answer = AIOKafkaAdminClient.describe_cluster
    failures: list[KafkaError] = [NodeNotReadyError(), RequestTimedOutError()]

    async def busy(admin: AIOKafkaAdminClient) -> Any:
        if failures:
            raise failures.pop()
        return await answer(admin)

    monkeypatch.setattr(AIOKafkaAdminClient, "describe_cluster", busy)
    kafka = KafkaSettings(brokers=broker.bootstrap, partitions=PARTITIONS)
    assert len(await ensure_topics(kafka, TOPICS)) == len(TOPICS)
    failures.append(ClusterAuthorizationFailedError())
    with pytest.raises(LogError, match="ClusterAuthorizationFailedError"):
        await ensure_topics(kafka, TOPICS)


@pytest.mark.parametrize("codec", [None, "gzip", "snappy", "lz4", "zstd"])
async def test_records_of_an_idempotent_producer_arrive(broker: EmbeddedBroker, codec: str | None) -> None:
    """Value, key and headers come back with every codec."""
    values = [bytes([number]) * 200 for number in range(10)]
    await _produce(broker, "topic", values, enable_idempotence=True, compression_type=codec)
    consumer = await _consumer(broker)
    await consumer.start()
    try:
        consumer.assign([TopicPartition("topic", 0)])
        got = [await consumer.getone() for _ in values]
    finally:
        await consumer.stop()
    assert [record.value for record in got] == values
    assert got[0].key == b"key"
    assert got[0].headers == (("name", b"value"),)


async def test_only_the_newest_bytes_are_kept(broker: EmbeddedBroker) -> None:
    """A partition forgets its beginning once it holds more than its share of RAM."""
    value = bytes(500_000)
    count = 2 * RETAINED_BYTES_PER_PARTITION // len(value)
    await _produce(broker, "topic", [value] * count)
    consumer = await _consumer(broker)
    await consumer.start()
    try:
        partition = TopicPartition("topic", 0)
        consumer.assign([partition])
        first = (await consumer.beginning_offsets([partition]))[partition]
        end = (await consumer.end_offsets([partition]))[partition]
    finally:
        await consumer.stop()
    assert end == count
    assert 0 < (end - first) * len(value) <= RETAINED_BYTES_PER_PARTITION


async def test_short_fetch_wait_keeps_records_fresh(broker: EmbeddedBroker) -> None:
    """With the wait of our readers a record reaches one of four partitions well before the client's default wait."""
    await _produce(broker, "topic", [b"first"])
    consumer = await _consumer(broker)
    await consumer.start()
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
    await producer.start()
    try:
        consumer.assign([TopicPartition("topic", number) for number in range(PARTITIONS)])
        await consumer.getone()
        delays = []
        for number in range(8):
            sent = time.monotonic()
            await producer.send_and_wait("topic", b"next", partition=number % PARTITIONS)
            await consumer.getone()
            delays.append(time.monotonic() - sent)
    finally:
        await producer.stop()
        await consumer.stop()
    assert sorted(delays)[len(delays) // 2] < 0.25


async def test_a_group_goes_on_where_its_last_member_committed(broker: EmbeddedBroker) -> None:
    """Committed offsets outlive the member that committed them."""
    await _produce(broker, "topic", [b"old"])
    first = await _consumer(broker, "topic", group_id="group", enable_auto_commit=False)
    await first.start()
    assert (await first.getone()).value == b"old"
    await first.commit()
    await first.stop()
    await _produce(broker, "topic", [b"new"])
    second = await _consumer(broker, "topic", group_id="group", enable_auto_commit=False)
    await second.start()
    try:
        assert (await second.getone()).value == b"new"
    finally:
        await second.stop()


def test_stop_closes_the_port() -> None:
    """A stopped broker listens no more, and says so when asked for its address."""
    broker = EmbeddedBroker()
    broker.start()
    host, port = broker.bootstrap.split(":")
    with socket.create_connection((host, int(port)), timeout=5):
        pass
    broker.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    with pytest.raises(BrokerStateError, match="not running"):
        _ = broker.bootstrap
