"""``kvatlas bench bridge``: ZMQ to acknowledged Kafka, beside a plain loop of ``recv`` and ``send_and_wait``.

Engines publish in a process of their own: random block hashes and token ids of a vocabulary where few are frequent, so
that compression finds what it would find in text, and not a counter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import time
from collections.abc import Coroutine, Iterator
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import zmq
import zmq.asyncio
from aiokafka import AIOKafkaProducer

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.bench._figures import figure, stored
from kvatlas.deploy.brokers.topics import ensure_topics
from kvatlas.deploy.processes.main import loop_factory

HELP: Final = "messages a second through the bridge, and their delay"
_EVENTS, _BLOCKS, _TOKENS = 4, 8, 16
_SHAPES: Final = 1021  # no multiple of the pods, so that each pod sends all
_VOCABULARY: Final = 128_000
#: Left out of the delays: a fresh broker compiles its code meanwhile and takes three times the CPU of a warm one.
_WARM_SECONDS: Final = 10.0

_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--brokers", default="", help="a running Kafka; default: one of this benchmark's own")
    parser.add_argument("--pods", type=int, default=100, help="simulated pods")
    parser.add_argument("--messages", type=int, default=60_000, help="messages of the throughput case")
    parser.add_argument("--rate", type=float, default=5000.0, help="messages a second of the latency case")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the latency case")
    parser.add_argument("--cases", default="throughput,latency,compression", help="which to run")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one figure per case."""
    with _rig.broker(args.brokers) as (brokers, _):
        cases = args.cases.split(",")
        if "throughput" in cases:
            baseline = _run(_baseline(args, brokers))
            found = _run(_bridge(args, brokers, args.messages))
            yield figure("throughput", found.rate, "messages/s", baseline=baseline, ratio=found.rate / baseline)
            yield figure("throughput-cpu", found.cpu_us, "us of CPU/message")
        if "latency" in cases:
            seconds = args.seconds + _WARM_SECONDS
            delays = _run(_bridge(args, brokers, int(args.rate * seconds), rate=args.rate)).delays
            p50, p99 = delays[len(delays) // 2], delays[int(len(delays) * 0.99)]
            yield figure("latency", p99, "ms", p50=p50, p99=p99)
        for name in ("none", "lz4", "zstd") if "compression" in cases else ():
            found = _run(_bridge(args, brokers, args.messages // 2, compression=name))
            more = {"cpu_us": found.cpu_us, "messages_per_second": found.rate, "of_payload": found.part}
            yield figure(f"compression-{name}", found.stored_bytes, "B/message", **more)


class _Found(NamedTuple):
    """One run: messages a second, bridge CPU, bytes a message on the log and as part of the payload, delays in ms."""

    rate: float
    cpu_us: float
    stored_bytes: float
    part: float
    delays: list[float]


def _run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run on the loop that ``kvatlas bridge`` runs on."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def _payloads() -> list[bytes]:
    """Return messages as an engine encodes them, none like another."""
    chance = random.Random(7)  # noqa: S311 # traffic, not secrets
    return [encode_batch(time.time(), [_stored(chance) for _ in range(_EVENTS)], 0) for _ in range(_SHAPES)]


def _stored(chance: random.Random) -> dict[str, Any]:
    hashes, parent = [chance.getrandbits(64) for _ in range(_BLOCKS)], chance.getrandbits(64)
    # The rank of a word of Zipf's law, up to the vocabulary's size.
    tokens = [int(_VOCABULARY ** chance.random()) for _ in range(_BLOCKS * _TOKENS)]
    return stored(hashes, tokens, parent=parent)


def _publish(pods: int, messages: int, rate: float, addresses: Any, go: Any) -> None:
    """Be the engines, in a process of its own."""
    engines = [EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic=f"kv@pod-{n}@m") for n in range(pods)]
    for engine in engines:
        engine.start()
    payloads = _payloads()
    addresses.put([f"{engine.endpoint},{engine.replay_endpoint}" for engine in engines])
    go.wait()
    start = time.monotonic()
    for number in range(messages):
        engines[number % pods].publish_raw(payloads[number % _SHAPES])
        if rate and number % 10 == 0:
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
    go.clear()
    go.wait()
    for engine in engines:
        engine.close()


@contextlib.contextmanager
def _engines(pods: int, messages: int, rate: float) -> Iterator[tuple[list[str], Any]]:
    context = multiprocessing.get_context("spawn")
    addresses, go = context.Queue(), context.Event()
    with _rig.beside(_publish, pods, messages, rate, addresses, go):
        yield addresses.get(timeout=60), go


async def _topics(brokers: str) -> KafkaSettings:
    kafka = KafkaSettings(brokers=brokers, topic_prefix=f"bench-{time.time_ns()}-", partitions=8)
    await ensure_topics(kafka, [topic for topic in topics.TOPICS if topic.by == "pod"])
    return kafka


async def _bridge(
    args: argparse.Namespace, brokers: str, messages: int, *, rate: float = 0.0, compression: str | None = None
) -> _Found:
    kafka = await _topics(brokers)
    delays: list[float] = []
    with _engines(args.pods, messages, rate) as (addresses, go):
        settings = BridgeSettings(engines=addresses, ownership="all")
        if compression is not None:
            settings = msgspec.structs.replace(settings, compression=compression)
        bridge = BridgeService(settings, kafka)
        bridge.observe = (lambda ns: delays.append((time.time_ns() - ns) / 1e6)) if rate else None
        await bridge.start()
        tune_interpreter()
        await asyncio.sleep(1.5)
        go.set()
        start, cpu = time.monotonic(), time.process_time()
        while bridge.acknowledged < messages and time.monotonic() - start < 120:  # noqa: ASYNC110 - a plain counter
            await asyncio.sleep(0.005)
        took, cpu = time.monotonic() - start, time.process_time() - cpu
        done, stored = bridge.acknowledged, bridge.stored_bytes / max(bridge.acknowledged, 1)
        part = bridge.stored_bytes / max(bridge.received_bytes, 1)
        await bridge.stop()
    # The first seconds connect to partitions and compile the broker's code; the delay is that of a running system.
    delays = sorted(delays[int(rate * _WARM_SECONDS) :]) or [0.0]
    return _Found(done / took, cpu / max(done, 1) * 1e6, stored, part, delays)


async def _baseline(args: argparse.Namespace, brokers: str) -> float:
    """Messages a second of one loop that receives, sends and waits."""
    kafka, messages = await _topics(brokers), 1500
    with _engines(args.pods, messages, 0.0) as (addresses, go):
        socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        socket.subscribe(b"")
        for address in addresses:
            socket.connect(address.partition(",")[0])
        async with AIOKafkaProducer(bootstrap_servers=brokers, acks="all", enable_idempotence=True) as producer:
            await asyncio.sleep(1.0)
            go.set()
            start, done = time.monotonic(), 0
            while done < messages and time.monotonic() - start < 8:
                topic, _, payload = await socket.recv_multipart()
                await producer.send_and_wait(kafka.topic(topics.EVENTS), payload, key=topic)
                done += 1
            took = time.monotonic() - start
        socket.close(linger=0)
    return done / took
