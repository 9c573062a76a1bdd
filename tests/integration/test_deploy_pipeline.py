"""The whole pipeline on the real Kafka: engines over ZMQ, bridge, worker and scorer as processes, scores at the end."""

from __future__ import annotations

import asyncio
import random
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer.client import ScorerClient
from tests.engine_events import stored
from tests.integration import pipeline_support as support
from tests.integration.log_support import read_topic
from tests.integration.pipeline_support import Service

_PARTITIONS = 4
_MODEL = "sim-model"


class Pipeline:
    """Bridge, worker and scorer as processes over one set of topics."""

    def __init__(self, brokers: str, prefix: str, folder: Path) -> None:
        self.brokers, self.prefix, self.folder = brokers, prefix, folder
        self._flags = (f"--brokers={brokers}", f"--topic-prefix={prefix}", f"--partitions={_PARTITIONS}")
        self.services: list[Service] = []

    def start(self, name: str, *flags: str) -> Service:
        """Start a service."""
        service = Service(self.folder / f"{name}.log", name, *self._flags, *flags)
        self.services.append(service)
        return service

    def worker(self) -> Service:
        """Start the worker on the folder of the one before."""
        state = self.folder / "state"
        return self.start("worker", f"--state-dir={state}", "--session-timeout-seconds=3")

    def bridge(self, engines: Sequence[str], *flags: str) -> Service:
        """Start the bridge over engines."""
        return self.start("bridge", *(f"--engines={engine}" for engine in engines), *flags)

    def logs(self) -> str:
        """What all services said, for a failed test."""
        return "".join(f"--- {service.log.name}\n{service.tail()[-2000:]}" for service in self.services)

    def close(self) -> None:
        """End what runs."""
        for service in self.services:
            if service.process.poll() is None:
                service.process.terminate()
        for service in self.services:
            service.close()


@pytest.fixture
def pipeline(brokers: str, topic_prefix: str, tmp_path: Path) -> Iterator[Pipeline]:
    """A pipeline of this test alone; nothing is started yet."""
    made = Pipeline(brokers, topic_prefix, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def fleets() -> Iterator[list[Fleet]]:
    """Put each fleet here, to be closed at the end."""
    made: list[Fleet] = []
    yield made
    for fleet in made:
        fleet.close()


def _fleet(fleets: list[Fleet], **settings: Any) -> Fleet:
    settings = {"blocks": 256, "system_tokens": 128, "sessions": 24, "model": _MODEL, **settings}
    fleet = Fleet(SimPlan(**settings), clock=time.time, monotonic=time.monotonic)
    fleets.append(fleet)
    fleet.start()
    return fleet


def _wrong(client: ScorerClient, fleet: Fleet, requests: Sequence[Request]) -> list[Any]:
    """Return every score that is not the oracle's: (question, what the oracle says, what the scorer says)."""
    found = []
    for number, request in enumerate(requests):
        tokens = [*request.tokens, *request.output]
        response = client.score(_MODEL, tokens=tokens, cache_salt=request.cache_salt, lora=request.lora)
        truth = fleet.expect(tokens, cache_salt=request.cache_salt, lora=request.lora)
        expected = {name: (pod.matched_blocks, pod.matched_tokens, round(pod.score, 6)) for name, pod in truth.items()}
        got = {
            name: (entry.matched_blocks, entry.matched_tokens, round(entry.score, 6))
            for name, entry in response.scores.items()
            if name in fleet.pods
        }
        if response.freshness.partial or got != expected:
            found.append((number, response.freshness.partial, expected, got))
    return found


def _hits(fleet: Fleet, requests: Sequence[Request]) -> int:
    return sum(
        len(fleet.expect([*request.tokens, *request.output], cache_salt=request.cache_salt, lora=request.lora))
        for request in requests
    )


def test_every_score_is_the_oracle_s_after_the_worker_was_killed(pipeline: Pipeline, fleets: list[Fleet]) -> None:
    """8 pods with evictions, two tiers, clears and a restart; the worker dies half-way and starts on its old folder."""
    fleet = _fleet(fleets, pods=8, cpu_blocks=64, lora_share=0.1, clear_probability=0.01, seed=11)
    worker = pipeline.worker()
    bridge = pipeline.bridge(fleet.engines)
    scorer = pipeline.start("scorer", "--listen=127.0.0.1:0")
    worker.ready()
    bridge.ready()
    asked: list[Request] = []
    with ScorerClient(scorer.ready()) as client:
        for part in range(12):
            asked += fleet.serve(20)
            if part == 5:
                worker.kill()
                fleet.pod("pod-3").restart()
        second = pipeline.worker()
        second.ready()
        sample = asked[::2]
        assert _hits(fleet, sample) > 200
        wrong = support.eventually(lambda: _wrong(client, fleet, sample))
        assert not wrong, (len(wrong), wrong[:3], pipeline.logs())
        asked += fleet.serve(40)
        wrong = support.eventually(lambda: _wrong(client, fleet, asked[-60:]))
        assert not wrong, (len(wrong), wrong[:3], pipeline.logs())
    for service in (bridge, scorer, second):
        service.process.terminate()
    assert [service.wait() for service in (bridge, scorer, second)] == [0, 0, 0], pipeline.logs()


def test_all_services_stop_while_kafka_is_away(own_kafka: KafkaNode, tmp_path: Path) -> None:
    """Without a broker to say goodbye to, SIGTERM still ends every service with 0."""
    pipeline = Pipeline(own_kafka.bootstrap, "", tmp_path)
    try:
        services = [pipeline.worker(), pipeline.bridge([]), pipeline.start("scorer", "--listen=127.0.0.1:0")]
        for service in services:
            service.ready()
        own_kafka.stop()
        for service in services:
            service.process.terminate()
        assert [service.wait() for service in services] == [0, 0, 0], pipeline.logs()
    finally:
        pipeline.close()


_STORE = stored([1, 2, 3, 4], range(64))
_TOPIC = b"kv@pod-evil@" + _MODEL.encode()


def _number(sequence: int) -> bytes:
    return sequence.to_bytes(8, "big")


def _garbage() -> list[list[bytes]]:
    """Messages that are none, then one that is."""
    good = encode_batch(1.0, [_STORE], 0)
    payloads = [
        random.Random(3).randbytes(300),
        good[: len(good) // 2],
        b"",
        msgpack.packb({"ts": 1.0, "events": "none"}),
        msgpack.packb([1.0, "events"]),
        msgpack.packb([1.0, [["BlockStored", "hashes", None, [1], 16]]]),
        msgpack.packb([1.0, [{**_STORE, "block_hashes": [11], "token_ids": "text"}]]),
        msgpack.packb([1.0, [{**_STORE, "block_hashes": [12], "block_size": -16}]]),
        msgpack.packb([1.0, [{"type": "BlockMoved", "block_hashes": [1]}]]),
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million elements
        b"\x91" * 5_000,  # arrays in arrays
    ]
    numbered = [[_TOPIC, _number(number), payload] for number, payload in enumerate(payloads)]
    return [
        *numbered,
        [_TOPIC, _number(11)],
        [_TOPIC],
        [_TOPIC, b"\x00\x01\x02", good],
        [_TOPIC, b"\xff" * 8, good],
        [_TOPIC, *[b"x"] * 40],
        [_TOPIC, _number(11), bytes(100_000_000)],
        [_TOPIC, _number(12), good],
    ]


async def _dead_letters(pipeline: Pipeline) -> list[Any]:
    return await read_topic(pipeline.brokers, pipeline.prefix + topics.DLQ, _PARTITIONS)


def _metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as page:
        found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def test_garbage_harms_nobody_else_and_is_found_in_the_dead_letters(pipeline: Pipeline, fleets: list[Fleet]) -> None:
    """Undecodable messages are dead-lettered with a reason, a huge one is counted, and all other scores stay right."""
    fleet = _fleet(fleets, pods=3, seed=5)
    context = zmq.Context()
    evil = context.socket(zmq.XPUB)
    evil.setsockopt(zmq.SNDHWM, 0)
    port = evil.bind_to_random_port("tcp://127.0.0.1")
    try:
        worker = pipeline.worker()
        bridge = pipeline.bridge([*fleet.engines, f"tcp://127.0.0.1:{port}"], "--listen=127.0.0.1:0")
        scorer = pipeline.start("scorer", "--listen=127.0.0.1:0")
        worker.ready()
        metrics, address = bridge.ready(), scorer.ready()
        assert evil.poll(90_000)
        asked = fleet.serve(30)
        for message in _garbage():
            evil.send_multipart(message)
            asked += fleet.serve(2)
        with ScorerClient(address) as client:

            def matched() -> int:
                return client.score(_MODEL, tokens=list(range(64))).scores["pod-evil"].matched_tokens

            assert not support.eventually(lambda: matched() != 64), pipeline.logs()
            wrong = support.eventually(lambda: _wrong(client, fleet, asked))
            assert not wrong, (len(wrong), wrong[:3], pipeline.logs())
    finally:
        evil.close(linger=0)
        context.term()
    expected = 3 + 1 + 1 + 1 + 11
    support.eventually(lambda: len(asyncio.run(_dead_letters(pipeline))) < expected)
    letters = asyncio.run(_dead_letters(pipeline))
    reasons = [dict(letter.headers)[topics.H_REASON].decode() for letter in letters]
    assert {letter.key for letter in letters} == {b"pod-evil"}
    assert all(dict(letter.headers)[topics.H_ORIGIN] for letter in letters)
    assert all(reasons)
    for part, count in (
        ("wrong number of frames", 3),
        ("sequence frame size", 1),
        ("implausible", 1),
        ("oversized", 1),
    ):
        assert sum(reason.startswith(part) for reason in reasons) == count, (part, reasons)
    assert len(letters) == expected, reasons
    assert _metric(metrics, "kvatlas_bridge_oversized_total") == 1
    assert "100000000 bytes" in bridge.log.read_text()
    assert [service.process.poll() for service in (bridge, worker, scorer)] == [None] * 3
