"""What the publisher accepts, keeps and sends again, without a broker; and its histogram."""

from __future__ import annotations

import asyncio
import functools
import gc
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import KafkaConnectionError, MessageSizeTooLargeError, ProducerClosed
from aiokafka.producer.message_accumulator import MessageAccumulator

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.producer import RecordProducer, SendWindow
from kvatlas.bridge.model.adapters.fields import count_events
from kvatlas.bridge.model.sink import QueuedRecord
from kvatlas.bridge.runtime.histogram import Buckets
from kvatlas.bridge.runtime.settings import KafkaSettings


class Producer:
    """A producer in memory that fails when told to."""

    def __init__(self) -> None:
        self.failing = False
        self.largest = 1_000_000
        self.leaders: dict[int, int] = {}
        self.hold: asyncio.Event | None = None
        self.batches: list[tuple[str, int, list[bytes]]] = []

    @property
    def client(self) -> Any:
        """Know every partition's leader."""
        cluster = SimpleNamespace(leader_for_partition=lambda place: self.leaders.get(place.partition, 1))
        return SimpleNamespace(cluster=cluster)

    def create_batch(self) -> Any:
        """Return a batch of three records at most."""
        values: list[bytes] = []

        class Batch:
            taken = values

            def append(self, *, key: bytes, value: bytes, timestamp: int, headers: Any) -> object | None:
                if len(values) == 3:
                    return None
                values.append(value)
                return object()

            def close(self) -> None:
                return

            def size(self) -> int:
                return 10

        return Batch()

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> Any:
        """Take a batch, or fail as a broker that is away."""
        if self.failing:
            raise KafkaConnectionError("away")
        if sum(map(len, batch.taken)) > self.largest:
            raise MessageSizeTooLargeError
        offset = sum(len(values) for name, number, values in self.batches if (name, number) == (topic, partition))
        self.batches.append((topic, partition, list(batch.taken)))
        if self.hold is not None:
            await self.hold.wait()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(type("Place", (), {"offset": offset}))
        return future

    async def stop(self) -> None:
        """Nothing to end."""


def _publisher() -> tuple[RecordProducer, Producer]:
    publisher, producer = RecordProducer(KafkaSettings(brokers="127.0.0.1:1"), linger_seconds=0.0), Producer()
    publisher._producer = producer
    return publisher, producer


async def test_records_go_out_in_order_and_in_batches() -> None:
    """Each partition keeps its order, and acknowledgements carry the offsets."""
    publisher, producer = _publisher()
    offsets: list[tuple[int, int]] = []
    for number in range(7):
        for partition in (0, 1):
            ack = functools.partial(lambda p, _, offset: offsets.append((p, offset)), partition)
            publisher.send("t", partition, QueuedRecord(b"k", b"%d" % number, [], ack))
    assert await publisher.flush(5.0)
    for partition in (0, 1):
        values = [v for _, number, batch in producer.batches if number == partition for v in batch]
        assert values == [b"%d" % number for number in range(7)]
        assert [offset for p, offset in offsets if p == partition] == list(range(7))
    assert max(len(batch) for _, _, batch in producer.batches) == 3
    assert (publisher.pending_bytes, publisher.sent) == (0, 14)
    assert publisher.sent_bytes == 10 * len(producer.batches)
    await publisher.stop()


async def _sent(producer: Any, batches: int) -> None:
    async with asyncio.timeout(90):
        while len(producer.batches) < batches:
            await asyncio.sleep(0.001)


async def test_batches_for_one_broker_go_together() -> None:
    """While a request is in flight, records gather for its broker alone, and then go in one request."""
    publisher, producer = _publisher()
    producer.leaders, producer.hold = {0: 1, 1: 1, 2: 2}, asyncio.Event()
    publisher.send("t", 0, QueuedRecord(b"k", b"first", [], None))
    await _sent(producer, 1)
    for partition in (0, 1, 2, 1):
        publisher.send("t", partition, QueuedRecord(b"k", b"later", [], None))
    await _sent(producer, 2)
    assert producer.batches == [("t", 0, [b"first"]), ("t", 2, [b"later"])]
    producer.hold.set()
    assert await publisher.flush(5.0)
    assert sorted(producer.batches[2:]) == [("t", 0, [b"later"]), ("t", 1, [b"later", b"later"])]
    await publisher.stop()


async def test_requests_keep_their_distance() -> None:
    """What comes within the pause after a request waits for its end, then goes as one."""
    gate, began = SendWindow(0.1), time.monotonic()
    async with gate:
        pass
    await asyncio.gather(*(gate.__aenter__() for _ in range(2)))
    assert time.monotonic() - began >= 0.09
    await asyncio.gather(*(gate.__aexit__() for _ in range(2)))
    patient = SendWindow(3600)
    async with asyncio.timeout(60):
        async with patient:  # the first one does not wait
            pass
        patient.pause(0.0)  # nor does a flush
        async with patient:
            pass


async def test_nothing_is_dropped_while_the_broker_is_away() -> None:
    """Waiting bytes are counted until the broker has them; a flush says that it is not done."""
    publisher, producer = _publisher()
    producer.failing = True
    for number in range(4):
        publisher.send("t", 0, QueuedRecord(b"k", b"%d" % number, [], None))
    assert not await publisher.flush(0.1)
    waiting = publisher.pending_bytes
    assert waiting >= 4
    assert publisher.failures >= 1
    producer.failing = False
    assert await publisher.flush(5.0)
    assert [value for _, _, batch in producer.batches for value in batch] == [b"0", b"1", b"2", b"3"]
    await publisher.stop()


async def test_what_may_not_go_out_waits_or_is_discarded() -> None:
    """Without leave nothing is sent; what is discarded meanwhile never is, and gives its room back."""
    publisher, producer = _publisher()
    leave = asyncio.Event()
    publisher.may_send = leave.is_set
    for partition in (0, 1):
        publisher.send("t", partition, QueuedRecord(b"k", b"early", [], None))
    assert not await publisher.flush(0.1)
    assert producer.batches == []
    publisher.discard("t", 0)
    publisher.send("t", 0, QueuedRecord(b"k", b"late", [], None))
    leave.set()
    assert await publisher.flush(60.0)
    assert sorted(producer.batches) == [("t", 0, [b"late"]), ("t", 1, [b"early"])]
    await publisher.stop()


async def test_what_is_in_flight_is_not_discarded() -> None:
    """A batch that is on its way is acknowledged though the rest of its queue is discarded behind it."""
    publisher, producer = _publisher()
    producer.hold = asyncio.Event()
    offsets: list[int] = []
    publisher.send("t", 0, QueuedRecord(b"k", b"flying", [], lambda _, offset: offsets.append(offset)))
    async with asyncio.timeout(60):
        while not producer.batches:
            await asyncio.sleep(0.01)
    publisher.send("t", 0, QueuedRecord(b"k", b"waiting", [], lambda _, offset: offsets.append(offset)))
    publisher.discard("t", 0)
    producer.hold.set()
    assert await publisher.flush(60.0)
    assert offsets == [0]
    assert producer.batches == [("t", 0, [b"flying"])]
    await publisher.stop()


async def test_what_is_too_large_for_its_topic_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is too large is sent in parts; one record that is too large is taken out, its sender told."""
    publisher, producer = _publisher()

    async def connect() -> Any:
        return producer

    monkeypatch.setattr(publisher, "_connect", connect)
    producer.largest = 1000
    refused: list[bytes] = []
    places: list[int] = []
    for value in (b"a" * 600, b"b" * 600, b"c" * 1001, b"d"):
        item = QueuedRecord(
            *(b"k", value, []), lambda _, place: places.append(place), lambda item, *_: refused.append(item.value[:1])
        )
        publisher.send("t", 0, item)
    assert await publisher.flush(60.0)
    assert [value[:1] for _, _, batch in producer.batches for value in batch] == [b"a", b"b", b"d"]
    assert (refused, publisher.refused, places) == ([b"c"], 1, [0, 1, 2])
    await publisher.stop()


async def test_what_nobody_expected_ends_the_publisher_aloud() -> None:
    """A partition whose task fails is never sent to again, so the service is told."""
    publisher, producer = _publisher()
    publisher.failed = asyncio.get_running_loop().create_future()

    def broken() -> Any:
        raise RuntimeError("not a batch")

    producer.create_batch = broken  # type: ignore[method-assign]
    publisher.send("t", 0, QueuedRecord(b"k", b"v", [], None))
    with pytest.raises(RuntimeError, match="not a batch"):
        await asyncio.wait_for(publisher.failed, 60)
    await publisher.stop()


async def test_batches_of_a_producer_that_is_given_up_hold_up_no_closing() -> None:
    """Aiokafka's closing waits for every batch in its accumulator, and gives none up by itself."""
    assert "_message_accumulator" in AIOKafkaProducer.__init__.__code__.co_names
    held = MessageAccumulator(ClusterMetadata(), 1_000, 0, 60)
    batch = held.create_builder()
    batch.append(key=b"k", value=b"v", timestamp=1)
    sent = await held.add_batch(batch, TopicPartition("t", 0), 1)
    closing = asyncio.create_task(held.close())
    held.fail_all(ProducerClosed())
    await asyncio.wait_for(closing, 90)
    with pytest.raises(ProducerClosed):
        await sent
    for waiting in held._batches.values():
        assert all(isinstance(one._drain_waiter.exception(), ProducerClosed) for one in waiting)


async def test_no_broker_at_start_is_an_error() -> None:
    """A cluster that does not answer is named."""
    publisher = RecordProducer(KafkaSettings(brokers="127.0.0.1:1"))
    with pytest.raises(LogError, match=r"127\.0\.0\.1:1"):
        await publisher.start()


async def test_a_start_that_is_cancelled_leaves_no_producer_open() -> None:
    """A producer whose start is cancelled while a broker keeps silent is closed."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    publisher = RecordProducer(KafkaSettings(brokers=f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    starting = asyncio.create_task(publisher.start())
    made: list[AIOKafkaProducer] = []
    async with asyncio.timeout(60):
        while not made:
            await asyncio.sleep(0.05)
            made = [found for found in gc.get_objects() if isinstance(found, AIOKafkaProducer) and not found._closed]
    assert len(made) == 1
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert made[0]._closed
    server.close()


def test_buckets_count_up_to_their_bounds() -> None:
    """A value on a bound counts in that bucket; counts are cumulative for Prometheus."""
    buckets = Buckets()
    buckets.add(0.001)
    buckets.add(0.02, 3)
    buckets.add(99.0)
    found = dict(buckets.cumulative())
    assert (found["0.001"], found["0.01"], found["0.02"], found["10.0"], found["+Inf"]) == (1, 1, 4, 4, 5)
    assert buckets.total == pytest.approx(99.061)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 300, 70_000])
def test_events_are_counted_from_the_first_bytes(count: int) -> None:
    """The number of events is read from the header of their array, whatever its size."""
    assert count_events(msgspec.msgpack.encode((1.5, [None] * count, 0))) == count


@pytest.mark.parametrize(
    "payload", [b"", b"\x93", b"\x93\xcb", b"junk" * 5, b"\x93\xcb" + bytes(8), b"\x93\xcb" + bytes(9)]
)
def test_what_is_no_batch_has_no_events(payload: bytes) -> None:
    """Bytes that do not begin as a batch count nothing."""
    assert count_events(payload) == 0
