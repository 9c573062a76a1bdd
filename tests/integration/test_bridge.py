"""The bridge against the real Kafka."""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from kvatlas.bridge import records
from kvatlas.bridge.engine_publisher import EnginePublisher
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.service import BridgeService
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics

_CLEAR = [{"type": "AllBlocksCleared"}]


async def _setup(brokers: str, prefix: str) -> KafkaSettings:
    kafka = KafkaSettings(brokers=brokers, topic_prefix=prefix, partitions=2)
    await ensure_topics(kafka, [topic for topic in records.TOPICS if topic.by == "pod"])
    return kafka


async def _read(kafka: KafkaSettings, name: str) -> list[Any]:
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.brokers, enable_auto_commit=False)
    await consumer.start()
    try:
        places = [TopicPartition(kafka.topic(name), number) for number in range(2)]
        consumer.assign(places)
        await consumer.seek_to_beginning(*places)
        ends = await consumer.end_offsets(places)
        found: list[Any] = []
        while any([await consumer.position(place) < ends[place] for place in places]):
            for messages in (await consumer.getmany(timeout_ms=200)).values():
                found += messages
        return found
    finally:
        await consumer.stop()


def _sequences(messages: list[Any], pod: str) -> list[tuple[int, int]]:
    found = []
    for message in messages:
        headers = dict(message.headers)
        if message.key == pod.encode() and headers["content_type"] == b"engine":
            found.append((int(headers["incarnation"]), int(headers["sequence"])))
    return found


async def _until(kafka: KafkaSettings, pod: str, count: int) -> list[Any]:
    for _ in range(100):
        messages = await _read(kafka, records.EVENTS)
        if len(_sequences(messages, pod)) >= count:
            return messages
        await asyncio.sleep(0.1)
    raise AssertionError(f"{len(_sequences(messages, pod))} of {count} messages of {pod} arrived")


def _engine(**options: Any) -> EnginePublisher:
    engine = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@pod-x@model-y", **options)
    engine.start()
    return engine


def _bridge(engine: EnginePublisher, kafka: KafkaSettings, **options: Any) -> BridgeService:
    options = {"ownership": "all", "replay_timeout_seconds": 0.5, "replay_backoff_seconds": 0.05, **options}
    return BridgeService(BridgeSettings(engines=[f"{engine.endpoint},{engine.replay_endpoint}"], **options), kafka)


async def test_lost_and_early_messages_are_replayed_in_order_and_once(brokers: str, topic_prefix: str) -> None:
    """Messages from before the bridge and messages lost on the way reach the log in order, once."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    for number in range(5):
        engine.publish(_CLEAR, timestamp=float(number))
    bridge = _bridge(engine, kafka)
    await bridge.start()
    await asyncio.sleep(0.5)
    for number in range(5, 20):
        if number % 4 == 0:
            engine.withhold(b"\x93\x01\x90\xc0" + bytes([number]))
        else:
            engine.publish(_CLEAR, timestamp=float(number))
    messages = await _until(kafka, "pod-x", 20)
    await bridge.stop()
    engine.close()
    found = _sequences(messages, "pod-x")
    assert [sequence for _, sequence in found] == list(range(20))
    assert len({incarnation for incarnation, _ in found}) == 1


async def test_a_restarted_bridge_goes_on_where_the_log_ends(brokers: str, topic_prefix: str) -> None:
    """What was published while no bridge ran is put behind what the log has, under the same incarnation."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    first = _bridge(engine, kafka)
    await first.start()
    for number in range(10):
        engine.publish(_CLEAR, timestamp=float(number))
    await _until(kafka, "pod-x", 10)
    await first.stop()
    for number in range(10, 20):
        engine.publish(_CLEAR, timestamp=float(number))
    second = _bridge(engine, kafka)
    await second.start()
    found = _sequences(await _until(kafka, "pod-x", 20), "pod-x")
    await second.stop()
    engine.close()
    assert [sequence for _, sequence in found] == list(range(20))
    assert len({incarnation for incarnation, _ in found}) == 1


async def test_what_no_replay_can_fill_is_recorded_as_lost(brokers: str, topic_prefix: str) -> None:
    """A hole that the engine cannot fill becomes a control record and raises the pod's epoch."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    bridge = _bridge(engine, kafka)
    await bridge.start()
    await asyncio.sleep(0.5)
    engine.publish(_CLEAR, timestamp=1.0)
    engine.skip()
    engine.publish(_CLEAR, timestamp=2.0)
    messages = await _until(kafka, "pod-x", 2)
    await bridge.stop()
    engine.close()
    found = _sequences(messages, "pod-x")
    assert [sequence for _, sequence in found] == [0, 2]
    assert found[1][0] > found[0][0]
    pods = [records.decode(records.PodRecord, message.value) for message in await _read(kafka, records.PODS)]
    assert (pods[-1].first_lost, pods[-1].last_lost, pods[-1].lost, pods[-1].last_sequence) == (1, 1, 1, 2)
    assert pods[-1].suspect_before == records.epoch_of(found[1][0])


async def test_an_engine_that_overtook_us_while_we_were_away_is_a_restart(brokers: str, topic_prefix: str) -> None:
    """A new engine process whose sequence is already past ours is told by the bytes of our last message."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    first = _bridge(engine, kafka)
    await first.start()
    for number in range(3):
        engine.publish(_CLEAR, timestamp=float(number))
    await _until(kafka, "pod-x", 3)
    await first.stop()
    engine.close()
    other = _engine()
    for number in range(6):
        other.publish(_CLEAR, timestamp=100.0 + number)
    second = _bridge(other, kafka)
    await second.start()
    found = _sequences(await _until(kafka, "pod-x", 9), "pod-x")
    await second.stop()
    other.close()
    assert [sequence for _, sequence in found] == [*range(3), *range(6)]
    assert found[3][0] > found[2][0]


async def test_malformed_frames_are_dead_lettered_and_harm_nothing(brokers: str, topic_prefix: str) -> None:
    """Wrong frames go to the DLQ with a reason, an oversized message is lost alone, the rest arrives."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    bridge = _bridge(engine, kafka, message_bytes=4096, ownership="group")
    await bridge.start()
    await asyncio.sleep(0.5)
    assert engine._pub is not None
    engine._pub.send_multipart([b"kv@pod-x@model-y", b"\x00", b"junk"])
    engine._pub.send_multipart([b"alone"])
    engine.publish(_CLEAR, timestamp=1.0)
    engine.publish_raw(bytes(100_000))
    engine.publish(_CLEAR, timestamp=2.0)
    messages = await _until(kafka, "pod-x", 2)
    await bridge.stop()
    engine.close()
    assert [sequence for _, sequence in _sequences(messages, "pod-x")] == [0, 2]
    reasons = {dict(message.headers)["reason"].split(b":")[0] for message in await _read(kafka, records.DLQ)}
    assert reasons == {b"sequence frame size", b"wrong number of frames", b"oversized"}


async def test_kafka_away_loses_nothing_and_keeps_the_buffer_bounded(own_kafka: Any, topic_prefix: str) -> None:
    """While Kafka is away the buffer fills to its limit, the rest is left to replay, and all arrives afterwards."""
    kafka = await _setup(own_kafka.bootstrap, topic_prefix)
    engine = _engine()
    bridge = _bridge(engine, kafka, buffer_bytes=20_000, heartbeat_seconds=1.0)
    await bridge.start()
    await asyncio.sleep(0.5)
    engine.publish(_CLEAR, timestamp=0.0)
    await _until(kafka, "pod-x", 1)
    own_kafka.stop()
    for number in range(1, 400):
        engine.publish(_CLEAR, timestamp=float(number))
        await asyncio.sleep(0.002)
    stream = next(iter(bridge.streams.values()))
    assert stream.tracker is not None
    shed, pending = stream.tracker.counts.shed, stream._shared.publisher.pending_bytes
    own_kafka.start()
    found = _sequences(await _until(kafka, "pod-x", 400), "pod-x")
    await bridge.stop()
    engine.close()
    assert shed > 0
    assert pending < 40_000
    assert [sequence for _, sequence in dict.fromkeys(found)] == list(range(400))


async def test_what_an_endpoint_says_of_its_engine_is_in_the_headers(brokers: str, topic_prefix: str) -> None:
    """Store and announcements of an endpoint spec reach the headers of its messages."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    spec = f"{engine.endpoint},{engine.replay_endpoint},store=shared-a,announcements=presence"
    bridge = BridgeService(BridgeSettings(engines=[spec], ownership="all"), kafka)
    await bridge.start()
    engine.publish(_CLEAR, timestamp=1.0)
    messages = await _until(kafka, "pod-x", 1)
    await bridge.stop()
    engine.close()
    for message in messages:
        headers = dict(message.headers)
        assert (headers["store"], headers["announcements"]) == (b"shared-a", b"presence")
