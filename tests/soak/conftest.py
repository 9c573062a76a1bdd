"""The tests that take minutes: chaos, long kills, soak runs (`make soak`). Fixtures are those of tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import (
    brokers,
    create_topic,
    group_id,
    kafka_admin,
    own_kafka,
    pytest_configure,
    pytest_configure_node,
    pytest_unconfigure,
    topic_prefix,
)

__all__ = [
    "brokers",
    "create_topic",
    "group_id",
    "kafka_admin",
    "own_kafka",
    "pytest_configure",
    "pytest_configure_node",
    "pytest_unconfigure",
    "topic_prefix",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything below this folder: it is told apart by where it lies."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("soak")
            item.add_marker("kafka")
