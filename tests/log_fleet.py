"""A simulated fleet that writes to ``kv-events`` itself, as the bridge would: for what is behind the bridge."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from aiokafka import AIOKafkaProducer

from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.records import Control
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench._figures import headers
from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.pod import SimPod

_RECORD = tuple[bytes, bytes, list[tuple[str, bytes]]]
FIRST_INCARNATION: Final = 1_700_000_000


class _LogPublisher:
    """A pod's publisher that makes ``kv-events`` records."""

    endpoint = "log"
    replay_endpoint: str | None = None

    def __init__(self, pod: str, model: str, incarnation: int, sink: queue.SimpleQueue[_RECORD]) -> None:
        self._pod, self._model, self._incarnation, self._sink = pod.encode(), model, incarnation, sink
        self._sequence = -1

    def start(self) -> None:
        """Say that a new process is there."""
        first = self._incarnation == FIRST_INCARNATION
        control = Control(type="start" if first else "restart", incarnation=self._incarnation)
        self._put(records.encode(control), topics.CONTENT_CONTROL, 0)

    def publish(self, events: Sequence[Mapping[str, Any]], *, timestamp: float, dp_rank: int | None = 0) -> int:
        """Write one batch and return its sequence."""
        self._sequence += 1
        self._put(encode_batch(timestamp, list(events), dp_rank), topics.CONTENT_ENGINE, self._sequence)
        return self._sequence

    def close(self) -> None:
        """Do nothing: there is no socket."""

    def _put(self, value: bytes, content: str, sequence: int) -> None:
        self._sink.put((self._pod, value, headers(sequence, self._incarnation, self._model, content)))


class LogFleet:
    """Simulated pods whose events go straight to ``kv-events``.

    Args:
        kafka: how to reach the brokers.
        partitions: of ``kv-events``.
        settings: pods and traffic.
    """

    def __init__(self, kafka: KafkaSettings, partitions: int, settings: SimPlan) -> None:
        self._topic = kafka.topic(topics.EVENTS)
        self._partitions = partitions
        self._sink: queue.SimpleQueue[_RECORD] = queue.SimpleQueue()
        self._random = random.Random(settings.seed)
        self._traffic: Iterator[Request] = traffic.requests(settings)
        self._lock = threading.RLock()
        names = [f"{settings.pod_prefix}{number}" for number in range(settings.pods)]
        self.pods = {name: self._pod(name, settings) for name in names}
        for pod in self.pods.values():
            pod.start()

    def _pod(self, name: str, settings: SimPlan) -> SimPod:
        incarnations = iter(range(FIRST_INCARNATION, FIRST_INCARNATION + 100_000))
        return SimPod(
            name,
            blocks=settings.blocks,
            cpu_blocks=settings.cpu_blocks,
            block_size_tokens=settings.block_size_tokens,
            model=settings.model,
            seed=self._random.getrandbits(64),
            publisher=lambda *_: _LogPublisher(name, settings.model, next(incarnations), self._sink),
            clock=time.time,
        )

    def serve(self, requests: int) -> list[Request]:
        """Run requests to their end on random pods; returns them."""
        served = list(islice(self._traffic, requests))
        for request in served:
            pod = self._random.choice(list(self.pods.values()))
            pod.submit(request)
            pod.drain()
        return served

    def disturb(self, clear: float, restart: float) -> None:
        """Clear or restart a random pod with these probabilities."""
        pod = self._random.choice(list(self.pods.values()))
        if self._random.random() < clear:
            pod.clear()
        if self._random.random() < restart:
            pod.restart()

    def truth(self) -> dict[str, dict[str, frozenset[bytes]]]:
        """Return what every pod holds: pod -> tier -> block keys."""
        return {
            name: {tier: frozenset(map(bytes.fromhex, keys)) for tier, keys in pod.held().items()}
            for name, pod in self.pods.items()
        }

    async def flush(self, producer: AIOKafkaProducer) -> int:
        """Send what the pods have published since; returns the number of messages."""
        pending = []
        while True:
            try:
                key, value, told = self._sink.get_nowait()
            except queue.Empty:
                break
            partition = pod_ids.pod_partition(key.decode(), self._partitions)
            pending.append(await producer.send(self._topic, value, key=key, headers=told, partition=partition))
        for sent in pending:
            await sent
        return len(pending)
