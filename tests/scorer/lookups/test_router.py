"""Lookups at workers that are slow, dead, cut off or back again: whole answers where possible, flagged where not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from kvatlas.bridge.model.block_key import partition_of
from kvatlas.bridge.runtime.methods import add_service
from kvatlas.deploy.brokers.process import free_ports
from kvatlas.scorer.lookups.router import PartitionRouter
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.v1 import block_index_pb2 as index_pb
from tests.scorer.rig import KEYS, PARTITIONS, TOKENS, Index, Rig

ALL = set(range(PARTITIONS))


class Slow(Index):
    """A worker that takes its time, and counts the calls that were given up on."""

    def __init__(self, *arguments: Any, seconds: float, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.seconds = seconds
        self.called = self.cancelled = 0

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        self.called += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await super().Lookup(request, context)


class Held(Index):
    """A worker that answers once it is released."""

    def __init__(
        self, name: str, table: dict[bytes, bytes], partitions: set[int], released: asyncio.Event, role: int = 1
    ) -> None:
        super().__init__(name, table, partitions, role)
        self.released = released
        self.called = self.answered = 0

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        self.called += 1
        await self.released.wait()
        answer = await super().Lookup(request, context)
        self.answered += 1
        return answer


class Broken(Index):
    """A worker that answers one key too few."""

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        shorter = index_pb.LookupRequest(keys=request.keys[16:], partition_count=request.partition_count)
        return await super().Lookup(shorter, context)


class Astray(Index):
    """A worker whose answer points to values that are not in it."""

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        answer = await super().Lookup(request, context)
        del answer.values[:]
        return answer


class Watched(Rig):
    """A rig that notes what its lookups went through."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"deadline_ms": 60_000.0, **settings})
        self.events: list[str] = []
        self.last: pb.ScoreResponse | None = None
        self.router = PartitionRouter(
            self.workers, hedge_seconds=self.settings.hedge_ms / 1e3, on_event=self.events.append
        )
        self.core.use(self.core._index._replace(lookups=self.router))
        self.pod("a", 10)

    async def score(self) -> pb.ScoreResponse:
        """Score the prompt."""
        return await self.core.score(pb.ScoreRequest(model="m", tokens=TOKENS))


async def _once(field: str, *workers: Index) -> None:
    """Wait until a counter of each of these workers is 1."""
    async with asyncio.timeout(60):
        while any(getattr(worker, field) != 1 for worker in workers):
            await asyncio.sleep(0.01)


async def _watched(**settings: Any) -> AsyncIterator[Watched]:
    rig = Watched(**settings)
    async with rig.stack:
        yield rig
        await rig.router.close()


def _found(answer: pb.ScoreResponse) -> tuple[float, bool, bool]:
    return answer.scores["a"].score, answer.freshness.partial, answer.freshness.standby


async def test_a_slow_owner_is_overtaken_by_its_standby() -> None:
    """After hedge_ms the standby is asked too; its answer counts, is flagged, and the slow call is given up."""
    async for rig in _watched(hedge_ms=30.0):
        slow = Slow("w0", rig.table, ALL, seconds=600)
        await rig.worker(slow)
        await rig.worker(Index("w1", rig.table, ALL, role=2), standby=True)
        began = time.monotonic()
        assert _found(await rig.score()) == (10, False, True)
        assert time.monotonic() - began >= 0.03
        assert rig.events == ["hedged"]
        await _once("cancelled", slow)


async def test_a_standby_that_is_slower_still_changes_nothing() -> None:
    """The owner's answer counts when it comes before the standby's."""
    async for rig in _watched(hedge_ms=20.0, deadline_ms=60_000.0):
        await rig.worker(Slow("w0", rig.table, ALL, seconds=0.1))
        await rig.worker(Slow("w1", rig.table, ALL, role=2, seconds=600), standby=True)
        assert _found(await rig.score()) == (10, False, False)


async def test_a_quick_owner_is_not_hedged() -> None:
    """The standby is left alone while the owner answers in time, and always where hedging is off."""
    for hedge_ms, seconds in ((50_000.0, 0.0), (0.0, 0.1)):
        async for rig in _watched(hedge_ms=hedge_ms):
            standby = Index("w1", rig.table, ALL, role=2)
            await rig.worker(Slow("w0", rig.table, ALL, seconds=seconds))
            await rig.worker(standby, standby=True)
            assert _found(await rig.score()) == (10, False, False)
            assert (standby.asked, rig.events) == (0, [])


@pytest.mark.parametrize("hedge_ms", [0.0, 30.0])
async def test_a_dead_owner_is_replaced_by_its_standby(hedge_ms: float) -> None:
    """Nobody at the owner's address: the standby answers, with hedging and without."""
    async for rig in _watched(hedge_ms=hedge_ms, deadline_ms=60_000.0):
        await (await rig.worker(Index("w0", rig.table, ALL))).stop(0)
        await rig.worker(Index("w1", rig.table, ALL, role=2), standby=True)
        assert _found(await rig.score()) == (10, False, True)
        assert "failed" in rig.events


@pytest.mark.parametrize("kind", [Broken, Astray])
async def test_an_answer_that_makes_no_sense_counts_as_none(kind: type[Index]) -> None:
    """A worker that answers another number of keys, or values that it lacks, is not believed; its standby is asked."""
    async for rig in _watched():
        await rig.worker(kind("w0", rig.table, ALL))
        await rig.worker(Index("w1", rig.table, ALL, role=2), standby=True)
        assert _found(await rig.score()) == (10, False, True)


async def test_the_deadline_holds_and_what_is_missing_is_flagged() -> None:
    """With one of two owners silent, the answer comes at the deadline with what the other holds, flagged partial."""
    async for rig in _watched(deadline_ms=1_500.0, hedge_ms=20.0):
        first = partition_of(KEYS[0], PARTITIONS)
        silent = partition_of(next(key for key in KEYS if partition_of(key, PARTITIONS) != first), PARTITIONS)
        await rig.worker(Slow("w0", rig.table, {silent}, seconds=600))
        await rig.worker(Index("w1", rig.table, ALL - {silent}))
        known = next(at for at, key in enumerate(KEYS) if partition_of(key, PARTITIONS) == silent)
        began = time.monotonic()
        answer = await rig.score()
        assert _found(answer) == (known, True, False)
        assert time.monotonic() - began >= 1.4
        assert {p.partition for p in answer.freshness.partitions if p.role == "unanswered"} == {silent}
        assert "unanswered" in rig.events


async def test_the_deadline_of_a_caller_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller gets its partial answer before its own deadline is over, though the setting allows more."""
    monkeypatch.setattr("kvatlas.scorer.api.grpc_server._ANSWER_SECONDS", 600.0)
    monkeypatch.setattr("kvatlas.scorer.api.grpc_server._ANSWER_SHARE", 0.95)  # most of it is for a busy machine
    async for rig in _watched():
        await rig.worker(Slow("w0", rig.table, ALL, seconds=600))
        client = await rig.client(timeout_seconds=40.0)
        assert (await client.score("m", tokens=TOKENS)).freshness.partial


async def test_a_worker_that_comes_back_is_found_again() -> None:
    """While it is away answers are partial, afterwards whole, over the same router and without an error between."""
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    async for rig in _watched(deadline_ms=1_000.0):

        async def up(rig: Watched = rig) -> grpc.aio.Server:
            server = grpc.aio.server()
            add_service(server, index_pb, Index("w0", rig.table, ALL))
            server.add_insecure_port(endpoint)
            await server.start()
            return server

        rig.announce("w0", endpoint, sorted(ALL))
        for _ in range(2):
            server = await up()
            async with asyncio.timeout(60):
                while (await rig.score()).freshness.partial:
                    await asyncio.sleep(0.02)
            assert _found(await rig.score()) == (10, False, False)
            await server.stop(0)
            assert (await rig.score()).freshness.partial


async def test_connections_to_workers_that_left_are_closed() -> None:
    """A worker that is announced elsewhere is asked there, and the old connection goes."""
    async for rig in _watched():
        await rig.worker(Index("w0", rig.table, ALL))
        (old,) = rig.workers.endpoints()
        await rig.score()
        await rig.worker(Index("w0", rig.table, ALL))
        (new,) = rig.workers.endpoints()
        await rig.router.forget_gone()
        assert (old == new, list(rig.router._calls)) == (False, [])
        assert _found(await rig.score()) == (10, False, False)
        assert list(rig.router._calls) == [new]


async def test_a_worker_that_leaves_while_it_is_asked_is_no_error() -> None:
    """Its connection is closed under a running lookup: the caller gets a partial answer, not an error or a hang."""
    async for rig in _watched():
        slow = Slow("w0", rig.table, ALL, seconds=600)
        await rig.worker(slow)
        client = await rig.client(timeout_seconds=60)
        asked = asyncio.ensure_future(client.score("m", tokens=TOKENS))
        await _once("called", slow)
        rig.workers.apply(b"w0", None)
        await rig.router.forget_gone()
        answer = await asked
        assert (dict(answer.scores), answer.freshness.partial) == ({}, True)


async def test_a_standby_that_answers_last_does_not_replace_what_the_owner_said() -> None:
    """An owner that answers for half of its partitions is believed there, though a copy that is behind covers both."""
    first, second = sorted({partition_of(key, PARTITIONS) for key in KEYS})[:2]
    both, behind = {first, second}, dict[bytes, bytes]()
    async for rig in _watched(hedge_ms=20.0):
        released = asyncio.Event()
        owner = Held("w0", rig.table, {first}, asyncio.Event())
        copy = Held("w1", behind, both, released, role=2)
        await rig.worker(owner)
        rig.announce("w0", next(iter(rig.workers.endpoints())), sorted(both))
        await rig.worker(copy, standby=True)
        keys = [key for key in KEYS if partition_of(key, PARTITIONS) in both]
        asked = asyncio.ensure_future(rig.router.lookup(keys, time.monotonic() + 60))
        await _once("called", owner, copy)
        owner.released.set()
        await _once("answered", owner)
        released.set()
        answers = await asked
        found = {partition: answers.partitions[partition].role for partition in both}
        assert found == {first: "active", second: "standby"}
        for key, value in zip(keys, answers.values, strict=True):
            assert value == (rig.table[key] if partition_of(key, PARTITIONS) == first else b"")


async def test_an_owner_that_knows_nothing_does_not_hide_that_a_standby_answered() -> None:
    """What came from a copy is flagged so, also when the owner says last that it has nothing to say."""
    first, second = sorted({partition_of(key, PARTITIONS) for key in KEYS})[:2]
    async for rig in _watched(hedge_ms=20.0):
        owner = Held("w0", {}, set(), asyncio.Event())
        copy = Held("w1", rig.table, {first}, asyncio.Event(), role=2)
        await rig.worker(owner)
        await rig.worker(copy)
        one, other = (rig.workers.records[name].endpoint for name in ("w0", "w1"))
        rig.announce("w0", one, [first, second])
        rig.announce("w1", other, [first, second], standby=True)
        keys = [key for key in KEYS if partition_of(key, PARTITIONS) in (first, second)]
        asked = asyncio.ensure_future(rig.router.lookup(keys, time.monotonic() + 60))
        await _once("called", owner, copy)
        copy.released.set()
        await _once("answered", copy)
        owner.released.set()
        found = {partition: seen.role for partition, seen in (await asked).partitions.items()}
        assert found == {first: "standby", second: "unanswered"}


@pytest.mark.parametrize("hedge_ms", [0.0, 20.0], ids=["of its own", "of the silent one's standby"])
async def test_a_silent_owner_holds_up_no_other_partition(hedge_ms: float) -> None:
    """While one owner without a standby is silent, a partition that moved is asked where the answer points, at once."""
    silent, moved = sorted({partition_of(key, PARTITIONS) for key in KEYS})[:2]
    async for rig in _watched(hedge_ms=hedge_ms):
        owner = Held("w0", rig.table, {silent}, asyncio.Event())
        new = Index("w2", rig.table, {moved})
        await rig.worker(new)
        endpoint = rig.workers.records["w2"].endpoint
        rig.workers.apply(b"w2", None)
        await rig.worker(owner)
        if hedge_ms:  # the silent one has both, and the copy of one of them has moved on
            rig.announce("w0", rig.workers.records["w0"].endpoint, [silent, moved])
        await rig.worker(Index("w1", rig.table, set(), owner=endpoint))
        rig.announce("w1", rig.workers.records["w1"].endpoint, [moved], standby=bool(hedge_ms))
        keys = [key for key in KEYS if partition_of(key, PARTITIONS) in (silent, moved)]
        asked = asyncio.ensure_future(rig.router.lookup(keys, time.monotonic() + 120))
        async with asyncio.timeout(60):
            while not new.asked:
                await asyncio.sleep(0.01)
        assert not asked.done()
        owner.released.set()
        answers = await asked
        assert answers.values == [rig.table[key] for key in keys]
        assert {seen.role for seen in answers.partitions.values()} == {"active"}


class Spoilt(Index):
    """A worker whose values are no holders."""

    async def Lookup(self, request: index_pb.LookupRequest, context: Any) -> index_pb.LookupResponse:  # noqa: N802
        answer = await super().Lookup(request, context)
        for number, value in enumerate(answer.values):
            answer.values[number] = value + b"x"
        return answer


async def test_values_that_are_no_holders_are_no_answer() -> None:
    """Whoever else has the partition is asked; where nobody has, the score is partial and no error."""
    rig = Rig()
    async with rig.stack:
        rig.pod("a", 10)
        await rig.worker(Spoilt("w0", rig.table, ALL))
        scored = await rig.core.score(pb.ScoreRequest(model="m", tokens=TOKENS))
        assert scored.freshness.partial
        assert not scored.scores
        await rig.worker(Index("w1", rig.table, ALL, role=index_pb.PartitionState.STANDBY), standby=True)
        scored = await rig.core.score(pb.ScoreRequest(model="m", tokens=TOKENS))
        assert scored.scores["a"].matched_blocks == 10
        assert not scored.freshness.partial
