"""``kvatlas bench pipeline``: the parts of ``kvatlas up`` under load, from an engine's socket to table and score.

The load is that of a fleet whose caches are full: each message of an engine's step stores 32 blocks in two events, one
that continues an earlier prompt and one that is new, and removes 32 that were stored before. A *block* here is one
such change of one block. Engines run in a process of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import socket
import statistics
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvatlas.bridge.adapters.fields import encode_batch
from kvatlas.bridge.engine_publisher import EnginePublisher
from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.settings import KafkaSettings, LogSettings
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.launcher import Launcher
from kvatlas.scorer.client import ScorerClient
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.streams.options import WorkerSettings

HELP: Final = "events/s and blocks/s from ZMQ to table, and ZMQ-to-score freshness, on both brokers"

_MODEL: Final = "bench-model"
_PODS: Final = 8
_TOKENS: Final = 16
_RUN_BLOCKS: Final = 16
_EVENTS_PER_MESSAGE: Final = 3
_BLOCKS_PER_MESSAGE: Final = 4 * _RUN_BLOCKS
#: Messages that a pod's cache holds before it removes what is oldest.
_FILLED: Final = 20
#: The embedded broker keeps 5 MB a partition, so what is measured on it must fit whatever pods share a partition.
_BLOCKS: Final = {"embedded": 120_000, "real": 600_000}
#: Block updates that the worker has committed to the index, and the CPU time of its process.
_UPDATES: Final = 'kvatlas_worker_updates_total{agent="index"}'
_CPU_SECONDS: Final = "process_cpu_seconds_total"
_PROBE_BLOCKS: Final = 4
_POLL_SECONDS: Final = 0.05
_STALLED_SECONDS: Final = 30.0


class StalledError(KvatlasError):
    """What was published does not arrive: on the embedded broker, a worker that fell 5 MB behind has lost it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _rig.add_arguments(parser)
    parser.add_argument("--on", choices=["both", "embedded", "real"], default="both", help="which broker")
    parser.add_argument("--probes", type=int, default=100, help="messages whose way to the score is timed")
    parser.add_argument("--rate", type=float, default=20.0, help="other messages a second meanwhile")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each broker."""
    if args.on in ("both", "embedded"):
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(_folder(args))
            yield from _measure("embedded", "", folder, args)
    if args.on in ("both", "real"):
        with _rig.broker(args) as (bootstrap, folder):
            yield from _measure("real", bootstrap, folder, args)


@contextlib.contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    # The rig's broker with an address given starts none and only makes the folder.
    with _rig.broker(argparse.Namespace(brokers="-", work_dir=args.work_dir)) as (_, folder):
        yield folder


def _measure(kind: str, bootstrap: str, folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    messages = max(int(_BLOCKS[kind] * args.scale) // _BLOCKS_PER_MESSAGE, _PODS)
    with (
        _engines(messages) as engines,
        _probe() as probe,
        _pipeline(kind, bootstrap, folder, args, [*engines.flags, f"{probe.endpoint},{probe.replay_endpoint}"]) as (
            address,
            metrics,
        ),
    ):
        _until(metrics, engines.filled)
        cpu, began = _metric(metrics, _CPU_SECONDS), engines.send(0.0)
        seconds = _until(metrics, engines.filled + engines.updates) - began
        yield _figure(kind, "blocks, ZMQ to table", engines.updates / seconds, "blocks/s")
        yield _figure(kind, "events, ZMQ to table", messages * _EVENTS_PER_MESSAGE / seconds, "events/s")
        cpu = (_metric(metrics, _CPU_SECONDS) - cpu) / engines.updates
        yield _figure(kind, "CPU of the worker", cpu * 1e6, "us/block")
        engines.send(args.rate)
        delays = sorted(_freshness(probe, address, args.probes))
        p50, p99 = statistics.median(delays), delays[int(len(delays) * 0.99)]
        yield _figure(kind, "freshness, ZMQ to score", p50, "ms", p50=round(p50, 2), p99=round(p99, 2))


def _figure(kind: str, case: str, value: float, unit: str, **more: float) -> dict[str, Any]:
    return {"bench": "pipeline", "case": f"{kind}: {case}", "value": round(value, 2), "unit": unit, **more}


# --- the system ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pipeline(
    kind: str, bootstrap: str, folder: Path, args: argparse.Namespace, engines: list[str]
) -> Iterator[tuple[str, str]]:
    """Run broker, bridge, worker and scorer; gives the scorer's address and that of the worker's metrics."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    kafka = KafkaSettings(partitions=args.partitions, topic_prefix=f"bench-{os.getpid()}-{time.time_ns() % 10**9}-")
    if bootstrap:
        kafka = KafkaSettings(brokers=bootstrap, partitions=args.partitions, topic_prefix=kafka.topic_prefix)
    sections = {
        "kafka": kafka,
        "log": LogSettings(level="warning"),
        "bridge": BridgeSettings(engines=engines),
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


def _metric(metrics: str, series: str) -> float:
    """Return a metric of the worker, 0 before it has one."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _until(metrics: str, target: int) -> float:
    """Wait until the index has so many updates; returns the wall clock then.

    Raises:
        StalledError: it does not get there.
    """
    seen, since = -1, time.monotonic()
    while True:
        count = int(_metric(metrics, _UPDATES))
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
        events: list[Mapping[str, Any]] = [self._stored(first, last), self._stored(second, None)]
        self._held.append(first + second)
        if full:
            events.append({"type": "BlockRemoved", "block_hashes": self._held.popleft(), "medium": "GPU"})
        return encode_batch(time.time(), events, 0)

    def _hashes(self) -> list[int]:
        found = list(range(self._next, self._next + _RUN_BLOCKS))
        self._next += _RUN_BLOCKS
        return found

    def _stored(self, hashes: list[int], parent: int | None) -> dict[str, Any]:
        return {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": parent,
            "token_ids": [self._random.randrange(150_000) for _ in range(_RUN_BLOCKS * _TOKENS)],
            "block_size": _TOKENS,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }


class _Engines(NamedTuple):
    """The engines' process, as the benchmark sees it."""

    flags: list[str]
    orders: Any
    answers: Any
    messages: int

    @property
    def filled(self) -> int:
        """Block updates that fill the caches, published at the start."""
        return _PODS * _FILLED * 2 * _RUN_BLOCKS

    @property
    def updates(self) -> int:
        """Block updates of a whole run."""
        return self.messages * _BLOCKS_PER_MESSAGE

    def send(self, rate: float) -> float:
        """Send all messages at once (rate 0), or more at a rate until the end; returns when the first one left."""
        self.orders.put(rate)
        return float(self.answers.get(timeout=60))


def _publish(messages: int, orders: Any, answers: Any) -> None:
    """Be the engines, in a process of its own."""
    engines = [
        EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@bench-{number}@{_MODEL}")
        for number in range(_PODS)
    ]
    pods = [_Pod(number) for number in range(_PODS)]
    for engine, pod in zip(engines, pods, strict=True):
        engine.start()
        for _ in range(_FILLED):
            engine.publish_raw(pod.message(full=False))
    made = [pods[number % _PODS].message() for number in range(messages)]
    answers.put([f"{engine.endpoint},{engine.replay_endpoint}" for engine in engines])
    orders.get()
    answers.put(time.time())
    for number, payload in enumerate(made):
        engines[number % _PODS].publish_raw(payload)
    rate = orders.get()
    answers.put(time.time())
    start, number = time.monotonic(), messages
    while orders.empty():
        engines[number % _PODS].publish_raw(pods[number % _PODS].message())
        number += 1
        time.sleep(max(0.0, start + (number - messages) / rate - time.monotonic()))
    for engine in engines:
        engine.close()


@contextlib.contextmanager
def _engines(messages: int) -> Iterator[_Engines]:
    context = multiprocessing.get_context("spawn")
    orders, answers = context.Queue(), context.Queue()
    process = context.Process(target=_publish, args=(messages, orders, answers), daemon=True)
    process.start()
    try:
        yield _Engines(answers.get(timeout=120), orders, answers, messages)
    finally:
        process.terminate()
        process.join()


# --- freshness -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _probe() -> Iterator[EnginePublisher]:
    with EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@bench-probe@{_MODEL}") as probe:
        yield probe


def _freshness(probe: EnginePublisher, address: str, count: int) -> Iterator[float]:
    """Yield the ms from an engine's publish call to the first score that counts its blocks.

    Raises:
        StalledError: blocks never scored.
    """
    dice = random.Random(99)  # noqa: S311 - load, not secrets
    with ScorerClient(address) as client:
        for number in range(count):
            tokens = [dice.randrange(150_000) for _ in range(_PROBE_BLOCKS * _TOKENS)]
            first = number * _PROBE_BLOCKS + 1
            event = {
                "type": "BlockStored",
                "block_hashes": list(range(first, first + _PROBE_BLOCKS)),
                "parent_block_hash": None,
                "token_ids": tokens,
                "block_size": _TOKENS,
                "medium": "GPU",
            }
            began = time.monotonic()
            probe.publish([event], timestamp=time.time())
            while client.score(_MODEL, tokens=tokens).scores["bench-probe"].matched_tokens < len(tokens):
                if time.monotonic() - began > _STALLED_SECONDS:
                    raise StalledError(f"blocks of probe {number} do not score after {_STALLED_SECONDS:g} s")
                time.sleep(0.002)
            yield (time.monotonic() - began) * 1e3
            time.sleep(dice.random() * 0.02)  # not in step with anyone's polling
