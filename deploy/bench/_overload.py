"""Goodput at twice what callers can get: the overload case of ``kvatlas bench score``."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import grpc
import grpc.aio

from kvatlas.deploy.bench import _serving
from kvatlas.deploy.bench._figures import figure
from kvatlas.scorer.v1 import scorer_pb2 as pb

_TOKENS: Final = 8_192
#: Time that each caller gives; what comes later is no answer to it.
_DEADLINE_SECONDS: Final = 0.5
#: Callers that each wait for their answer; the best of these is what can be reached.
_CALLERS: Final = (4, 16, 64)
_FACTOR: Final = 2.0
_CODES: Final = {grpc.StatusCode.RESOURCE_EXHAUSTED: "refused", grpc.StatusCode.DEADLINE_EXCEEDED: "late"}


class _Counted:
    """Asks, and counts how it ended."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.ended: Counter[str] = Counter()
        self.good_ms: list[float] = []
        self.refused_ms: list[float] = []
        self._data = pb.ScoreRequest(model=_serving.MODEL, tokens_packed=_serving.tokens(_TOKENS)).SerializeToString()
        self._call: Any = channel.unary_unary("/kvatlas.v1.Scorer/Score")

    async def ask(self) -> None:
        """Ask once, with a deadline."""
        began = time.perf_counter()
        try:
            await self._call(self._data, timeout=_DEADLINE_SECONDS)
        except grpc.aio.AioRpcError as error:
            how = _CODES.get(error.code(), error.code().name)
        else:
            how = "good"
        self.ended[how] += 1
        took = (time.perf_counter() - began) * 1e3
        if how == "good":
            self.good_ms.append(took)
        elif how == "refused":
            self.refused_ms.append(took)


def overloaded(address: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the answers in time per second at twice the rate that callers reach who wait for their answers."""
    gc.collect()
    gc.disable()  # of the callers, who are not what is measured
    try:
        best = max(asyncio.run(_closed(address, callers, seconds)) for callers in _CALLERS)
        counted, took = asyncio.run(_open(address, _FACTOR * best, seconds))
    finally:
        gc.enable()
    sent = sum(counted.ended.values())
    goodput = counted.ended["good"] / took
    beside = {"baseline": best, "ratio": goodput / best}
    yield figure("load-overload", goodput, "answers/s", **_percentiles(counted.good_ms), **beside)
    yield figure("load-overload sent", sent / took, "requests/s")
    for how, count in sorted((counted.ended - Counter(good=counted.ended["good"])).items()):
        times = _percentiles(counted.refused_ms) if how == "refused" else {}
        yield figure(f"load-overload {how}", 100 * count / sent, "%", **times)


def _percentiles(times: list[float]) -> dict[str, float]:
    if len(times) < 2:
        return {}
    cuts = statistics.quantiles(times, n=100)
    return {"p50": cuts[49], "p99": cuts[98]}


async def _closed(address: str, callers: int, seconds: float) -> float:
    """Return answers a second that so many callers reach, each of whom asks again once it has its answer."""
    async with grpc.aio.insecure_channel(address) as channel:
        counted = _Counted(channel)
        began = time.monotonic()

        async def caller() -> None:
            while time.monotonic() < began + seconds:
                await counted.ask()

        await asyncio.gather(*(caller() for _ in range(callers)))
        return counted.ended["good"] / (time.monotonic() - began)


async def _open(address: str, rate: float, seconds: float) -> tuple[_Counted, float]:
    """Ask at a steady rate, however slow the answers; returns how it went and how long asking took."""
    async with grpc.aio.insecure_channel(address) as channel:
        counted = _Counted(channel)
        running: set[asyncio.Task[None]] = set()
        began = time.monotonic()
        for number in range(int(rate * seconds)):
            # Also where it is late: answers are to be read all the same.
            await asyncio.sleep(max(began + number / rate - time.monotonic(), 0))
            task = asyncio.create_task(counted.ask())
            running.add(task)
            task.add_done_callback(running.discard)
        took = time.monotonic() - began
        await asyncio.gather(*running)
    return counted, took
