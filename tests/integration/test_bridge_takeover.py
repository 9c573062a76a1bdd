"""Two bridges of one group on the real Kafka: one is killed, frozen or cut off, the other takes its pods over."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.model import topics
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.topics import ensure_topics
from tests.integration.log_support import read_topic

_PODS, _PARTITIONS = 8, 4


async def _log(kafka: KafkaSettings) -> tuple[dict[str, list[tuple[int, int]]], set[bytes]]:
    """Return per pod the (incarnation, sequence) on the log in order, repetitions too; and who produced how."""
    found: dict[str, list[tuple[int, int]]] = {}
    sources: set[bytes] = set()
    for message in await read_topic(kafka.brokers, kafka.topic(topics.EVENTS), kafka.partitions):
        headers: dict[str, Any] = dict(message.headers)
        if headers["content_type"] == b"engine":
            at = (int(headers["incarnation"]), int(headers["sequence"]))
            found.setdefault(message.key.decode(), []).append(at)
            sources.add(headers["source"])
    return found, sources


def _bridge(kafka: KafkaSettings, engines: list[EnginePublisher]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvatlas.deploy", "bridge", "--brokers", kafka.brokers]
    command += ["--topic-prefix", kafka.topic_prefix, "--partitions", str(_PARTITIONS), "--group", "bridges"]
    command += ["--session-timeout-seconds", "6", "--heartbeat-seconds", "2"]
    for engine in engines:
        command += ["--engines", f"{engine.endpoint},{engine.replay_endpoint}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def _traffic(engines: list[EnginePublisher], seconds: float) -> int:
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        for engine in engines:
            engine.publish([{"type": "AllBlocksCleared"}], timestamp=time.time())
        count += 1
        await asyncio.sleep(0.02)
    return count


async def test_another_bridge_takes_over_the_pods_of_a_killed_one(brokers: str, topic_prefix: str) -> None:
    """Two bridges share the pods; after SIGKILL of one the other repairs by replay, and nothing is lost or doubled."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=_PARTITIONS)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    engines = [EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@pod-{n}@m") for n in range(_PODS)]
    for engine in engines:
        engine.start()
    bridges = [_bridge(kafka, engines), _bridge(kafka, engines)]
    try:
        for bridge in bridges:  # both are members once they say so
            assert bridge.stdout is not None
            assert (await asyncio.wait_for(asyncio.to_thread(bridge.stdout.readline), 120)).startswith("ready")
        published = await _traffic(engines, 5.0)
        bridges[0].kill()
        bridges[0].wait()
        published += await _traffic(engines, 3.0)
        deadline = time.monotonic() + 120
        while True:
            found, sources = await _log(kafka)
            if all(len(set(found.get(f"pod-{n}", []))) >= published for n in range(_PODS)):
                break
            assert time.monotonic() < deadline, {pod: len(places) for pod, places in found.items()}
            await asyncio.sleep(0.5)
        bridges[1].terminate()
        assert bridges[1].wait(90) == 0
    finally:
        for bridge in bridges:
            bridge.kill()
            bridge.wait()
        for engine in engines:
            engine.close()
    assert sorted(found) == [f"pod-{n}" for n in range(_PODS)]
    for places in found.values():
        first_seen = list(dict.fromkeys(places))
        assert [sequence for _, sequence in first_seen] == list(range(published))
        assert len({incarnation for incarnation, _ in places}) == 1
    assert sources == {b"live", b"replay"}


def _applied(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what a reader takes of a pod: only what goes past its last (incarnation, sequence)."""
    found: list[tuple[int, int]] = []
    for place in places:
        if not found or place > found[-1]:
            found.append(place)
    return found


async def test_a_bridge_that_was_frozen_takes_nothing_back(brokers: str, topic_prefix: str) -> None:
    """A bridge that sleeps through its own replacement and an engine's restart puts nothing above the other's log."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=_PARTITIONS)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])

    def engine(number: int, live: str = "tcp://127.0.0.1:*", replay: str = "tcp://127.0.0.1:*") -> EnginePublisher:
        made = EnginePublisher(live, replay, topic=f"kv@pod-{number}@m", bind=True)
        made.start()
        return made

    async def until(life: list[int]) -> dict[str, list[tuple[int, int]]]:
        deadline = time.monotonic() + 120
        while True:
            found, _ = await _log(kafka)
            applied = {pod: _applied(places) for pod, places in found.items()}
            ends = [applied.get(f"pod-{n}", [(0, -1)])[-1][1] + 1 for n in range(_PODS)]
            if ends == life:
                return applied
            assert time.monotonic() < deadline, f"{ends}, not {life}"
            await asyncio.sleep(0.5)

    engines = [engine(number) for number in range(_PODS)]
    bridges = [_bridge(kafka, engines), _bridge(kafka, engines)]
    try:
        for bridge in bridges:
            assert bridge.stdout is not None
            assert (await asyncio.wait_for(asyncio.to_thread(bridge.stdout.readline), 120)).startswith("ready")
        early = await _traffic(engines, 1.0)
        await until([early] * _PODS)
        os.kill(bridges[0].pid, signal.SIGSTOP)
        for number, old in enumerate(engines):
            old.close()
            assert old.replay_endpoint is not None
            engines[number] = engine(number, old.endpoint, old.replay_endpoint)
        late = await _traffic(engines, 2.0)
        taken = await until([late] * _PODS)  # by the other one
        os.kill(bridges[0].pid, signal.SIGCONT)
        late += await _traffic(engines, 2.0)
        found = await until([late] * _PODS)
        for bridge in bridges:
            bridge.terminate()
        assert [await asyncio.to_thread(bridge.wait, 90) for bridge in bridges] == [0, 0]
    finally:
        for bridge in bridges:
            bridge.kill()
            bridge.wait()
        for made in engines:
            made.close()
    for pod, places in found.items():
        assert {incarnation for incarnation, _ in places} == {incarnation for incarnation, _ in taken[pod]}
        assert [sequence for _, sequence in places] == [*range(early), *range(late)]


async def test_a_bridge_that_the_group_does_not_hear_writes_nothing(brokers: str, topic_prefix: str) -> None:
    """One that is cut off from its group and sees an engine restart leaves that to the bridge that took the pod."""
    kafka = KafkaSettings(brokers=brokers, topic_prefix=topic_prefix, partitions=_PARTITIONS)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    live, replay = "tcp://127.0.0.1:*", "tcp://127.0.0.1:*"
    ahead_ns = 0

    def engine() -> EnginePublisher:
        made = EnginePublisher(live, replay, topic="kv@pod@m", bind=True)
        made.start()
        return made

    async def until(condition: Callable[[list[tuple[int, int]]], bool]) -> list[tuple[int, int]]:
        async with asyncio.timeout(90):
            while not condition((await _log(kafka))[0].get("pod", [])):
                await asyncio.sleep(0.2)
            return (await _log(kafka))[0]["pod"]

    old = engine()
    live, replay = old.endpoint, str(old.replay_endpoint)
    settings = BridgeSettings(engines=[f"{live},{replay}"], group="bridges", session_timeout_seconds=6.0)
    cut = BridgeService(settings, kafka, clock=lambda: time.time_ns() + ahead_ns)
    other = BridgeService(settings, kafka)
    clear = [{"type": "AllBlocksCleared"}]
    try:
        await cut.start()
        old.publish(clear, timestamp=1.0)
        await until(lambda found: len(found) == 1)
        assert cut._ownership is not None
        coordinator = cut._ownership._consumer._coordinator
        heartbeat = coordinator._do_heartbeat

        async def unheard() -> bool:
            return False

        coordinator._do_heartbeat = unheard
        await asyncio.wait_for(other.start(), 90)
        ahead_ns = 10_000 * 10**9  # what the one that is cut off writes from here on is told by this
        session = cut.endpoints[live].session
        old.close()
        old = engine()
        for number in range(3):
            old.publish(clear, timestamp=100.0 + number)
        assert session is not None
        async with asyncio.timeout(90):
            while not session.tracker.counts.restarts:
                await asyncio.sleep(0.05)
        await until(lambda found: len(found) >= 4)
        ahead_ns = 0
        coordinator._do_heartbeat = heartbeat
        old.publish(clear, timestamp=200.0)
        found = await until(lambda found: bool(found) and found[-1][1] == 3)
    finally:
        await asyncio.gather(cut.stop(), other.stop())
        old.close()
    assert [sequence for _, sequence in dict.fromkeys(found)] == [0, 0, 1, 2, 3]
    assert max(incarnation for incarnation, _ in found) < time.time() + 5_000
