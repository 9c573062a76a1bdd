"""Fetching from Kafka: a consumer whose fetcher has died is told from one that has nothing new."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.producer.sender import Sender

from kvatlas.bridge.errors import TaskEndedError
from kvatlas.bridge.kafka.fetching import fetch, fetcher_task, metadata_error, metadata_task, start_client

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
    """A consumer over a fetcher and a client; what it has fetched is given out first."""

    def __init__(self, fetcher: Any, *fetched: dict[TopicPartition, list[Any]], client: Any = None) -> None:
        self._fetcher = fetcher
        self._client = client or SimpleNamespace(_sync_task=asyncio.ensure_future(asyncio.Event().wait()))
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


async def test_the_end_of_a_clients_metadata_is_raised_by_the_next_fetch() -> None:
    """Aiokafka's own task, ended by an error in it: nothing that the consumer still has is given out any more."""
    client = AIOKafkaClient()

    async def broken(*_: object) -> bool:
        raise ZeroDivisionError("in the metadata")

    client._metadata_update = broken
    client._sync_task = asyncio.ensure_future(client._md_synchronizer())
    consumer = Consumer(SimpleNamespace(error_future=client._sync_task), {AT: [b"first"]}, client=client)
    client.force_metadata_update()
    await asyncio.wait({metadata_task(consumer)}, timeout=60)
    for _ in range(2):
        with pytest.raises(TaskEndedError, match="ZeroDivisionError: in the metadata") as raised:
            await fetch(consumer, AT, timeout_ms=0)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)


async def test_a_client_that_is_closed_has_lost_nothing() -> None:
    """Closing cancels the task, which is no failure, and neither is one that runs."""
    client = AIOKafkaClient()
    client._sync_task = task = asyncio.ensure_future(client._md_synchronizer())
    assert metadata_error(task) is None
    await client.close()
    assert task.cancelled()
    assert metadata_error(task) is None


@pytest.mark.parametrize("kind", [AIOKafkaConsumer, AIOKafkaProducer, AIOKafkaAdminClient])
async def test_clients_keep_their_tasks_where_we_look(kind: Any) -> None:
    """The attributes are aiokafka's own and move with it."""
    made = kind()
    assert metadata_task(made) is None  # before its start
    await (made.close() if kind is AIOKafkaAdminClient else made.stop())
    assert "_sync_task" in AIOKafkaClient.bootstrap.__code__.co_names
    assert "_fetcher" in AIOKafkaConsumer.__init__.__code__.co_names
    assert "_coordinator" in AIOKafkaConsumer.__init__.__code__.co_names
    assert "_sender" in AIOKafkaProducer.__init__.__code__.co_names
    assert "error_future" in vars(Fetcher)
    assert "sender_task" in vars(Sender)
    assert "generation" in GroupCoordinator.__init__.__code__.co_names


async def test_a_client_whose_metadata_ends_while_it_starts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ever for what nobody asks for any more; the caller learns it as of a Kafka out of reach."""
    monkeypatch.setattr("kvatlas.bridge.kafka.fetching._START_SECONDS", 0.05)
    consumer = AIOKafkaConsumer("t", bootstrap_servers="127.0.0.1:1")

    async def bootstrapped() -> None:
        consumer._client._sync_task = asyncio.ensure_future(asyncio.sleep(0))

    monkeypatch.setattr(consumer._client, "bootstrap", bootstrapped)
    monkeypatch.setattr(consumer._client, "_maybe_wait_metadata", asyncio.Event().wait)
    monkeypatch.setattr(consumer._client, "_wait_on_metadata", lambda _topic: asyncio.Event().wait())
    with pytest.raises(KafkaConnectionError, match="did not start in"):
        await asyncio.wait_for(start_client(consumer), 90)
    await consumer.stop()
