"""Single records to Kafka, each with its acknowledgement: for who writes now and then."""

from __future__ import annotations

from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import connect
from kvatlas.bridge.runtime.settings import KafkaSettings


async def started_producer(kafka: KafkaSettings, client_id: str, **options: Any) -> AIOKafkaProducer:
    """Return a producer that has reached the brokers; ``options`` are aiokafka's.

    Raises:
        LogError: it cannot reach them; nothing stays open.
    """
    producer = AIOKafkaProducer(**client_config(kafka, client_id), **options)
    await connect(producer, kafka)
    return producer


async def send_record(producer: Any, topic: str, key: bytes, value: bytes | None, partition: int | None = None) -> None:
    """Send one record and wait until the brokers have it.

    Args:
        producer: started.
        topic: its full name.
        key: the record's.
        value: the record's, None for a tombstone.
        partition: where; None places it by its key.

    Raises:
        LogError: they did not acknowledge it.
    """
    try:
        await (await producer.send(topic, value, key=key, partition=partition))
    except (KafkaError, OSError) as error:
        raise LogError(f"{topic}: a record of {key!r} was not acknowledged: {error!r}") from error
