"""Everything at once on a real Kafka: bridge killed, Kafka and a pod restarted, messages forced off the wire.

Every message that a pod published is on the log once after de-duplication by (pod, incarnation, sequence), or
recorded as lost; no other outcome. Pods whose replay buffer holds everything lose nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.kafka import KafkaNode
from kvatlas.deploy.brokers.topics import ensure_topics
from tests.integration.log_support import read_topic

_PODS, _PARTITIONS, _SECONDS, _STEP_SECONDS = 20, 4, 60.0, 0.1
_RESTARTED, _FLOODED, _FORGETFUL = 0, 1, 2
_LIFE = 1_000_000


class Pod:
    """One pod over its lives; a message says which life and sequence it is from."""

    def __init__(self, number: int) -> None:
        self.name = f"pod-{number}"
        self.number = number
        self.published: list[int] = []
        self.paused = False
        self.engine = self._engine("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")

    def _engine(self, live: str, replay: str) -> EnginePublisher:
        hwm = 10 if self.number == _FLOODED else 100_000
        steps = 10 if self.number == _FORGETFUL else 10_000
        topic = f"kv@{self.name}@m"
        engine = EnginePublisher(live, replay, topic=topic, hwm=hwm, buffer_steps=steps, bind=True)
        engine.start()
        self.published.append(0)
        return engine

    def publish(self, padding: int = 0) -> int:
        """Send one message; returns its sequence."""
        life, sequence = len(self.published) - 1, self.published[-1]
        self.engine.publish_raw(msgspec.msgpack.encode((float(life * _LIFE + sequence), [bytes(padding)], 0)))
        self.published[-1] += 1
        return sequence

    def restart(self) -> None:
        """Be a new process at the same addresses."""
        live, replay = self.engine.endpoint, self.engine.replay_endpoint
        self.engine.close()
        assert replay is not None
        self.engine = self._engine(live, replay)


class Bridge:
    """The bridge's process; started again after each kill."""

    def __init__(self, kafka: KafkaSettings, pods: list[Pod]) -> None:
        command = [sys.executable, "-m", "kvatlas.deploy", "bridge", "--brokers", kafka.brokers, "--ownership", "all"]
        command += ["--topic-prefix", kafka.topic_prefix, "--partitions", str(_PARTITIONS)]
        command += ["--replay-timeout-seconds", "5", "--heartbeat-seconds", "2"]
        for pod in pods:
            command += ["--engines", f"{pod.engine.endpoint},{pod.engine.replay_endpoint}"]
        self._command = command
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)

    async def ready(self) -> None:
        """Wait until the process says that it is ready."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), 120)
        assert line.startswith("ready")

    def kill(self) -> None:
        """SIGKILL, and the next process at once."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    async def flood(self, pod: Pod) -> range:
        """Stop reading for a moment while a pod sends more than sockets and queues hold."""
        os.kill(self.process.pid, signal.SIGSTOP)
        first = pod.published[-1]
        for _ in range(600):
            pod.publish(padding=32_768)
        await asyncio.sleep(0.5)
        os.kill(self.process.pid, signal.SIGCONT)
        return range(first, pod.published[-1])


class Found:
    """What the log holds of each pod.

    Attributes:
        at: pod -> (life, sequence) -> the incarnations under which it is there.
        lost: pod -> sequences recorded as lost, with repetitions.
        replayed: pod -> (life, sequence) that came by replay.
    """

    def __init__(self) -> None:
        self.at: dict[str, dict[tuple[int, int], set[int]]] = defaultdict(lambda: defaultdict(set))
        self.lost: dict[str, list[int]] = defaultdict(list)
        self.replayed: dict[str, set[tuple[int, int]]] = defaultdict(set)

    def take(self, message: Any) -> None:
        headers, pod = dict(message.headers), message.key.decode()
        if headers["content_type"] == b"control":
            control = records.decode(records.Control, message.value)
            if control.first_lost >= 0:
                self.lost[pod] += range(control.first_lost, control.last_lost + 1)
            return
        stamp = int(msgspec.msgpack.decode(message.value)[0])
        life, sequence = divmod(stamp, _LIFE)
        assert int(headers["sequence"]) == sequence
        self.at[pod][life, sequence].add(int(headers["incarnation"]))
        if headers["source"] == b"replay":
            self.replayed[pod].add((life, sequence))

    def settled(self, pod: Pod) -> bool:
        known = {sequence for life, sequence in self.at[pod.name] if life == len(pod.published) - 1}
        return known | set(self.lost[pod.name]) >= set(range(pod.published[-1]))


async def _read(kafka: KafkaSettings) -> Found:
    found = Found()
    for message in await read_topic(kafka.brokers, kafka.topic(topics.EVENTS), _PARTITIONS):
        found.take(message)
    return found


async def _traffic(pods: list[Pod]) -> None:
    started, step = time.monotonic(), 0
    while time.monotonic() - started < _SECONDS:
        for pod in pods:
            if not pod.paused:
                pod.publish()
        step += 1
        await asyncio.sleep(max(0.0, started + step * _STEP_SECONDS - time.monotonic()))


async def _chaos(kafka: KafkaSettings, bridge: Bridge, node: KafkaNode, pods: list[Pod]) -> range:
    """Five kills, a flood, a pod's restart and Kafka's, spread over the traffic; returns what was flooded."""
    await asyncio.sleep(7)
    bridge.kill()
    for _ in range(30):  # nobody hears these, and the pod's buffer holds the last few alone
        pods[_FORGETFUL].publish()
    await asyncio.sleep(6)
    flooded = await bridge.flood(pods[_FLOODED])
    await asyncio.sleep(5)
    pods[_RESTARTED].paused = True  # what a process takes with it nobody can know of, so it is heard out first
    deadline = time.monotonic() + 90
    while not (await _read(kafka)).settled(pods[_RESTARTED]):
        assert time.monotonic() < deadline
        await asyncio.sleep(1.0)
    pods[_RESTARTED].restart()
    pods[_RESTARTED].paused = False
    for _ in range(2):
        await asyncio.sleep(4)
        bridge.kill()
    await asyncio.sleep(5)
    await asyncio.to_thread(node.stop)
    await asyncio.sleep(2)
    await asyncio.to_thread(node.start)
    for _ in range(2):
        await asyncio.sleep(4)
        bridge.kill()
    return flooded


@pytest.mark.timeout(600)
async def test_every_message_is_on_the_log_once_or_recorded_as_lost(own_kafka: KafkaNode, topic_prefix: str) -> None:
    """After kills, restarts and floods each message is there once or recorded as lost; full buffers lose nothing."""
    kafka = KafkaSettings(brokers=own_kafka.bootstrap, topic_prefix=topic_prefix, partitions=_PARTITIONS)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    pods = [Pod(number) for number in range(_PODS)]
    bridge = Bridge(kafka, pods)
    try:
        flooded, _ = await asyncio.gather(_chaos(kafka, bridge, own_kafka, pods), _traffic(pods))
        await bridge.ready()
        deadline = time.monotonic() + 120
        found = await _read(kafka)
        while not all(found.settled(pod) for pod in pods) and time.monotonic() < deadline:
            await asyncio.sleep(1.0)
            found = await _read(kafka)
        bridge.process.terminate()
        assert bridge.process.wait(60) == 0
    finally:
        bridge.process.kill()
        bridge.process.wait()
        for pod in pods:
            pod.engine.close()
    for pod in pods:
        there, lost = found.at[pod.name], found.lost[pod.name]
        assert all(len(incarnations) == 1 for incarnations in there.values()), pod.name
        published = {(life, n) for life, count in enumerate(pod.published) for n in range(count)}
        if pod.number != _FORGETFUL:
            assert (set(there), lost) == (published, []), pod.name
        else:
            assert set(there) | {(0, sequence) for sequence in lost} == published
            assert not set(there) & {(0, sequence) for sequence in lost}
            assert lost
            assert len(lost) == len(set(lost))
    assert len(pods[_RESTARTED].published) == 2
    assert found.replayed["pod-1"] & {(0, sequence) for sequence in flooded}
