"""Taking pods over and giving them up, as a consumer group tells it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from aiokafka import TopicPartition

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.ownership import Ownership
from kvatlas.bridge.runtime.settings import KafkaSettings

_PLACES = [TopicPartition("kv-events", number) for number in (0, 1)]


class Group:
    """What is gained and lost; gaining waits for ``answer`` and fails while it is an error."""

    def __init__(self, session_timeout_seconds: float = 60.0) -> None:
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: list[list[int]] = []
        self.gained: list[list[int]] = []
        settings = BridgeSettings(session_timeout_seconds=session_timeout_seconds)
        self.ownership = Ownership(settings, KafkaSettings(), 2, self._gain, self._lose)
        self.ownership._consumer = SimpleNamespace(pause=lambda *_: None)

    async def _gain(self, partitions: list[int]) -> None:
        self.gained.append(partitions)
        await asyncio.shield(self.answer)

    async def _lose(self, partitions: list[int]) -> None:
        self.lost.append(partitions)

    async def until_owned(self) -> None:
        async with asyncio.timeout(60):
            while not self.ownership.owns(0):
                await asyncio.sleep(0.01)


async def test_reading_positions_does_not_hold_up_the_group() -> None:
    """The callback returns while positions are read, since no heartbeat goes out before; pods are ours after."""
    group = Group()
    await group.ownership.on_partitions_assigned(_PLACES)
    await asyncio.sleep(0)
    assert not group.ownership.owns(0)
    group.answer.set_result(None)
    await group.until_owned()
    assert group.gained == [[0, 1]]
    await group.ownership.on_partitions_revoked(_PLACES)
    assert not group.ownership.owns(0)
    assert group.lost == [[0, 1]]


async def test_positions_that_cannot_be_read_now_are_read_later() -> None:
    """The group keeps no error of its callbacks: without another try these pods would be nobody's."""
    group = Group()
    group.answer.set_exception(LogError("away"))
    await group.ownership.on_partitions_assigned(_PLACES)
    async with asyncio.timeout(60):
        while not group.gained:
            await asyncio.sleep(0.01)
    assert not group.ownership.owns(0)
    group.answer = asyncio.get_running_loop().create_future()
    group.answer.set_result(None)
    await group.until_owned()
    assert len(group.gained) >= 2


async def test_what_is_taken_away_while_positions_are_read_is_not_taken() -> None:
    """A takeover that is overtaken by the next rebalance ends without owning anything."""
    group = Group()
    await group.ownership.on_partitions_assigned(_PLACES)
    await asyncio.sleep(0)
    await group.ownership.on_partitions_revoked(_PLACES)
    group.answer.set_result(None)
    await asyncio.sleep(0.05)
    assert not group.ownership.owns(0)


async def test_a_lease_ends_unless_heartbeats_are_answered() -> None:
    """It counts from when an answered heartbeat was sent; one that fails renews nothing."""
    group = Group(session_timeout_seconds=1.0)
    answers = [True]

    async def heartbeat() -> bool:
        return answers[0]

    coordinator = SimpleNamespace(_do_heartbeat=heartbeat)
    group.ownership._consumer._coordinator = coordinator
    group.ownership._lease.renew_with_heartbeats(group.ownership._consumer)
    assert not group.ownership.leased()
    assert await coordinator._do_heartbeat()
    assert group.ownership.leased()
    answers[0] = False
    async with asyncio.timeout(60):
        while group.ownership.leased():
            assert not await coordinator._do_heartbeat()
            await asyncio.sleep(0.05)
