"""``kvatlas bench score``: time of a score against a running worker on Kafka, beside an empty call to the same server.

Cases: ``grpc-N`` asks the scorer inside the worker (no hop) with N token ids, ``packed`` as bytes and ``repeated`` as
the field of numbers; ``hop-8192`` a scorer in a process of its own; ``inprocess-8192`` leaves gRPC out;
``load-460`` asks 460 times a second while block updates are ingested; ``load-overload`` asks twice as often as callers
can who wait for their answers. All pods hold all of the prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.bench import _rig, _serving
from kvatlas.deploy.bench._figures import spread
from kvatlas.deploy.bench._overload import overloaded
from kvatlas.deploy.bench._score_load import under_load
from kvatlas.deploy.processes.colocated import ScoringWorker
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.options import WorkerSettings

HELP: Final = "milliseconds per score: gRPC, with a hop, in process, beside an empty call; and under load"

_SIZES: Final = (8_192, 32_768, 131_072)
_CASES: Final = ("grpc", "repeated", "hop", "inprocess", "load", "overload")
_WARM_CALLS: Final = 30
_READY_SECONDS: Final = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _serving.add_arguments(parser)
    parser.add_argument("--calls", type=int, default=1_000, help="calls per case at 8,192 tokens, fewer above")
    parser.add_argument("--case", action="append", choices=_CASES, help="these alone, repeatable")
    parser.add_argument("--rate", type=float, default=460.0, help="requests/s of the load case")
    parser.add_argument("--updates", type=int, default=20_000, help="block updates/s of the load case")
    parser.add_argument("--overload-seconds", type=float, default=8.0, help="length of each part of the overload case")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the load case")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    cases = args.case or _CASES
    blocks = max(int(args.blocks * args.scale), 20_000)
    with _rig.broker(args.brokers, args.work_dir) as (bootstrap, folder):
        kafka = asyncio.run(_rig.fresh_topics(bootstrap, args.partitions))
        load = _rig.Load(_serving.PODS, args.partitions)
        with _serving.scoring("scoring-worker", kafka, folder) as address:
            beside = _serving.others(load, blocks)
            _serving.until_filled(address, asyncio.run(_serving.fill(kafka, load, beside)))
            yield from _over_grpc(cases, address, args.calls)
            if "hop" in cases:
                with _serving.scoring("scorer", kafka, folder) as apart:
                    yield _compared("hop-8192", apart, _SIZES[0], args.calls)
            if "overload" in cases:
                yield from overloaded(address, args.overload_seconds)
            if "load" in cases:
                yield from under_load(kafka, address, load, beside, args)
        if "inprocess" in cases:
            yield asyncio.run(_in_process(kafka, folder, args.calls))


def _over_grpc(cases: Sequence[str], address: str, calls: int) -> Iterator[dict[str, Any]]:
    for size in _SIZES:
        count = max(calls * _SIZES[0] // size, 100)
        if "grpc" in cases:
            yield _compared(f"grpc-{size}", address, size, count)
        if "repeated" in cases:
            yield _compared(f"grpc-{size}-repeated", address, size, count, repeated=True)


def _compared(case: str, address: str, size: int, count: int, *, repeated: bool = False) -> dict[str, Any]:
    """Time a score and an empty call in turn, so that both meet the same machine."""
    request = pb.ScoreRequest(model=_serving.MODEL)
    if repeated:
        request.tokens.extend(array("I", _serving.tokens(size)))
    else:
        request.tokens_packed = _serving.tokens(size)
    with grpc.insecure_channel(address, options=[("grpc.max_send_message_length", -1)]) as channel:
        ask: Any = channel.unary_unary("/kvatlas.v1.Scorer/Score", response_deserializer=pb.ScoreResponse.FromString)
        # The time is the server's and the wire's: a router builds its message once, in its own language.
        full, empty = request.SerializeToString(), pb.ScoreRequest(model=_serving.MODEL).SerializeToString()
        answer = ask(full, timeout=60)
        assert all(answer.scores[_serving.pod_name(n)].matched_tokens == size for n in range(_serving.PODS))
        times, baseline = _in_turn((lambda: ask(full, timeout=60), lambda: ask(empty, timeout=60)), count)
    return spread(case, times, "ms", statistics.median(baseline))


def _in_turn(calls: Sequence[Callable[[], Any]], count: int) -> list[list[float]]:
    """Return the milliseconds of each call, made in turn."""
    times: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.disable()  # of the caller, which is not what is measured
    try:
        for number in range(_WARM_CALLS + count):
            for call, found in zip(calls, times, strict=True):
                began = time.perf_counter()
                call()
                if number >= _WARM_CALLS:
                    found.append((time.perf_counter() - began) * 1e3)
    finally:
        gc.enable()
    return times


async def _in_process(kafka: KafkaSettings, folder: Path, calls: int) -> dict[str, Any]:
    """Time the operation behind the RPC, in a worker that takes over the tables of the one before."""
    service = ScoringWorker(
        WorkerSettings(state_dir=str(folder / "state")),
        kafka,
        ScorerSettings(listen="127.0.0.1:0"),
        TokenizerSettings(),
    )
    await service.start()
    try:
        await asyncio.wait_for(service.ready.wait(), _READY_SECONDS)
        request = pb.ScoreRequest(model=_serving.MODEL, tokens_packed=_serving.tokens(_SIZES[0]))
        times = []
        for _ in range(_WARM_CALLS + calls):
            began = time.perf_counter()
            await service.core.score(request)
            times.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(0)
    finally:
        await service.stop()
    return spread(f"inprocess-{_SIZES[0]}", times[_WARM_CALLS:], "ms")
