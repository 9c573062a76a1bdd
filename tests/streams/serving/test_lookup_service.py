"""The lookup service under overload: refused at once, with a hint, and counted."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.streams import metrics
from kvatlas.streams.serving.lookup_service import LookupServer, LookupService
from kvatlas.streams.state.partition import Reflected, Role
from kvatlas.streams.v1 import block_index_pb2 as pb


def _service(**changed: Any) -> LookupService:
    given: dict[str, Any] = {"state_of": lambda _partition: None, "lag_of": lambda _partition: -1} | changed
    return LookupService(
        "w", partition_count=4, max_keys=100, others=WorkerDirectory(time.time_ns), certain=lambda: True, **given
    )


class Context:
    """What gRPC gives a call whose caller waits ten seconds."""

    def time_remaining(self) -> float:
        return 10.0

    async def abort(self, code: grpc.StatusCode, text: str, trailing: Any) -> None:
        raise RuntimeError(code, text, dict(trailing))


def _refused() -> float:
    return float(metrics.LOOKUPS.labels("overloaded")._value.get())


async def test_too_many_lookups_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no more may be worked on, a call is answered with the status, and when to ask again; health is not."""
    monkeypatch.setattr("kvatlas.streams.serving.lookup_service._MOST_LOOKUPS", 0)
    server = LookupServer(_service(), "127.0.0.1:0", max_keys=100)
    port = await server.start()
    before = _refused()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        lookup: Any = channel.unary_unary("/kvatlas.v1.BlockIndex/Lookup")
        with pytest.raises(grpc.aio.AioRpcError, match="lookups are worked on") as refused:
            await lookup(b"\xff no message", timeout=90)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(refused.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]) > 0
        health: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await health(b"", timeout=90) is not None
    assert _refused() == before + 1
    await server.stop(0)


async def test_a_lookup_that_came_in_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was taken while there was room finds none when its turn would come."""
    monkeypatch.setattr("kvatlas.streams.serving.lookup_service._MOST_LOOKUPS", 0)
    before = _refused()
    with pytest.raises(RuntimeError, match="grpc-retry-pushback-ms"):
        await _service().Lookup(pb.LookupRequest(), Context())
    assert _refused() == before + 1
    monkeypatch.undo()
    assert (await _service().Lookup(pb.LookupRequest(keys=bytes(16)), Context())).worker == "w"


async def test_kafka_is_asked_for_a_partitions_lag_seldom() -> None:
    """Lookups at the same moment tell the same lag of each partition; later ones ask again."""
    now, lags = 5.0, iter(range(3, 100))
    asked: list[int] = []

    def lag_of(partition: int) -> int:
        asked.append(partition)
        return next(lags)

    state = SimpleNamespace(
        role=Role.ACTIVE,
        reflected=Reflected(7, 8),
        cache=SimpleNamespace(young={}),
        overlay=SimpleNamespace(values={}),
        answer=lambda keys: [None] * len(keys),
    )
    service = _service(state_of=lambda _partition: state, lag_of=lag_of, clock=lambda: now)
    request = pb.LookupRequest(keys=b"".join(head.to_bytes(4, "big") + bytes(12) for head in (0, 1, 4)))

    async def told() -> list[int]:
        return [partition.lag_records for partition in (await service.Lookup(request, Context())).partitions]

    assert await told() == await told() == [3, 4]
    now = 5.02
    assert await told() == [5, 6]
    assert asked == [0, 1, 0, 1]
