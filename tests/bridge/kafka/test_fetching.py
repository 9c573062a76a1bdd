"""Fetching from Kafka: a consumer whose fetcher has died is told from one that has nothing new."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import KafkaError

from kvatlas.bridge.kafka.fetching import fetch, fetcher_task

AT = TopicPartition("t", 0)


class Client:
    """What a fetcher asks its client for; it fails as soon as the fetcher does anything."""

    cluster = SimpleNamespace(leader_for_partition=lambda _: None)
    _metadata_max_age_ms = 1000

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def force_metadata_update(self) -> Any:
        raise RuntimeError("no such thing")


class Consumer:
    """A consumer over a fetcher; what it has fetched is given out first."""

    def __init__(self, fetcher: Any, *fetched: dict[TopicPartition, list[Any]]) -> None:
        self._fetcher = fetcher
        self._fetched = list(fetched)

    async def getmany(self, *_: TopicPartition, timeout_ms: int, max_records: int | None) -> Any:
        return self._fetched.pop(0) if self._fetched else {}


async def test_what_ended_a_fetcher_is_raised_once_all_it_fetched_is_given_out() -> None:
    """Aiokafka's own fetcher task, ended by an error in it, is what ``fetch`` looks at."""
    subscriptions = SubscriptionState()
    subscriptions.assign_from_user({AT})
    consumer = Consumer(Fetcher(Client(), subscriptions), {AT: [b"first"]})
    task = fetcher_task(consumer)
    await asyncio.wait({task}, timeout=60)
    assert await fetch(consumer, AT, timeout_ms=0) == {AT: [b"first"]}
    for _ in range(2):
        with pytest.raises(KafkaError, match="Unexpected error during data retrieval"):
            await fetch(consumer, AT, timeout_ms=0)


async def test_a_fetcher_that_runs_or_was_closed_raises_nothing() -> None:
    """Nothing new is no error, and neither is a consumer that is being stopped."""
    task = asyncio.ensure_future(asyncio.Event().wait())
    consumer = Consumer(SimpleNamespace(error_future=task))
    assert await fetch(consumer, timeout_ms=0) == {}
    task.cancel()
    await asyncio.sleep(0)
    assert await fetch(consumer, timeout_ms=0) == {}


def test_a_consumer_keeps_its_fetcher_where_we_look() -> None:
    """The attribute is aiokafka's own and moves with it."""
    assert "_fetcher" in AIOKafkaConsumer.__init__.__code__.co_names
