"""Cache servers and pools through the bridge, on the real Kafka: LMCache's event topic, Mooncake's master."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.streams.index.apply import apply_blocks
from kvatlas.streams.index.blocks_record import decode_blocks
from kvatlas.streams.index.holders import holders
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver
from tests.integration.log_support import read_topic

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "captures" / "golden_lmcache.json").read_text()
)
SERVER = "mp-server-1"
POD = f"lmcache:{SERVER}"
POOL = "lmcache-pool:s3"
NAMES = [name for name in GOLDEN if GOLDEN[name].get("transport") == "kafka" and GOLDEN[name]["hex"]]
KEYS = block_keys(root_key("demo-model"), pack_tokens(GOLDEN["hashes"]["token_ids"]), 16)

CreateTopic = Callable[..., Any]


class Log:
    """The deployment's topics, read from the start each time."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.kafka = kafka

    async def read(self, name: str) -> list[Any]:
        return await read_topic(self.kafka.brokers, self.kafka.topic(name), 2)

    async def pods(self) -> dict[str, records.PodRecord]:
        """Return the newest record of each pod."""
        found = {message.key: message.value for message in await self.read(topics.PODS)}
        prefix = pod_ids.pod_key(pod_ids.WRITER_BRIDGE, "")
        return {
            key.removeprefix(prefix).decode(): records.decode(records.PodRecord, value)
            for key, value in found.items()
            if key.startswith(prefix)
        }

    async def held(self, pod: str) -> dict[bytes, set[Tier]]:
        """Return the tiers of each block that a pod has, as workers and scorers make of the log."""
        resolver, engine, index = Resolver(ResolveOptions(), 1, time.time_ns), DictView(), DictView()
        effects = resolver.effects()
        for message in await self.read(topics.EVENTS):
            parsed = parse_message(message.key, message.value, message.headers, message.partition, message.offset)
            resolver.apply(engine, parsed, effects)
        assert not effects.dead
        for values in effects.encode().values():
            for value in values:
                apply_blocks(index, decode_blocks(value), effects.counts)
        if pod not in effects.pods:
            return {}
        record, ref = effects.pods[pod], pod_ids.pod_ref(pod)
        found: dict[bytes, set[Tier]] = {}
        for key in KEYS:
            for holder in holders(index.get(key) or b""):
                if holder.pod_ref == ref and holder.epoch >= record.valid_from:
                    found.setdefault(key, set()).add(Tier(holder.tier))
        return found

    async def until_held(self, pod: str, expected: dict[bytes, set[Tier]]) -> None:
        """Wait until a pod has exactly these blocks of the recorded prompt."""
        deadline = time.monotonic() + 90
        while (found := await self.held(pod)) != expected:
            assert time.monotonic() < deadline, f"{pod} has {found}"
            await asyncio.sleep(0.2)

    async def until_pod(self, pod: str, condition: Callable[[records.PodRecord], bool]) -> records.PodRecord:
        """Wait until a pod's record is as wanted; returns it."""
        deadline = time.monotonic() + 90
        while (record := (await self.pods()).get(pod)) is None or not condition(record):
            assert time.monotonic() < deadline, f"the record of {pod} is {record}"
            await asyncio.sleep(0.2)
        return record


class Cache:
    """What an LMCache server writes."""

    def __init__(self, producer: AIOKafkaProducer, topic: str) -> None:
        self._producer, self.topic = producer, topic

    async def say(self, *values: bytes) -> None:
        """Write records, in order."""
        for value in values:
            await self._producer.send_and_wait(self.topic, value, key=SERVER.encode())

    async def replay(self, *names: str) -> None:
        """Write recorded records."""
        await self.say(*(bytes.fromhex(GOLDEN[name]["hex"]) for name in names))


def _changed(name: str, **fields: Any) -> bytes:
    (batch,) = GOLDEN[name]["json"]["batches"]
    return json.dumps({"batches": [batch | fields]}).encode()


@pytest.fixture
async def log(brokers: str, topic_prefix: str) -> Log:
    """A deployment's topics."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=2)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    return Log(kafka)


@pytest.fixture
async def cache(log: Log, create_topic: CreateTopic) -> Any:
    """A server's producer and its topic."""
    topic = await create_topic("lmcache-cache-events", partitions=2)
    producer = AIOKafkaProducer(bootstrap_servers=log.kafka.brokers)
    await producer.start()
    yield Cache(producer, topic)
    await producer.stop()


def _bridge(log: Log, cache: Cache, **options: Any) -> BridgeService:
    settings = BridgeSettings(
        lmcache_topic=cache.topic,
        lmcache_servers=[f"{SERVER},pod=pod-a,pod=pod-b"],
        **{"ownership": "all", "group": f"{cache.topic}-bridges", **options},
    )
    return BridgeService(settings, log.kafka)


async def test_what_a_server_holds_is_told_kept_and_taken_over(log: Log, cache: Cache) -> None:
    """Without an engine or ZMQ: what was there before, what comes, holes, restarts, and a bridge that goes on."""
    await cache.replay("config.0", "config.1", "store_l1")
    first = _bridge(log, cache)
    await first.start()
    await log.until_held(POD, {key: {Tier.CPU} for key in KEYS})
    record = await log.until_pod(POD, lambda record: bool(record.serves))
    assert (record.serves, record.engine, record.coverage) == (["pod-a", "pod-b"], "lmcache", "whole")

    await cache.say(b"no json")
    await cache.replay(*NAMES[3 : NAMES.index("store_l2_shared") + 1])
    shared = GOLDEN["store_l2_shared"]["json"]["batches"][0]["entries"]
    known = {entry["key"]["chunk_hash_hex"] for entry in shared}
    chunks = dict(zip(GOLDEN["hashes"]["chunk_hashes"], KEYS, strict=True))
    pooled = {key: {Tier.DISK} for chunk, key in chunks.items() if chunk in known}
    assert pooled
    await log.until_held(POOL, pooled)
    assert (await log.until_pod(POOL, lambda record: bool(record.serves))).serves == ["pod-a", "pod-b"]
    await first.stop()
    reasons = [dict(message.headers)["reason"] for message in await log.read(topics.DLQ)]
    assert [reason.partition(b":")[0] for reason in reasons] == [b"not usable"]

    gone = GOLDEN["hashes"]["chunk_hashes"][2]
    entry = next(
        entry for entry in GOLDEN["store_l1"]["json"]["batches"][0]["entries"] if entry["key"]["chunk_hash_hex"] == gone
    )
    await cache.say(_changed("delete_l1", seq=9, entries=[entry | {"token_ids": [], "token_offset": -1}]))
    second = _bridge(log, cache)
    await second.start()
    expected = {key: {Tier.CPU} for key in KEYS[:2]}
    await log.until_held(POD, expected)
    after = await log.until_pod(POD, lambda after: after.epoch > record.epoch and after.lost > 0)
    assert (after.lost, after.first_lost, after.last_lost) == (2, 7, 8)
    assert (after.coverage, after.heard_from) == ("partial", 9)
    assert after.suspect_before > after.valid_from, "what was held before the hole is suspect"
    await second.stop()


async def test_one_bridge_of_several_tells_and_another_goes_on(log: Log, cache: Cache) -> None:
    """The one that owns the server's partition: once it has left, the other tells all anew and then what comes."""
    bridges = [_bridge(log, cache, ownership="group", session_timeout_seconds=6) for _ in range(2)]
    for bridge in bridges:
        await bridge.start()
    await cache.replay("config.0", "config.1", "store_l1")
    await log.until_held(POD, {key: {Tier.CPU} for key in KEYS})
    before = await log.until_pod(POD, lambda record: bool(record.serves))
    await bridges[0].stop()
    third = _bridge(log, cache, ownership="group", session_timeout_seconds=6)
    await third.start()
    await bridges[1].stop()  # so whoever had it, another one has it now
    entries = GOLDEN["store_l1"]["json"]["batches"][0]["entries"]
    first = GOLDEN["hashes"]["chunk_hashes"][0]
    away = [entry for entry in entries if entry["key"]["chunk_hash_hex"] != first]
    await cache.say(_changed("delete_l1", seq=4, entries=away))
    await log.until_held(POD, {KEYS[0]: {Tier.CPU}})
    after = await log.until_pod(POD, lambda record: record.epoch > before.epoch)
    assert (after.lost, after.coverage) == (0, "whole")
    await third.stop()


TOKENS = GOLDEN["hashes"]["token_ids"][:48]


class Pool:
    """A master whose pool a fleet of one engine shares; its objects are named by the first bytes of a block's hash."""

    def __init__(self) -> None:
        self.master = EnginePublisher("tcp://127.0.0.1:*", None)
        self.engine = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@pod-a@demo-model")
        for each in (self.master, self.engine):
            each.start()

    def close(self) -> None:
        """Close both."""
        for each in (self.master, self.engine):
            each.close()

    def restart_master(self) -> None:
        """Start the master anew at its address, with an empty pool."""
        address = self.master.endpoint
        self.master.close()
        self.master = EnginePublisher(address.replace("127.0.0.1", "*"), None)
        self.master.start()

    def compute(self) -> None:
        """Announce three blocks on the engine's GPU."""
        stored = {
            "type": "BlockStored", "block_hashes": [1, 2, 3], "parent_block_hash": None, "token_ids": TOKENS,
            "block_size": 16, "lora_id": None, "medium": "GPU",
        }  # fmt: skip
        self.engine.publish([stored], timestamp=time.time())

    def move(self, kind: str, *blocks: int, parts: str = "kv") -> None:
        """Put objects into the pool, or take them out."""
        events = [
            {"event_type": kind, "object_key": f"{block:016x}aabb_0_{part}", "seq_hashes": [], "block_hashes": []}
            for block in blocks
            for part in parts
        ]
        self.master.publish_raw(msgspec.msgpack.encode([time.time_ns() // 1_000_000, events, 0]))


async def test_a_pool_is_told_as_far_as_engines_name_its_blocks(log: Log) -> None:
    """Objects make a block once all its parts are there; holes make suspect, and a master that begins anew clears."""
    pool = Pool()
    settings = BridgeSettings(
        engines=[f"{pool.engine.endpoint},{pool.engine.replay_endpoint},engine=sglang"],
        mooncake_masters=[f"{pool.master.endpoint},pod=pod-a,key=^([0-9a-f]+)_,parts=2"],
        ownership="all",
    )
    name = f"mooncake:{pool.master.endpoint.partition('://')[2]}"
    bridge = BridgeService(settings, log.kafka)
    await bridge.start()
    try:
        await log.until_pod(name, lambda record: record.epoch > 0)
        pool.compute()
        await log.until_held("pod-a", {key: {Tier.GPU} for key in KEYS[:3]})
        deadline = time.monotonic() + 90
        while (await log.pods())[name].last_sequence < 0:
            assert time.monotonic() < deadline, "the master is not heard"
            pool.move("stored", 1, 2)
            pool.move("stored", 3, parts="k")
            await asyncio.sleep(0.2)
        await log.until_held(name, {key: {Tier.DISK} for key in KEYS[:2]})
        record = await log.until_pod(name, lambda record: record.serves == ["pod-a"])
        assert (record.engine, record.store) == ("mooncake", pool.master.endpoint)

        pool.move("removed", 1, parts="v")
        pool.master.skip()
        pool.move("stored", 3, parts="v")
        await log.until_held(name, {key: {Tier.DISK} for key in KEYS[1:3]})
        after = await log.until_pod(name, lambda after: after.lost == 1)
        assert after.suspect_before > after.valid_from, "what was held before the hole is suspect"

        pool.restart_master()
        deadline = time.monotonic() + 90
        while (found := await log.held(name)) != {KEYS[0]: {Tier.DISK}}:
            assert time.monotonic() < deadline, f"{name} has {found}"
            pool.move("stored", 1)
            await asyncio.sleep(0.2)
    finally:
        await bridge.stop()
        pool.close()
