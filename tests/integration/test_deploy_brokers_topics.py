"""Topics from the table, on the real broker: made once, compared ever after."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.fetching import fetch_wait_ms
from kvatlas.bridge.model.topics import TOPICS, Topic, changelog_topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.errors import BrokerUnavailableError, TopicMismatchError
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.deploy.brokers.topics import ensure_topics


@pytest.fixture
def settings(brokers: str, topic_prefix: str) -> KafkaSettings:
    """Settings of a deployment of this test alone, with three partitions."""
    return KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=3)


def _with(settings: KafkaSettings, **changes: Any) -> KafkaSettings:
    kept = {name: getattr(settings, name) for name in settings.__struct_fields__}
    return KafkaSettings(**(kept | changes))


async def test_topics_are_made_as_the_table_says(settings: KafkaSettings, kafka_admin: AIOKafkaAdminClient) -> None:
    """Every topic exists with the partitions, cleanup policy, retention and message size of its table line."""
    topics = [*TOPICS, *changelog_topics("app")]
    counts = await ensure_topics(settings, topics)
    assert counts == {settings.topic(topic.name): 3 for topic in topics}
    for topic in topics:
        resource = ConfigResource(ConfigResourceType.TOPIC, settings.topic(topic.name))
        (reply,) = await kafka_admin.describe_configs([resource])
        config = {entry[0]: entry[1] for entry in reply.resources[0][4]}
        assert config["cleanup.policy"] == topic.cleanup
        assert config["max.message.bytes"] == str(topic.max_message_bytes)
        if topic.retention_hours:
            assert config["retention.ms"] == str(topic.retention_hours * 3_600_000)


async def test_repeated_and_parallel_calls_agree(settings: KafkaSettings) -> None:
    """Processes that start together make each topic once and all see the same counts."""
    answers = await asyncio.gather(*(ensure_topics(settings, TOPICS) for _ in range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert await ensure_topics(settings, TOPICS) == answers[0]


async def test_other_partition_count_is_refused(settings: KafkaSettings) -> None:
    """A topic with another number of partitions is named with both numbers and left as it is."""
    await ensure_topics(settings, TOPICS)
    with pytest.raises(TopicMismatchError, match=rf"the 5 of the settings: {settings.topic('kv-events')} has 3"):
        await ensure_topics(_with(settings, partitions=5), TOPICS)
    assert set((await ensure_topics(settings, TOPICS)).values()) == {3}


async def test_other_cleanup_policy_is_refused(settings: KafkaSettings) -> None:
    """A table that should be compacted but is deleted by age is refused before anything is lost."""
    await ensure_topics(settings, [Topic("table", "pod", retention_hours=1)])
    with pytest.raises(TopicMismatchError, match=r"cleanup\.policy=delete and the table asks for compact"):
        await ensure_topics(settings, [Topic("table", "pod", cleanup="compact")])


async def test_missing_topics_are_an_error_where_creation_is_off(
    settings: KafkaSettings, kafka_admin: AIOKafkaAdminClient
) -> None:
    """With create_topics off nothing is made and what is missing is named."""
    with pytest.raises(LogError, match=f"{settings.topic('kv-events')}.*do not exist"):
        await ensure_topics(_with(settings, create_topics=False), TOPICS)
    assert settings.topic("kv-events") not in await kafka_admin.list_topics()


async def test_impossible_replication_says_the_brokers_reason(settings: KafkaSettings) -> None:
    """More replicas than nodes fails with Kafka's own words."""
    with pytest.raises(LogError, match=r"could not be created.*[Rr]eplication"):
        await ensure_topics(_with(settings, replication=3), TOPICS)


async def test_no_broker_is_a_retriable_error() -> None:
    """Nobody at the address is an error that a caller may try again."""
    (port,) = free_ports(1)
    with pytest.raises(BrokerUnavailableError, match="no broker answers") as caught:
        await ensure_topics(KafkaSettings(brokers=f"127.0.0.1:{port}"), TOPICS, timeout_seconds=5)
    assert caught.value.retriable


async def test_a_broker_answers_a_fetch_when_a_record_comes(brokers, create_topic):
    """So a fetch may wait: one over all partitions, which would wait a minute, ends with the first record of any."""
    assert await fetch_wait_ms(KafkaSettings(brokers=brokers)) == 500
    topic = await create_topic(partitions=4)
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=brokers,
        fetch_max_wait_ms=60_000,
        request_timeout_ms=90_000,
        auto_offset_reset="latest",
    )
    producer = AIOKafkaProducer(bootstrap_servers=brokers)
    await consumer.start()
    await producer.start()
    try:
        for place in consumer.assignment():
            await consumer.position(place)  # waits until it is known: what comes after it is read
        for partition in range(4):
            waiting = asyncio.create_task(consumer.getone())
            await producer.send_and_wait(topic, b"record", partition=partition)
            async with asyncio.timeout(50):
                assert (await waiting).partition == partition
    finally:
        await producer.stop()
        await consumer.stop()
