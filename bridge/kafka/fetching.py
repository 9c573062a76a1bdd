"""Fetching with aiokafka's consumer, so that a fetcher that has died is told.

The task in which a consumer fetches ends by any error that it does not expect; it logs it, and after that the consumer
says for ever that there is nothing new.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import TopicPartition


def fetcher_task(consumer: Any) -> asyncio.Task[None]:
    """Return the task of a started consumer that fetches: it ends by itself only with a ``KafkaError``."""
    task: asyncio.Task[None] = consumer._fetcher.error_future
    return task


async def fetch(
    consumer: Any, *partitions: TopicPartition, timeout_ms: int, max_records: int | None = None
) -> dict[TopicPartition, list[Any]]:
    """Return what a consumer has fetched, waiting up to ``timeout_ms`` for something.

    Raises:
        KafkaError: also what ended the consumer's fetcher; another consumer has to take its place.
    """
    found: dict[TopicPartition, list[Any]] = await consumer.getmany(
        *partitions, timeout_ms=timeout_ms, max_records=max_records
    )
    task = fetcher_task(consumer)
    if not found and task.done() and not task.cancelled():
        task.result()
    return found
