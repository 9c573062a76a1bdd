"""Background tasks of aiokafka's clients, and fetching so that the end of one is told.

The task in which a consumer fetches ends by any error that it does not expect; it logs it, and after that the consumer
says for ever that there is nothing new. The task in which every client keeps its metadata, where partitions have
their leaders, is told of nowhere: a client without it waits for ever for the next leader.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaConnectionError, KafkaError

from kvatlas.bridge.errors import LogError, TaskEndedError
from kvatlas.bridge.kafka.config import client_config, is_loopback
from kvatlas.bridge.runtime.settings import KafkaSettings

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

#: Pause before a request is made again that brokers were not ready for.
_AGAIN_SECONDS: Final = 0.2
#: Longer than any answer of a broker is waited for.
_START_SECONDS: Final = 60.0
#: How the cluster id of every embedded broker begins.
_EMBEDDED_CLUSTER: Final = "mockCluster"
_WAIT_MS: Final = 500
_EMBEDDED_WAIT_MS: Final = 20
_embedded: dict[str, bool] = {}


async def start_client(client: Any) -> None:
    """Start a consumer, producer or admin client.

    Raises:
        KafkaError: Kafka cannot be reached, or did not say in time what there is: a client whose metadata's task ends
            while it starts waits for it for ever.
    """
    try:
        async with asyncio.timeout(_START_SECONDS):
            await client.start()
    except TimeoutError as error:
        raise KafkaConnectionError(f"the client did not start in {_START_SECONDS:g} s") from error


def is_embedded(cluster: Mapping[str, Any]) -> bool:
    """Whether a broker's answer about its cluster, or its metadata, is that of the embedded one."""
    return str(cluster.get("cluster_id") or "").startswith(_EMBEDDED_CLUSTER)


async def fetch_wait_ms(kafka: KafkaSettings, most: int = _WAIT_MS) -> int:
    """Return how long a broker may hold a fetch that it has nothing for yet.

    A real one answers as soon as there is a record, so the wait costs no time and spares both sides empty answers; the
    embedded one answers a fetch over several partitions only when it is over.

    Args:
        kafka: how to reach the brokers.
        most: of a reader that may leave records with its client for long: what a partition then waits for one fetch.

    Raises:
        KafkaError: Kafka cannot be reached.
    """
    if not is_loopback(kafka):  # where the embedded one always is
        return most
    if kafka.brokers not in _embedded:
        admin = AIOKafkaAdminClient(**client_config(kafka, "kvatlas-look"))
        try:
            await start_client(admin)
            cluster = await admin.describe_cluster()
        finally:
            await admin.close()
        _embedded[kafka.brokers] = is_embedded(cluster)
    return _EMBEDDED_WAIT_MS if _embedded[kafka.brokers] else most


async def connect(client: Any, kafka: KafkaSettings) -> None:
    """Start a client; nothing of it stays open where that fails.

    Raises:
        LogError: it cannot reach the brokers.
    """
    try:
        await start_client(client)
        await asyncio.sleep(0)  # stopped before its tasks have begun, aiokafka would raise their cancellation
    except BaseException as error:
        await client.stop()
        if isinstance(error, KafkaError | OSError):
            raise LogError(f"cannot reach Kafka at {kafka.brokers}: {error}; check --brokers") from error
        raise


async def patiently(ask: Callable[[], Awaitable[Answer]], wait_seconds: float) -> Answer:
    """Ask brokers, and again while they are too busy or not ready yet, as one that has just been made.

    Raises:
        KafkaError: they refused, or were not ready in time.
    """
    ends = time.monotonic() + wait_seconds
    while True:
        try:
            return await ask()
        except KafkaError as error:
            if not error.retriable or time.monotonic() >= ends:
                raise
            logger.info("the brokers are not ready, asked again: %r", error)
        await asyncio.sleep(_AGAIN_SECONDS)


def fetcher_task(consumer: Any) -> asyncio.Task[None]:
    """Return the task of a started consumer that fetches: it ends by itself only with a ``KafkaError``."""
    task: asyncio.Task[None] = consumer._fetcher.error_future
    return task


def sender_task(producer: Any) -> asyncio.Task[None]:
    """Return the task of a producer that sends what it was given: once it has ended, every send fails."""
    task: asyncio.Task[None] = producer._sender.sender_task
    return task


def producer_tasks(producer: Any) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
    """Return the tasks of a started producer that run as long as it lives."""
    return sender_task(producer), metadata_task(producer)


def metadata_task(client: Any) -> asyncio.Task[None]:
    """Return the task of a started consumer, producer or admin client that keeps its metadata, as long as it lives."""
    inner = client.client if isinstance(client, AIOKafkaProducer) else client._client
    task: asyncio.Task[None] = inner._sync_task
    return task


def metadata_error(task: asyncio.Task[None]) -> TaskEndedError | None:
    """Return what to say of the end of such a task; None while it runs, and when its client was closed."""
    error = task.exception() if task.done() and not task.cancelled() else None
    if error is None:
        return None
    ended = TaskEndedError(f"a Kafka client keeps its metadata no more: {type(error).__name__}: {error}")
    ended.__cause__ = error
    return ended


def check_metadata(client: Any) -> None:
    """Look whether a started client still keeps its metadata.

    Raises:
        TaskEndedError: it does not, and never will again.
    """
    if (error := metadata_error(metadata_task(client))) is not None:
        raise error


async def fetch(
    consumer: Any, *partitions: TopicPartition, timeout_ms: int, max_records: int | None = None
) -> dict[TopicPartition, list[Any]]:
    """Return what a consumer has fetched, waiting up to ``timeout_ms`` for something.

    Raises:
        KafkaError: also what ended the consumer's fetcher; another consumer has to take its place.
        TaskEndedError: the consumer keeps its metadata no more.
    """
    check_metadata(consumer)
    found: dict[TopicPartition, list[Any]] = await consumer.getmany(
        *partitions, timeout_ms=timeout_ms, max_records=max_records
    )
    task = fetcher_task(consumer)
    if not found and task.done() and not task.cancelled():
        task.result()
    return found
