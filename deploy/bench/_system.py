"""What benchmarks of the whole system share: ``kvatlas up``'s parts, engines in a process of their own, probes.

The load is that of a fleet whose caches are full: each message of an engine's step stores 32 blocks in two events, one
that continues an earlier prompt and one that is new, and removes 32 that were stored before. A *block* here is one
such change of one block.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import re
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.settings import KafkaSettings, LogSettings
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.bench._figures import removed, stored
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.deploy.processes.launcher import Launcher
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.streams.options import WorkerSettings

PODS: Final = 8
EVENTS_PER_MESSAGE: Final = 3
RUN_BLOCKS: Final = 16
BLOCKS_PER_MESSAGE: Final = 4 * RUN_BLOCKS
CPU_SECONDS: Final = "process_cpu_seconds_total"
#: Block updates that the worker has committed to the index.
UPDATES: Final = 'kvatlas_worker_updates_total{agent="index"}'

_MODEL: Final = "bench-model"
_TOKENS: Final = 16
#: Messages that a pod's cache holds before it removes what is oldest.
_FILLED: Final = 20
_PROBE_BLOCKS: Final = 4
_LOOKUP_BLOCKS: Final = 512
_POLL_SECONDS: Final = 0.05
_STALLED_SECONDS: Final = 30.0


class StalledError(KvatlasError):
    """What was published does not arrive: on the embedded broker, a worker that fell 5 MB behind has lost it."""


# --- the system ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(
    kind: str, bootstrap: str, folder: Path, args: argparse.Namespace, flags: list[str]
) -> Iterator[tuple[str, str]]:
    """Run broker, bridge, worker and scorer; gives the scorer's address and that of the worker's metrics."""
    metrics = f"127.0.0.1:{free_ports(1)[0]}"
    kafka = KafkaSettings(partitions=args.partitions, topic_prefix=f"bench-{os.getpid()}-{time.time_ns() % 10**9}-")
    if bootstrap:
        kafka = KafkaSettings(brokers=bootstrap, partitions=args.partitions, topic_prefix=kafka.topic_prefix)
    sections = {
        "kafka": kafka,
        "log": LogSettings(level="warning"),
        "bridge": BridgeSettings(engines=flags),
        "worker": WorkerSettings(telemetry_listen=metrics),
        "scorer": ScorerSettings(listen="127.0.0.1:0"),
        "tokenizer": TokenizerSettings(),
    }
    launcher = Launcher(sections, folder / kind, use_embedded=not bootstrap)
    try:
        launcher.start(threading.Event())
        yield launcher.scorer, metrics
        launcher.check()
    finally:
        launcher.stop()


def metric(metrics: str, series: str) -> float:
    """Return a metric of the worker, 0 before it has one."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(metrics: str, target: int) -> float:
    """Wait until the index has so many updates; returns the wall clock then.

    Raises:
        StalledError: it does not get there.
    """
    seen, since = -1, time.monotonic()
    while True:
        count = int(metric(metrics, UPDATES))
        if count >= target:
            return time.time()
        if count != seen:
            seen, since = count, time.monotonic()
        elif time.monotonic() - since > _STALLED_SECONDS:
            raise StalledError(f"{count} of {target} block updates after {_STALLED_SECONDS:g} s without one")
        time.sleep(_POLL_SECONDS)


# --- the engines -----------------------------------------------------------------------------------------------------


class _Pod:
    """Makes one pod's messages: unlike any other pod's, so that every block is a block of its own."""

    def __init__(self, number: int) -> None:
        self._random = random.Random(number)  # noqa: S311 - load, not secrets
        self._next = (number + 1) << 40
        self._held: deque[list[int]] = deque()

    def message(self, *, full: bool = True) -> bytes:
        """Return the next message: 32 blocks stored and, once the cache is full, 32 removed."""
        last = self._held[-1][-1] if self._held else None
        first, second = self._hashes(), self._hashes()
        events: list[Mapping[str, Any]] = [
            stored(first, self._tokens(), parent=last),
            stored(second, self._tokens()),
        ]
        self._held.append(first + second)
        if full:
            events.append(removed(self._held.popleft()))
        return encode_batch(time.time(), events, 0)

    def _hashes(self) -> list[int]:
        found = list(range(self._next, self._next + RUN_BLOCKS))
        self._next += RUN_BLOCKS
        return found

    def _tokens(self) -> list[int]:
        return [self._random.randrange(150_000) for _ in range(RUN_BLOCKS * _TOKENS)]


class Engines(NamedTuple):
    """The engines' process, as the benchmark sees it."""

    flags: list[str]
    orders: Any
    answers: Any
    messages: int

    @property
    def filled(self) -> int:
        """Block updates that fill the caches, published at the start."""
        return PODS * _FILLED * 2 * RUN_BLOCKS

    @property
    def updates(self) -> int:
        """Block updates of a whole run."""
        return self.messages * BLOCKS_PER_MESSAGE

    def send(self, rate: float) -> float:
        """Send all messages at once (rate 0), or what is left and more at a rate until the end.

        Returns:
            The wall clock when the first one left, seconds.
        """
        self.orders.put(rate)
        return float(self.answers.get(timeout=60))


def _publish(messages: int, orders: Any, answers: Any) -> None:
    """Be the engines, in a process of its own."""
    engines = [
        EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@bench-{number}@{_MODEL}")
        for number in range(PODS)
    ]
    pods = [_Pod(number) for number in range(PODS)]
    for engine, pod in zip(engines, pods, strict=True):
        engine.start()
        for _ in range(_FILLED):
            engine.publish_raw(pod.message(full=False))
    made = [pods[number % PODS].message() for number in range(messages)]
    answers.put([f"{engine.endpoint},{engine.replay_endpoint}" for engine in engines])
    rate = orders.get()
    answers.put(time.time())
    if not rate:
        for number, payload in enumerate(made):
            engines[number % PODS].publish_raw(payload)
        made.clear()
        rate = orders.get()
        answers.put(time.time())
    more = (pods[number % PODS].message() for number in itertools.count())
    start = time.monotonic()
    for number, payload in enumerate(itertools.chain(made, more)):
        if not orders.empty():
            break
        engines[number % PODS].publish_raw(payload)
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
    for engine in engines:
        engine.close()


@contextlib.contextmanager
def engines(messages: int) -> Iterator[Engines]:
    context = multiprocessing.get_context("spawn")
    orders, answers = context.Queue(), context.Queue()
    with _rig.beside(_publish, messages, orders, answers):
        yield Engines(answers.get(timeout=120), orders, answers, messages)


# --- freshness -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def probe() -> Iterator[EnginePublisher]:
    with EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@bench-probe@{_MODEL}") as probe:
        yield probe


def freshness(probe: EnginePublisher, address: str, count: int) -> Iterator[float]:
    """Yield the ms from an engine's publish call to the first score that counts its blocks.

    Raises:
        StalledError: blocks never scored.
    """
    dice = random.Random(99)  # noqa: S311 - load, not secrets
    with ScorerClient(address) as client:
        for number in range(count):
            tokens = [dice.randrange(150_000) for _ in range(_PROBE_BLOCKS * _TOKENS)]
            yield _until_scored(client, probe, tokens, number * _PROBE_BLOCKS + 1)
            time.sleep(dice.random() * 0.02)  # not in step with anyone's polling


def lookups(probe: EnginePublisher, address: str, count: int) -> Iterator[float]:
    """Yield the ms that a scorer waits for the worker's answers about a prompt of 512 blocks that the probe holds.

    Raises:
        StalledError: blocks never scored.
    """
    dice = random.Random(98)  # noqa: S311 - load, not secrets
    tokens = [dice.randrange(150_000) for _ in range(_LOOKUP_BLOCKS * _TOKENS)]
    with ScorerClient(address) as client:
        _until_scored(client, probe, tokens, 1 << 50)
        for _ in range(count):
            yield client.score(_MODEL, tokens=tokens).stages.lookup_ms
            time.sleep(dice.random() * 0.02)


def _until_scored(client: ScorerClient, probe: EnginePublisher, tokens: list[int], first: int) -> float:
    """Store a prompt on the probe; returns the ms from the publish call to the first score that counts it whole."""
    event = stored(list(range(first, first + len(tokens) // _TOKENS)), tokens)
    began = time.monotonic()
    probe.publish([event], timestamp=time.time())
    while client.score(_MODEL, tokens=tokens).scores["bench-probe"].matched_tokens < len(tokens):
        if time.monotonic() - began > _STALLED_SECONDS:
            raise StalledError(f"blocks from {first} on do not score after {_STALLED_SECONDS:g} s")
        time.sleep(0.002)
    return (time.monotonic() - began) * 1e3
