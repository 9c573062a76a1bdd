"""Kafka clients of services whose metadata task ends: each of them ends its service, on the real Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvatlas.bridge.errors import TaskEndedError
from kvatlas.bridge.model.records import DecisionRecord
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.relay.service import BridgeService
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.console.options import ConsoleSettings
from kvatlas.deploy.console.server import ConsoleService
from kvatlas.scorer.gateway.options import PickerSettings
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.streams.options import WorkerSettings
from tests.integration.streams_support import make_topics

_WAIT_SECONDS = 90.0

Task = asyncio.Task[Any]
Start = Callable[[KafkaSettings], Awaitable[Any]]


class BrokenError(Exception):
    """What a client's task gets."""


async def _bridge(kafka: KafkaSettings) -> BridgeService:
    bridge = BridgeService(BridgeSettings(listen="", group="bridges"), kafka)
    await bridge.start()
    return bridge


async def _scorer(kafka: KafkaSettings) -> ScorerService:
    scorer = ScorerService(ScorerSettings(listen="127.0.0.1:0", telemetry_listen=""), kafka)
    await scorer.start()
    scorer.publish(DecisionRecord(request_id="one", pod="a", scorer="s"))  # its producer starts with the first
    await scorer._decided.wait(_WAIT_SECONDS)  # a client that is starting is given up and replaced instead
    while scorer._producer is None:
        await asyncio.sleep(0.05)
    return scorer


async def _console(kafka: KafkaSettings) -> ConsoleService:
    console = ConsoleService(ConsoleSettings(listen="127.0.0.1:0"), kafka, WorkerSettings(), PickerSettings())
    await console.start()
    await console._follower.wait(_WAIT_SECONDS)
    return console


def _metadata_tasks() -> list[Task]:
    """Return the tasks of this loop's clients, in the order of their starts."""
    found = [task for task in asyncio.all_tasks() if "_md_synchronizer" in str(task.get_coro())]
    return sorted(found, key=lambda task: int(task.get_name().rpartition("-")[2]))


async def _break(task: Task) -> None:
    """Have what a task waits for raise."""
    while (waiter := getattr(task, "_fut_waiter", None)) is None or waiter.done():
        await asyncio.sleep(0)
    waiter.set_exception(BrokenError())


@pytest.mark.parametrize(
    ("start", "clients"), [(_bridge, 2), (_scorer, 4), (_console, 4)], ids=["bridge", "scorer", "console"]
)
async def test_a_service_ends_when_one_of_its_clients_keeps_no_metadata(
    start: Start, clients: int, brokers: str, topic_prefix: str
) -> None:
    """Client by client: without it new leaders and partitions would never be found, so the service ends and says so."""
    kafka = await make_topics(brokers, topic_prefix)
    for number in range(clients):
        service = await start(kafka)
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                while len(_metadata_tasks()) != clients:
                    await asyncio.sleep(0.05)
                await _break(_metadata_tasks()[number])
                with pytest.raises((TaskEndedError, BrokenError)) as raised:
                    await service.run_until(asyncio.Event())
        finally:
            await service.stop()  # closing a client raises what ended its task, and holds up nothing else
        assert BrokenError in (type(raised.value), type(raised.value.__cause__)), number
