"""Fixtures of the integration tests: a real Kafka for the session, fresh topics and groups for each test.

- `kafka`: the session's node (`KafkaNode`); `brokers`: its bootstrap address. Do not stop it.
- `own_kafka`: a node for one test alone, which may stop, kill, pause or restart it.
- `topic_prefix`, `group_id`: names no other test uses.
- `create_topic`: makes one topic on the session's node and returns its full name.
- `kafka_admin`: a started admin client of the session's node.

Every test that uses one of them is marked `kafka`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import for_code

from kvatlas.deploy.brokers.kafka import KafkaNode

_KAFKA_FIXTURES = {"kafka", "own_kafka"}
_counter = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _KAFKA_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("kafka")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """The session's Kafka node."""
    with KafkaNode(tmp_path_factory.mktemp("kafka")) as node:
        yield node


@pytest.fixture(scope="session")
def brokers(kafka: KafkaNode) -> str:
    """Bootstrap address of the session's node."""
    return kafka.bootstrap


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[KafkaNode]:
    """A started node of this test alone; its data folder is `own_kafka.data_dir`."""
    node = KafkaNode(tmp_path / "own-kafka")
    node.start()
    try:
        yield node
    finally:
        node.stop()


@pytest.fixture
def topic_prefix() -> str:
    """A topic prefix of this test alone, such as `t41-7-`."""
    return f"t{os.getpid()}-{next(_counter)}-"


@pytest.fixture
def group_id(topic_prefix: str) -> str:
    """A consumer group of this test alone."""
    return f"{topic_prefix}group"


@pytest.fixture
async def kafka_admin(brokers: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """A started admin client of the session's node."""
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


CreateTopic = Callable[..., Awaitable[str]]


@pytest.fixture
def create_topic(kafka_admin: AIOKafkaAdminClient, topic_prefix: str) -> CreateTopic:
    """What makes topics: call it with a short name, partitions and configuration; it returns the full name."""

    async def create(name: str = "topic", partitions: int = 4, config: Mapping[str, str] | None = None) -> str:
        full = topic_prefix + name
        reply = await kafka_admin.create_topics([NewTopic(full, partitions, 1, topic_configs=dict(config or {}))])
        for topic, code, message in reply.topic_errors:
            if code:
                raise for_code(code)(f"{topic}: {message}")
        return full

    return create
