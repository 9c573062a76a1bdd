"""Engines found in Kubernetes, from the API's watch to the log on the real Kafka."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from tests.bridge.engines.fake_engine import fake_engine, vllm
from tests.bridge.engines.kubernetes_api import Api, pod

_PARTITIONS = 2


@pytest.fixture
def api() -> Iterator[Api]:
    """An API server of one test."""
    api = Api()
    yield api
    api.close()


@pytest.fixture
def engines() -> Iterator[dict[str, EnginePublisher]]:
    """Two engines whose topics name no pod: name and model come from Kubernetes alone."""
    made = {name: EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*") for name in ("vllm-0", "vllm-1")}
    for engine in made.values():
        engine.start()
    yield made
    for engine in made.values():
        engine.close()


def _pod(name: str, engine: EnginePublisher, **more: Any) -> dict[str, Any]:
    live, replay = (str(address).rpartition(":")[2] for address in (engine.endpoint, engine.replay_endpoint))
    return pod(name, "127.0.0.1", notes={"port": live, "replay_port": replay, "model": "org/m"}, **more)


class Log:
    """Follows both topics."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self.sequences: dict[str, list[int]] = {}
        self.models: set[str] = set()
        self.turns: dict[str, list[str]] = {}
        self.pods: dict[str, records.PodRecord] = {}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read on until something is so."""
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, f"{self.sequences} {self.turns} {self.pods}"
            for batch in (await self._consumer.getmany(timeout_ms=100)).values():
                for record in batch:
                    self._take(record)

    def _take(self, record: Any) -> None:
        headers, key = dict(record.headers), record.key.decode()
        if record.topic == self._kafka.topic(topics.PODS):
            found = records.decode(records.PodRecord, record.value)
            self.pods[found.pod] = found
        elif headers["content_type"] == b"control":
            self.turns.setdefault(key, []).append(records.decode(records.Control, record.value).type)
        else:
            self.sequences.setdefault(key, []).append(int(headers["sequence"]))
            self.models.add(headers["model"].decode())

    async def __aenter__(self) -> Log:
        self._consumer = AIOKafkaConsumer(bootstrap_servers=self._kafka.brokers, enable_auto_commit=False)
        await self._consumer.start()
        names = [self._kafka.topic(name) for name in (topics.EVENTS, topics.PODS)]
        places = [TopicPartition(name, number) for name in names for number in range(_PARTITIONS)]
        self._consumer.assign(places)
        await self._consumer.seek_to_beginning(*places)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()


async def test_pods_of_a_cluster_come_and_go(
    brokers: str,
    topic_prefix: str,
    api: Api,
    engines: dict[str, EnginePublisher],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pod is heard once it is ready, through a cut watch and an expired one; one that left is recorded as gone."""
    monkeypatch.setattr("kvatlas.bridge.relay.service.DISCOVERY_SECONDS", 300.0)
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=_PARTITIONS)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    settings = BridgeSettings(
        kubernetes_selector="app=vllm",
        kubernetes_config=api.kubeconfig(tmp_path),
        gone_seconds=0.5,
    )
    bridge = BridgeService(settings, kafka)
    say = [{"type": "AllBlocksCleared"}]
    first, second = engines["vllm-0"], engines["vllm-1"]
    first.publish(say, timestamp=0.0)
    await bridge.start()
    try:
        async with Log(kafka) as log:
            api.change("ADDED", _pod("vllm-0", first, ready=False))
            await asyncio.sleep(1.0)
            assert bridge.endpoints == {}
            api.change("MODIFIED", _pod("vllm-0", first))
            await log.until(lambda: log.sequences == {"vllm-0": [0]})

            api.drop_watches()
            api.change("ADDED", _pod("vllm-1", second))
            second.publish(say, timestamp=1.0)
            first.publish(say, timestamp=1.0)
            await log.until(lambda: log.sequences == {"vllm-0": [0, 1], "vllm-1": [0]})

            api.pods.pop("vllm-0")  # no watch is told: only a new list shows it
            api.forget()
            api.break_watches()
            await log.until(lambda: log.turns.get("vllm-0") == ["start", "gone"])
            await log.until(lambda: log.pods["vllm-0"].state == records.GONE)
            second.publish(say, timestamp=2.0)
            await log.until(lambda: log.sequences["vllm-1"] == [0, 1])

            api.change("DELETED", _pod("vllm-1", second))
            await log.until(lambda: log.turns.get("vllm-1") == ["start", "gone"])
            await log.until(lambda: bridge.endpoints == {})
            assert log.models == {"org/m"}
    finally:
        await bridge.stop()


async def test_a_pod_that_is_asked_tells_its_sockets_and_their_change(
    brokers: str, topic_prefix: str, api: Api, engines: dict[str, EnginePublisher], tmp_path: Path
) -> None:
    """The engine of the pod says where it publishes and what it serves; started again on other ports it is followed."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=_PARTITIONS)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    before, after = engines["vllm-0"], engines["vllm-1"]
    say = [{"type": "AllBlocksCleared"}]
    answers = vllm(before.endpoint, before.replay_endpoint)
    with fake_engine(answers) as url:
        settings = BridgeSettings(
            kubernetes_selector="app=vllm",
            kubernetes_config=api.kubeconfig(tmp_path),
            kubernetes_http_port=int(url.rpartition(":")[2]),
            gone_seconds=0.5,
        )
        bridge = BridgeService(settings, kafka)
        before.publish(say, timestamp=0.0)
        await bridge.start()
        try:
            async with Log(kafka) as log:
                api.change("ADDED", pod("vllm-0", "127.0.0.1"))
                await log.until(lambda: log.sequences == {"vllm-0": [0]})
                answers.update(vllm(after.endpoint, after.replay_endpoint))
                after.publish([*say, *say], timestamp=time.time())
                await log.until(lambda: log.sequences == {"vllm-0": [0, 0]})
                assert log.models == {"m"}
                await log.until(lambda: log.pods["vllm-0"].endpoint == after.endpoint)
                assert log.pods["vllm-0"].state == records.LIVE
        finally:
            await bridge.stop()
