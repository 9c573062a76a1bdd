"""The lookup service under overload and hostile callers: refused at once, with a hint, counted; nobody is held up."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.streams import metrics
from kvatlas.streams.index.columns import NOT_ANSWERED, read_index
from kvatlas.streams.serving.lookup_service import LookupServer, LookupService
from kvatlas.streams.state.partition import Reflected, Role
from kvatlas.streams.v1 import block_index_pb2 as pb


def _service(**changed: Any) -> LookupService:
    given: dict[str, Any] = {"state_of": lambda _partition: None, "lag_of": lambda _partition: -1, "max_keys": 100}
    return LookupService(
        "w", partition_count=4, others=WorkerDirectory(time.time_ns), certain=lambda: True, **given | changed
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


class Partition:
    """A partition whose reads take time, as a lookup of keys that are in no cache does."""

    def __init__(self, seconds_per_key: float) -> None:
        self.role = Role.ACTIVE
        self.reflected = Reflected(7, 8)
        self.cache = SimpleNamespace(young={})
        self.overlay = SimpleNamespace(values={})
        self.read = 0
        self._seconds = seconds_per_key

    def answer(self, keys: Sequence[bytes]) -> list[bytes | None]:
        self.read += len(keys)
        time.sleep(len(keys) * self._seconds)
        return [b"held"] * len(keys)


def _keys(count: int) -> bytes:
    return b"".join(number.to_bytes(16, "little") for number in range(count))


async def test_large_lookups_hold_the_loop_a_slice_at_a_time() -> None:
    """While eight callers ask for 16,384 keys each, nobody waits for more than a slice of one of them."""
    partition = Partition(2e-6)

    async def others() -> None:
        while True:
            read.append(partition.read)
            await asyncio.sleep(0)

    read: list[int] = []
    service = _service(state_of=lambda _partition: partition, max_keys=16_384)
    watching = asyncio.create_task(others())
    answers = await asyncio.gather(*(service.Lookup(pb.LookupRequest(keys=_keys(16_384)), Context()) for _ in range(8)))
    watching.cancel()
    assert max(after - before for before, after in itertools.pairwise(read)) <= 4 * 512
    for answer in answers:
        assert answer.index == (1).to_bytes(4, "little") * 16_384
        assert list(answer.values) == [b"held"]


async def test_a_partition_that_goes_during_a_large_lookup_is_not_read_any_more() -> None:
    """Its rest is not answered, rather than answered from what may be old."""
    partition = Partition(1e-5)
    service = _service(state_of=lambda _partition: partition, max_keys=2_048)
    asked = asyncio.create_task(service.Lookup(pb.LookupRequest(keys=_keys(2_048)), Context()))
    while not partition.read:
        await asyncio.sleep(0)
    partition.role = Role.RESTORING
    index = read_index((await asked).index)
    assert index[0] == 1
    assert index[-1] == NOT_ANSWERED
    assert partition.read == index.count(1)


async def test_more_large_lookups_than_wait_for_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds its keys in memory; small ones are answered all the same."""
    monkeypatch.setattr("kvatlas.streams.serving.lookup_service._MOST_LARGE", 2)
    partition = Partition(1e-5)
    service = _service(state_of=lambda _partition: partition, max_keys=2_048)
    request = pb.LookupRequest(keys=_keys(2_048))
    found = await asyncio.gather(*(service.Lookup(request, Context()) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(one, RuntimeError) for one in found) == 3
    assert (await service.Lookup(pb.LookupRequest(keys=_keys(1)), Context())).worker == "w"


@pytest.mark.parametrize("data", [b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x02\xff"])
async def test_bytes_that_are_no_message_are_the_callers_error(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """INVALID_ARGUMENT and no traceback: a caller cannot fill the log. What it does not know is ignored."""
    server = LookupServer(_service(), "127.0.0.1:0", max_keys=100)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        lookup: Any = channel.unary_unary("/kvatlas.v1.BlockIndex/Lookup")
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await lookup(data, timeout=90)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await lookup(b"\x9a\x06\x01x" * 500, timeout=90)
    await server.stop(0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
