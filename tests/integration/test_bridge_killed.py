"""The bridge killed with SIGKILL under traffic, on the real Kafka."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import time
from typing import Any

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from tests.integration.log_support import read_topic

_PODS, _KILLS = 5, 3
#: How long a bridge serves, once it is ready, before it is killed.
_SERVED_SECONDS = 1.0


async def _log(kafka: KafkaSettings) -> dict[str, list[tuple[int, int]]]:
    """Return per pod the (incarnation, sequence) on the log in order, first occurrences only."""
    found: dict[str, dict[tuple[int, int], None]] = {}
    for message in await read_topic(kafka.brokers, kafka.topic(topics.EVENTS), kafka.partitions):
        headers: dict[str, Any] = dict(message.headers)
        if headers["content_type"] == b"engine":
            place = (int(headers["incarnation"]), int(headers["sequence"]))
            found.setdefault(message.key.decode(), {})[place] = None
    return {pod: list(places) for pod, places in found.items()}


async def test_a_killed_bridge_loses_and_doubles_nothing(brokers: str, topic_prefix: str) -> None:
    """After several SIGKILLs under traffic every sequence is on the log once per incarnation, in order."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=3)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    engines = [EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@pod-{n}@m") for n in range(_PODS)]
    for engine in engines:
        engine.start()
    command = [sys.executable, "-m", "kvatlas.deploy", "bridge", "--brokers", brokers, "--ownership", "all"]
    command += ["--topic-prefix", topic_prefix, "--partitions", "3"]
    for engine in engines:
        command += ["--engines", f"{engine.endpoint},{engine.replay_endpoint}"]
    published = 0
    for _ in range(_KILLS):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        ready = asyncio.create_task(asyncio.to_thread(process.stdout.readline))
        until = math.inf
        while time.monotonic() < until:
            for engine in engines:
                engine.publish([{"type": "AllBlocksCleared"}], timestamp=time.time())
            published += 1
            await asyncio.sleep(0.01)
            if ready.done() and until == math.inf:
                until = time.monotonic() + _SERVED_SECONDS
        process.kill()
        process.wait()
        process.stdout.close()
        assert ready.result().startswith(b"ready")
    for engine in engines:  # nobody hears this one: only the last bridge can bring it, by replay
        engine.publish([{"type": "AllBlocksCleared"}], timestamp=time.time())
    published += 1
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 120
        while sum(map(len, (found := await _log(kafka)).values())) < published * _PODS:
            assert time.monotonic() < deadline, {pod: len(places) for pod, places in found.items()}
            await asyncio.sleep(0.5)
    finally:
        process.terminate()
        assert process.wait(90) == 0
        for engine in engines:
            engine.close()
    assert sorted(found) == [f"pod-{n}" for n in range(_PODS)]
    for places in found.values():
        assert [sequence for _, sequence in places] == list(range(published))
        assert len({incarnation for incarnation, _ in places}) == 1
