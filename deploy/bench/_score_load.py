"""Scores at a steady rate while block updates are ingested: the load case of ``kvatlas bench score``."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Event
from typing import Any, Final, NamedTuple

import grpc
import numpy as np

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench import _rig, _serving
from kvatlas.deploy.bench._figures import figure, spread
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE

_TOKENS: Final = 8_192
_SLOW_MS: Final = 2.0
_TICK_SECONDS: Final = 0.02
_SETTLE_SECONDS: Final = 3.0
_CALL_SECONDS: Final = 10.0

aio: Any = getattr(grpc, "aio")  # noqa: B009 # the stubs of grpc leave out its asyncio half


def under_load(
    kafka: KafkaSettings,
    address: str,
    load: _rig.Load,
    beside: Sequence[np.ndarray[Any, Any]],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield percentiles of the time of a score, and the share of slow ones, while updates are ingested."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    sent = context.Value("q", 0)
    # A process of its own: what makes the load must not wait for what measures.
    process = context.Process(
        target=_ingest, args=(_Plan(kafka, list(beside), load.epoch, load.sequence, args.updates), stop, sent)
    )
    process.start()
    try:
        time.sleep(_SETTLE_SECONDS)
        before, began = sent.value, time.monotonic()
        times = asyncio.run(_ask(address, args.rate, args.seconds))
        rate = (sent.value - before) / (time.monotonic() - began)
    finally:
        stop.set()
        process.join(30)
        if process.is_alive():
            process.kill()
    case = f"load-{args.rate:.0f}"
    yield spread(case, times, "ms")
    slow = sum(found > _SLOW_MS for found in times) / len(times)
    yield figure(f"{case} past {_SLOW_MS:g} ms", slow * 100, "%")
    yield figure(f"{case} ingested meanwhile", rate, "updates/s")


async def _ask(address: str, rate: float, seconds: float) -> list[float]:
    """Ask at a steady rate, however slow the answers; returns milliseconds, each from when it was due."""
    request = pb.ScoreRequest(model=_serving.MODEL, tokens_packed=_serving.tokens(_TOKENS)).SerializeToString()
    times: list[float] = []
    async with aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/kvatlas.v1.Scorer/Score", response_deserializer=pb.ScoreResponse.FromString)

        async def one(due: float) -> None:
            try:
                answer = await call(request, timeout=_CALL_SECONDS)
            except aio.AioRpcError as error:
                times.append(_CALL_SECONDS * 1e3)
                odd[error.code().name] += 1
            else:
                times.append((time.perf_counter() - due) * 1e3)
                odd["partial"] += answer.freshness.partial
                odd["standby"] += answer.freshness.standby
                assert answer.freshness.partial or len(answer.scores) == _serving.PODS

        odd: Counter[str] = Counter()
        running: set[asyncio.Task[None]] = set()
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            due = began + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(one(max(due, time.perf_counter() - _TICK_SECONDS)))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    if any(odd.values()):
        print(f"{len(times)} calls, of which {dict(+odd)}", file=sys.stderr)
    return times


class _Plan(NamedTuple):
    """What is ingested: blocks of each pod to drop again, the pods' epoch and last sequence, updates/s."""

    kafka: KafkaSettings
    beside: list[np.ndarray[Any, Any]]
    epoch: int
    sequence: int
    per_second: int


def _ingest(plan: _Plan, stop: Event, sent: Any) -> None:
    asyncio.run(_pour(plan, stop, sent))


async def _pour(plan: _Plan, stop: Event, sent: Any) -> None:
    """Send updates as full caches make them: each pod stores new blocks and drops as many old ones."""
    kafka, beside = plan.kafka, plan.beside
    load = _rig.Load(len(beside), kafka.partitions, seed=time.time_ns() % 1_000_000)
    load.epoch, load.sequence = plan.epoch, plan.sequence
    topic = kafka.topic(topics.BLOCKS)
    half = max(int(plan.per_second * _TICK_SECONDS) // 2, 1)
    places = [0] * len(beside)
    number = 0
    async with _rig.producer(kafka) as target:
        began = time.monotonic()
        while not stop.is_set():
            pod = number % len(beside)
            old = beside[pod][places[pod] : places[pod] + half]
            places[pod] = (places[pod] + half) % max(len(beside[pod]) - half, 1)
            made = load.records(load.keys(half), pod, OP_ADD) + load.records(old, pod, OP_REMOVE)
            for partition, value in made:
                await target.send(topic, value, partition=partition)
            sent.value += half + len(old)
            number += 1
            await asyncio.sleep(max(began + number * _TICK_SECONDS - time.monotonic(), 0))
