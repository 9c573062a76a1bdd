"""The bridge against the real Kafka."""

from __future__ import annotations

import asyncio
import functools
import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.kafka.producer import RecordProducer
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.bridge.model.loads import LOAD_STALE_SECONDS
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.recovery import recover
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.scorer.scoring.answers import Scored
from kvatlas.scorer.scoring.pick import PickQuery, choose
from tests.bridge.engines.fake_engine import fake_engine
from tests.engine_events import stored
from tests.integration.log_support import read_topic

_UNSCORED = Scored(prompt_tokens=0, block_size_tokens=16, blocks=0, scores={})
_CLEAR = [{"type": "AllBlocksCleared"}]


async def _setup(brokers: str, prefix: str) -> KafkaSettings:
    kafka = KafkaSettings(brokers=brokers, topic_prefix=prefix, partitions=2)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    return kafka


async def _read(kafka: KafkaSettings, name: str) -> list[Any]:
    return await read_topic(kafka.brokers, kafka.topic(name), 2)


def _sequences(messages: list[Any], pod: str) -> list[tuple[int, int]]:
    found = []
    for message in messages:
        headers = dict(message.headers)
        if message.key == pod.encode() and headers["content_type"] == b"engine":
            found.append((int(headers["incarnation"]), int(headers["sequence"])))
    return found


async def _until(kafka: KafkaSettings, pod: str, count: int) -> list[Any]:
    deadline = time.monotonic() + 90
    while len(_sequences(messages := await _read(kafka, topics.EVENTS), pod)) < count:
        assert time.monotonic() < deadline, f"{len(_sequences(messages, pod))} of {count} messages of {pod} arrived"
        await asyncio.sleep(0.1)
    return messages


async def _true(condition: Callable[[], object]) -> None:
    """Wait until something is so, for as long as a busy machine may need."""
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        await asyncio.sleep(0.05)


def _write(path: Path, text: str) -> None:
    """Replace a file at once: nobody reads a part of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def _engine(**options: Any) -> EnginePublisher:
    engine = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@pod-x@model-y", **options)
    engine.start()
    return engine


def _bridge(engine: EnginePublisher, kafka: KafkaSettings, **options: Any) -> BridgeService:
    options = {"ownership": "all", **options}
    return BridgeService(BridgeSettings(engines=[f"{engine.endpoint},{engine.replay_endpoint}"], **options), kafka)


async def test_lost_and_early_messages_are_replayed_in_order_and_once(brokers: str, topic_prefix: str) -> None:
    """Messages from before the bridge and messages lost on the way reach the log in order, once."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    for number in range(5):
        engine.publish(_CLEAR, timestamp=float(number))
    bridge = _bridge(engine, kafka)
    await bridge.start()
    await _true(lambda: engine.subscribed)
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


async def test_load_read_off_an_engine_is_what_a_pick_counts(brokers: str, topic_prefix: str) -> None:
    """The engine's page is in the pod's record while it answers; once it does not, the load is old, not none."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    with fake_engine({"/metrics": "vllm:num_requests_running 3\nvllm:num_requests_waiting 2\n"}) as url:
        spec = f"{engine.endpoint},{engine.replay_endpoint},metrics={url}/metrics"
        bridge = BridgeService(BridgeSettings(engines=[spec], ownership="all", replay_timeout_seconds=0.5), kafka)
        await bridge.start()
        engine.publish(_CLEAR, timestamp=0.0)
        pods = PodDirectory()
        async with asyncio.timeout(90):
            while not (pods.merged and pods.merged["pod-x"].load):
                await asyncio.sleep(0.1)
                for message in await _read(kafka, topics.PODS):
                    pods.apply(message.key, message.value)
    await bridge.stop()
    engine.close()
    record = pods.merged["pod-x"]
    assert record.load == {"running": 3.0, "waiting": 2.0}
    idle = msgspec.structs.replace(record, pod="idle", load={})
    for late_seconds, reason in ((0, "2 waiting and 3 running"), (LOAD_STALE_SECONDS + 1, "a stale load")):
        now_ns = record.load_ns + int(late_seconds * 1e9)
        busy = msgspec.structs.replace(record, pod="busy", load={"running": 9.0}, load_ns=now_ns)
        asked = PickQuery(model="model-y")
        assert choose(asked, _UNSCORED, [record, idle, busy], full=1.0, now_ns=now_ns).pod == "idle"
        assert reason in choose(PickQuery(model="model-y"), _UNSCORED, [record], full=1.0, now_ns=now_ns).reason


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
    await _true(lambda: engine.subscribed)
    engine.publish(_CLEAR, timestamp=1.0)
    engine.skip()
    engine.publish(_CLEAR, timestamp=2.0)
    messages = await _until(kafka, "pod-x", 2)
    await bridge.stop()
    engine.close()
    found = _sequences(messages, "pod-x")
    assert [sequence for _, sequence in found] == [0, 2]
    assert found[1][0] > found[0][0]
    pods = [records.decode(records.PodRecord, message.value) for message in await _read(kafka, topics.PODS)]
    assert (pods[-1].first_lost, pods[-1].last_lost, pods[-1].lost, pods[-1].last_sequence) == (1, 1, 1, 2)
    assert pods[-1].suspect_before == epochs.epoch_of(found[1][0])


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
    await _true(lambda: engine.subscribed)
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
    reasons = {dict(message.headers)["reason"].split(b":")[0] for message in await _read(kafka, topics.DLQ)}
    assert reasons == {b"sequence frame size", b"wrong number of frames", b"oversized"}


async def test_kafka_away_loses_nothing_and_keeps_the_buffer_bounded(own_kafka: Any, topic_prefix: str) -> None:
    """While Kafka is away the buffer fills to its limit, the rest is left to replay, and all arrives afterwards."""
    kafka = await _setup(own_kafka.bootstrap, topic_prefix)
    engine = _engine()
    bridge = _bridge(engine, kafka, buffer_bytes=20_000, heartbeat_seconds=1.0)
    await bridge.start()
    await _true(lambda: engine.subscribed)
    engine.publish(_CLEAR, timestamp=0.0)
    await _until(kafka, "pod-x", 1)
    own_kafka.stop()
    for number in range(1, 400):
        engine.publish(_CLEAR, timestamp=float(number))
        await asyncio.sleep(0.002)
    session, publisher = next(iter(bridge.endpoints.values())).session, bridge._publisher
    assert session is not None
    tracker = session.tracker
    await _true(lambda: tracker.counts.shed)
    pending = publisher.pending_bytes
    # A producer that fails is replaced; what other partitions had given to it must not wait for ever.
    replacing = asyncio.create_task(publisher._replace(publisher._producer))
    await asyncio.sleep(2.0)
    own_kafka.start()
    await asyncio.wait_for(replacing, 90)
    found = _sequences(await _until(kafka, "pod-x", 400), "pod-x")
    await bridge.stop()
    engine.close()
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


async def test_engines_may_connect_to_the_bridge(brokers: str, topic_prefix: str) -> None:
    """On a bound address pods are told by topic and rank, or by where they come from, and holes are replayed."""
    kafka = await _setup(brokers, topic_prefix)
    [port] = free_ports(1)
    settings = BridgeSettings(
        bind=["tcp://127.0.0.1:*", f"tcp://127.0.0.1:*,replay_port={port},model=n"],
        ownership="all",
    )
    bridge = BridgeService(settings, kafka)
    await bridge.start()
    named = [EnginePublisher(bridge.bound[0], topic=f"kv@pod-{n}@m", bind=False) for n in "ab"]
    nameless = EnginePublisher(bridge.bound[1], f"tcp://127.0.0.1:{port}", bind=False)
    for engine in (*named, nameless):
        engine.start()
    await _true(lambda: all(engine.subscribed for engine in (*named, nameless)))
    for number in range(6):
        for rank, engine in enumerate(named):
            engine.publish(_CLEAR, timestamp=float(number), dp_rank=rank)
        if number == 3:
            nameless.withhold(b"\x93\x01\x90\xc0")
        else:
            nameless.publish(_CLEAR, timestamp=float(number), dp_rank=None)
    for pod in ("pod-a", "pod-b@dp1", "127.0.0.1"):
        messages = await _until(kafka, pod, 6)
    await bridge.stop()
    for engine in (*named, nameless):
        engine.close()
    for pod in ("pod-a", "pod-b@dp1", "127.0.0.1"):
        assert [sequence for _, sequence in _sequences(messages, pod)] == list(range(6))
    assert {dict(m.headers)["model"] for m in messages if m.key == b"127.0.0.1"} == {b"n"}


async def test_stripped_messages_hold_keys_and_no_tokens(brokers: str, topic_prefix: str) -> None:
    """With stripped tokens a second bridge still chains on from the first one's blocks, read back from the log."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    first_token = 1_234_567_000

    def block(number: int) -> list[dict[str, Any]]:
        first = first_token + number * 16
        return [stored([number + 1], range(first, first + 16), parent=number or None)]

    def pairs(messages: list[Any]) -> list[tuple[Any, dict[str, bytes]]]:
        return [(m, dict(m.headers)) for m in messages if dict(m.headers)["content_type"] == b"keys"]

    for number in (0, 1):
        bridge = _bridge(engine, kafka, strip_tokens=True)
        await bridge.start()
        await _true(lambda number=number: engine.subscribed > number)  # type: ignore[misc]
        engine.publish(block(number), timestamp=float(number))
        deadline = time.monotonic() + 90
        while len(pairs(messages := await _read(kafka, topics.EVENTS))) <= number:
            assert time.monotonic() < deadline, len(messages)
            await asyncio.sleep(0.1)
        await bridge.stop()
    engine.close()
    found = pairs(messages)
    assert [int(headers["sequence"]) for _, headers in found] == [0, 1]
    assert len({headers["incarnation"] for _, headers in found}) == 1
    packed = pack_tokens(range(first_token, first_token + 32))
    stored_keys = []
    for message, _ in found:
        assert not any(token.to_bytes(4, "big") in message.value for token in range(first_token, first_token + 32))
        event = records.decode(records.KeyedBatch, message.value).events[0]
        assert isinstance(event, records.KeyedStored)
        stored_keys.append(event.block_keys)
    assert stored_keys == block_keys(root_key("model-y"), packed, 16)


async def test_an_endpoint_file_is_followed_without_restart(
    brokers: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod put into the file is subscribed soon, one taken out is recorded as gone, a broken file changes nothing."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    path = tmp_path / "engines.toml"
    path.write_text("engines = []")
    monkeypatch.setattr("kvatlas.bridge.relay.service.DISCOVERY_SECONDS", 300.0)
    settings = BridgeSettings(engines_file=str(path), ownership="all", gone_seconds=0.5)
    bridge = BridgeService(settings, kafka)
    await bridge.start()
    _write(path, f'engines = ["{engine.endpoint},{engine.replay_endpoint}"]')
    engine.publish(_CLEAR, timestamp=1.0)
    await _until(kafka, "pod-x", 1)
    _write(path, "engines = [")
    await asyncio.sleep(1.5)
    assert list(bridge.endpoints) == [engine.endpoint]
    _write(path, "engines = []")
    while bridge.endpoints:  # stopped in the moment when it lets go of the pod
        await asyncio.sleep(0)
    await bridge.stop()
    engine.close()
    last = (await _read(kafka, topics.EVENTS))[-1]
    assert records.decode(records.Control, last.value).type == "gone"


async def test_a_stop_sends_what_was_accepted(brokers: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that wait for Kafka when the bridge is told to stop are on the log afterwards, and so is the record."""
    kafka = await _setup(brokers, topic_prefix)
    engine = _engine()
    slow = functools.partial(RecordProducer, linger_seconds=600.0)
    monkeypatch.setattr("kvatlas.bridge.relay.service.RecordProducer", slow)
    bridge = _bridge(engine, kafka)
    await bridge.start()
    await _true(lambda: engine.subscribed)
    for number in range(50):
        engine.publish(_CLEAR, timestamp=float(number))
        await asyncio.sleep(0.005)
    await _true(lambda: bridge.received_bytes)
    session = next(iter(bridge.endpoints.values())).session
    assert session is not None
    await _true(lambda: session.tracker.expected == 50)
    assert bridge.acknowledged < 50
    await bridge.stop()
    engine.close()
    assert [sequence for _, sequence in _sequences(await _read(kafka, topics.EVENTS), "pod-x")] == list(range(50))
    assert records.decode(records.PodRecord, (await _read(kafka, topics.PODS))[-1].value).last_sequence == 49


async def test_a_silent_pod_is_stale_until_it_is_heard(brokers: str, topic_prefix: str) -> None:
    """One that neither sends nor answers turns stale and, once it sends, live; one that answers a replay stays live."""
    kafka = await _setup(brokers, topic_prefix)
    dumb = EnginePublisher("tcp://127.0.0.1:*", topic="kv@dumb@m")
    dumb.start()
    engine = _engine()
    settings = BridgeSettings(
        engines=[dumb.endpoint, f"{engine.endpoint},{engine.replay_endpoint}"],
        ownership="all",
        heartbeat_seconds=0.3,
        stale_seconds=6.0,
    )
    bridge = BridgeService(settings, kafka)
    await bridge.start()
    await _true(lambda: engine.subscribed and dumb.subscribed)
    dumb.publish(_CLEAR, timestamp=1.0)
    engine.publish(_CLEAR, timestamp=1.0)

    async def states(pod: str) -> list[str]:
        found = [records.decode(records.PodRecord, message.value) for message in await _read(kafka, topics.PODS)]
        return [key for key, _ in itertools.groupby(record.state for record in found if record.pod == pod)]

    async def until(expected: list[str]) -> None:
        deadline = time.monotonic() + 90
        while (found := await states("dumb"))[: len(expected)] != expected:  # it may have gone on since
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.1)

    await until(["live", "stale"])
    dumb.publish(_CLEAR, timestamp=2.0)
    await until(["live", "stale", "live"])
    assert await states("pod-x") == ["live"]
    await bridge.stop()
    dumb.close()
    engine.close()


async def test_an_engine_that_connected_and_left_is_gone(brokers: str, topic_prefix: str) -> None:
    """On a bound address a closed connection ends the pod after the limit; another pod that is there stays."""
    kafka = await _setup(brokers, topic_prefix)
    bridge = BridgeService(BridgeSettings(bind=["tcp://127.0.0.1:*"], ownership="all", gone_seconds=0.5), kafka)
    await bridge.start()
    engines = [EnginePublisher(bridge.bound[0], topic=f"kv@pod-{name}@m", bind=False) for name in "ab"]
    for engine in engines:
        engine.start()
    await _true(lambda: all(engine.subscribed for engine in engines))
    for engine in engines:
        engine.publish(_CLEAR, timestamp=1.0)
    await _until(kafka, "pod-a", 1)
    engines[0].close()
    await _true(lambda: [stream.pod for stream in bridge.endpoints.values()] == ["pod-b"])
    engines[1].publish(_CLEAR, timestamp=2.0)
    await _until(kafka, "pod-b", 2)
    await bridge.stop()
    engines[1].close()
    found = {}
    for message in await _read(kafka, topics.PODS):
        record = records.decode(records.PodRecord, message.value)
        found[record.pod] = record.state
    assert found == {"pod-a": "gone", "pod-b": "live"}


async def test_an_address_that_another_pod_has_now_is_the_other_pods(
    brokers: str, topic_prefix: str, tmp_path: Path
) -> None:
    """A spec that changes under its address is heard anew: messages count for the new name, and the old pod is gone."""
    kafka = await _setup(brokers, topic_prefix)
    engine = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
    engine.start()
    path = tmp_path / "engines.toml"

    def listed(pod: str) -> str:
        return f'engines = ["{engine.endpoint},{engine.replay_endpoint},pod={pod}"]'

    path.write_text(listed("pod-a"))
    settings = BridgeSettings(engines_file=str(path), ownership="all", gone_seconds=0.5, heartbeat_seconds=1.0)
    bridge = BridgeService(settings, kafka)
    await bridge.start()
    engine.publish(_CLEAR, timestamp=1.0)
    await _until(kafka, "pod-a", 1)
    _write(path, listed("pod-b"))
    engine.publish(_CLEAR, timestamp=2.0)
    await _until(kafka, "pod-b", 2)
    async with asyncio.timeout(90):
        while len(bridge.endpoints) > 1:
            await asyncio.sleep(0.05)
    await bridge.stop()
    engine.close()
    controls = [m for m in await _read(kafka, topics.EVENTS) if dict(m.headers)["content_type"] == b"control"]
    found = [(m.key, records.decode(records.Control, m.value).type) for m in controls]
    assert sorted(found) == [(b"pod-a", "gone"), (b"pod-a", "start"), (b"pod-b", "start")]


async def test_a_quiet_pod_costs_no_reading_of_all_that_others_said(brokers: str, topic_prefix: str) -> None:
    """Positions are read from the last minute of the log and the records; what only the log says is not missed."""
    kafka = await _setup(brokers, topic_prefix)
    names = [f"pod-{n}" for n in range(100) if pod_ids.pod_partition(f"pod-{n}", 2) == 0]
    quiet, busy, unknown = names[:3]
    now = time.time_ns()

    def event(pod: str, sequence: int, age_seconds: float) -> dict[str, Any]:
        headers = [("content_type", b"engine"), ("incarnation", b"5"), ("sequence", b"%d" % sequence)]
        at = {"partition": 0, "timestamp_ms": int(now / 1e6 - age_seconds * 1000)}
        return {"topic": kafka.topic(topics.EVENTS), "key": pod.encode(), "value": b"x", "headers": headers, **at}

    def record(pod: str, sequence: int, offset: int, age_seconds: float) -> dict[str, Any]:
        value = records.PodRecord(
            pod=pod,
            writer=pod_ids.WRITER_BRIDGE,
            epoch=epochs.epoch_of(5),
            last_sequence=sequence,
            events_partition=0,
            events_offset=offset,
            updated_ns=int(now - age_seconds * 1e9),
        )
        key = pod_ids.pod_key(pod_ids.WRITER_BRIDGE, pod)
        return {"topic": kafka.topic(topics.PODS), "key": key, "value": records.encode(value), "partition": 0}

    started = {"type": "start", "incarnation": 5}
    control = event(unknown, -1, 2.0) | {
        "value": records.encode(records.Control(**started)),  # type: ignore[arg-type]
        "headers": [("content_type", b"control"), ("incarnation", b"5")],
    }
    async with AIOKafkaProducer(bootstrap_servers=brokers) as producer:
        for sent in [
            event(quiet, 0, 7200.0),
            *(event(busy, number, 3600.0) for number in range(50)),
            event(busy, 50, 3.0),
            control,
            event(unknown, 0, 1.0),
            event(busy, 51, 0.5),
            record(quiet, 0, 0, 7200.0),
            record(busy, 50, 51, 2.0),
        ]:
            await producer.send_and_wait(**sent)
    found = await recover(kafka, [0])
    assert {pod: known.record.last_sequence for pod, known in found.items()} == {quiet: 0, busy: 51, unknown: 0}
    assert [sequence for sequence, _ in found[busy].digests] == [50, 51]
    assert {pod for pod, known in found.items() if known.ahead} == {busy, unknown}


async def test_a_message_too_large_for_the_topic_is_lost_and_the_pod_goes_on(brokers: str, topic_prefix: str) -> None:
    """It raises the epoch ahead of what follows it, its head is on the DLQ, and no partition is held up."""
    kafka = await _setup(brokers, topic_prefix)
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    for name in (topics.EVENTS, topics.DLQ):
        small = ConfigResource(ConfigResourceType.TOPIC, kafka.topic(name), {"max.message.bytes": "4096"})
        await admin.alter_configs([small])
    await admin.close()
    engine = _engine()
    bridge = _bridge(engine, kafka)
    await bridge.start()
    for number in range(200):
        payload = encode_batch(float(number), _CLEAR, 0)
        engine.publish_raw(payload + (random.Random(number).randbytes(8192) if number == 100 else b""))
    messages = await _until(kafka, "pod-x", 199)
    await bridge.stop()
    engine.close()
    (gap,) = [
        control
        for message in messages
        if dict(message.headers)["content_type"] == b"control"
        and (control := records.decode(records.Control, message.value)).type == "gap"
    ]
    assert (gap.first_lost, gap.last_lost) == (100, 100)
    found = _sequences(messages, "pod-x")
    assert [sequence for _, sequence in found] == [n for n in range(200) if n != 100]
    assert all((incarnation >= gap.incarnation) == (sequence > 100) for incarnation, sequence in found)
    (dead,) = await _read(kafka, topics.DLQ)
    assert dict(dead.headers)["reason"].startswith(b"refused: ")
    assert payload[:1] == dead.value[:1]
    assert (await recover(kafka, [0, 1]))["pod-x"].record.lost == 1
