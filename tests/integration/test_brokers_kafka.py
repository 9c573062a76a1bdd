"""The real broker and the pinned aiokafka: everything that the pipeline asks of a Kafka."""

from __future__ import annotations

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer


async def _read(topic: str, brokers: str, count: int, **options: object) -> list[bytes]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=brokers, auto_offset_reset="earliest", **options)
    await consumer.start()
    try:
        return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()


async def test_idempotent_producer_with_every_codec(brokers: str, create_topic) -> None:
    """Records of an idempotent producer arrive in order whichever compression they travel in."""
    topic = await create_topic(partitions=1)
    codecs = [None, "gzip", "snappy", "lz4", "zstd"]
    for codec in codecs:
        producer = AIOKafkaProducer(
            bootstrap_servers=brokers, enable_idempotence=True, acks="all", compression_type=codec
        )
        await producer.start()
        await producer.send_and_wait(topic, f"{codec}".encode() * 100, headers=[("codec", b"x")])
        await producer.stop()
    assert await _read(topic, brokers, 5) == [f"{codec}".encode() * 100 for codec in codecs]
