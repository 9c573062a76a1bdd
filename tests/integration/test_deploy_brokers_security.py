"""A secured node: TLS, SCRAM users and ACLs as a careful operator would have them."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError, TopicAuthorizationFailedError
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.model.topics import TOPICS
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.errors import BrokerUnavailableError
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.brokers.security import Security
from kvatlas.deploy.brokers.topics import ensure_topics

PASSWORDS = {"admin": "first-secret", "bridge": "second-secret"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """A secured node with a super user and a user without rights."""
    security = Security(users=PASSWORDS, super_users=("admin",))
    with KafkaNode(tmp_path_factory.mktemp("secured"), security=security) as started:
        yield started


def _settings(node: KafkaNode, user: str, password: str | None = None, **more: object) -> KafkaSettings:
    return KafkaSettings(
        brokers=node.bootstrap,
        security_protocol="SASL_SSL",
        sasl_username=user,
        sasl_password=password or PASSWORDS[user],
        ssl_cafile=str(node.certificate),
        **more,
    )


def _allow(node: KafkaNode, user: str, topic: str, *operations: AclOperation) -> None:
    admin = AdminClient(
        {
            "bootstrap.servers": node.bootstrap,
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-256",
            "sasl.username": "admin",
            "sasl.password": PASSWORDS["admin"],
            "ssl.ca.location": str(node.certificate),
        }
    )
    acls = [
        AclBinding(
            ResourceType.TOPIC,
            topic,
            ResourcePatternType.LITERAL,
            f"User:{user}",
            "*",
            operation,
            AclPermissionType.ALLOW,
        )
        for operation in operations
    ]
    for future in admin.create_acls(acls).values():
        future.result(60)
    named = AclBindingFilter(
        ResourceType.TOPIC,
        topic,
        ResourcePatternType.LITERAL,
        f"User:{user}",
        "*",
        AclOperation.ANY,
        AclPermissionType.ALLOW,
    )
    deadline = time.monotonic() + 90
    while len(admin.describe_acls(named).result(60)) < len(acls):  # the node that decides hears of them a little later
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.kafka
async def test_super_user_makes_the_topics_and_others_may_not(node: KafkaNode) -> None:
    """The settings' SASL and TLS values reach the admin client; a user without rights is told so."""
    counts = await ensure_topics(_settings(node, "admin", partitions=2), TOPICS)
    assert counts == {topic.name: 2 for topic in TOPICS}
    with pytest.raises(LogError, match=r"denied\.kv-events.*could not be created.*Authorization failed"):
        await ensure_topics(_settings(node, "bridge", partitions=2, topic_prefix="denied."), TOPICS)


@pytest.mark.kafka
async def test_acl_allows_one_topic_and_one_direction(node: KafkaNode) -> None:
    """A user with a write ACL on one topic writes there, and neither reads it nor writes elsewhere."""
    await ensure_topics(_settings(node, "admin", partitions=2, topic_prefix="acl."), TOPICS)
    _allow(node, "bridge", "acl.kv-events", AclOperation.WRITE, AclOperation.DESCRIBE)
    config = client_config(_settings(node, "bridge"), "test")
    producer = AIOKafkaProducer(**config, enable_idempotence=True, acks="all")
    await producer.start()
    try:
        assert (await producer.send_and_wait("acl.kv-events", b"x", partition=0)).offset == 0
        with pytest.raises(TopicAuthorizationFailedError):
            await producer.send_and_wait("acl.kv-blocks", b"x", partition=0)
    finally:
        await producer.stop()
    consumer = AIOKafkaConsumer("acl.kv-events", **config, auto_offset_reset="earliest")
    await consumer.start()
    try:
        with pytest.raises(TopicAuthorizationFailedError):
            await consumer.getone()
    finally:
        await consumer.stop()


@pytest.mark.kafka
async def test_wrong_password_and_foreign_certificate_are_refused(node: KafkaNode) -> None:
    """Neither a wrong password nor a client that does not trust the node's certificate gets in."""
    with pytest.raises(BrokerUnavailableError, match="security settings"):
        await ensure_topics(_settings(node, "bridge", password="wrong"), TOPICS)
    config = client_config(_settings(node, "admin"), "test") | {"ssl_context": ssl.create_default_context()}
    consumer = AIOKafkaConsumer(**config)
    with pytest.raises(KafkaConnectionError):
        await consumer.start()
    await consumer.stop()


@pytest.mark.kafka
async def test_plain_client_is_refused(node: KafkaNode) -> None:
    """A client that speaks neither TLS nor SASL gets no answer."""
    with pytest.raises(BrokerUnavailableError):
        await ensure_topics(KafkaSettings(brokers=node.bootstrap), TOPICS, timeout_seconds=5)
