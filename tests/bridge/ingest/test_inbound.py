"""Engines that connect to the bridge: who is who, and what happens when one leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.engines.wires import Wires
from kvatlas.bridge.ingest.inbound import Inbound

_CLEAR = [{"type": "AllBlocksCleared"}]


@pytest.fixture
def engines() -> Iterator[list[EnginePublisher]]:
    """Engines that are closed at the end."""
    made: list[EnginePublisher] = []
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
async def inbound(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Inbound]:
    """A bound socket."""
    monkeypatch.setattr("kvatlas.bridge.ingest.inbound.BIND_PODS", 2)
    wires = Wires(bridge.shared.settings)
    inbound = Inbound("tcp://127.0.0.1:*,model=m", bridge.shared, wires, bridge.open)
    yield inbound
    inbound.close()
    wires.close()


def _connect(engines: list[EnginePublisher], inbound: Inbound, topic: str = "") -> EnginePublisher:
    engine = EnginePublisher(inbound.address, topic=topic, bind=False)
    engine.start()
    engines.append(engine)
    return engine


async def _say(engine: EnginePublisher, count: int) -> None:
    for _ in range(count):
        engine.publish(_CLEAR, timestamp=1.0, dp_rank=None)
        await asyncio.sleep(0.01)


async def test_two_engines_behind_one_address_do_not_become_one_pod(
    bridge: Any, inbound: Inbound, engines: list[EnginePublisher]
) -> None:
    """Without names the second of one address is left out and counted; it is the pod, anew, once the first left."""
    first, second = _connect(engines, inbound), _connect(engines, inbound)
    await bridge.until(lambda: all(engine.subscribed for engine in engines))
    await _say(first, 3)
    await bridge.until(lambda: len(bridge.log.messages("127.0.0.1")) == 3)
    await _say(second, 5)
    await bridge.until(lambda: bridge.shared.conflicts == 1)
    await _say(first, 2)
    await bridge.until(lambda: len(bridge.log.messages("127.0.0.1")) == 5)
    found = bridge.log.messages("127.0.0.1")
    assert [sequence for _, sequence in found] == list(range(5))
    assert bridge.shared.conflicts == 1
    engines.pop(0).close()
    await bridge.until(lambda: next(iter(bridge.endpoints.values())).leaving)
    await _say(second, 1)
    await bridge.until(lambda: len(bridge.log.messages("127.0.0.1")) == 6)
    assert bridge.log.messages("127.0.0.1")[5][1] == 5
    assert [control.type for control in bridge.log.controls("127.0.0.1")] == ["start", "restart", "gap"]
    assert len(bridge.endpoints) == 1


async def test_two_engines_of_one_name_do_not_become_one_pod(
    bridge: Any, inbound: Inbound, engines: list[EnginePublisher]
) -> None:
    """The same holds for two connections under one topic."""
    first, second = (_connect(engines, inbound, "kv@pod-x@m") for _ in range(2))
    await bridge.until(lambda: all(engine.subscribed for engine in engines))
    for _ in range(3):
        await _say(first, 1)
        await _say(second, 1)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 3 and bridge.shared.conflicts == 1)
    assert [sequence for _, sequence in bridge.log.messages("pod-x")] == [0, 1, 2]
    assert [control.type for control in bridge.log.controls("pod-x")] == ["start"]
    assert bridge.shared.conflicts == 1


async def test_a_pod_whose_connection_is_closed_leaves(
    bridge: Any, inbound: Inbound, engines: list[EnginePublisher]
) -> None:
    """A closed connection is given up after the limit, and makes room; an open one stays, however silent."""
    left, silent = _connect(engines, inbound, "kv@a@m"), _connect(engines, inbound, "kv@b@m")
    await bridge.until(lambda: all(engine.subscribed for engine in engines))
    await _say(left, 1)
    await _say(silent, 1)
    await bridge.until(lambda: len(bridge.endpoints) == 2)
    assert inbound.left(0.0, 30.0) == inbound.left(1e9, 30.0) == []
    engines.remove(left)
    left.close()
    await bridge.until(lambda: any(stream.leaving for stream in bridge.endpoints.values()))
    assert inbound.left(1000.0, 30.0) == inbound.left(1029.0, 30.0) == []
    gone = inbound.left(1030.0, 30.0)
    assert [stream.pod for stream in gone] == ["a"]
    assert inbound.left(1060.0, 30.0) == []
    third = _connect(engines, inbound, "kv@c@m")
    await bridge.until(lambda: third.subscribed)
    await _say(third, 30)
    await bridge.until(lambda: len(bridge.log.messages("c")) > 0)
    assert bridge.shared.dead == {}


async def test_a_pod_that_connects_again_in_time_stays(
    bridge: Any, inbound: Inbound, engines: list[EnginePublisher]
) -> None:
    """A new connection within the limit takes the pod along, here as the restart that it is."""
    engine = _connect(engines, inbound, "kv@a@m")
    await bridge.until(lambda: all(engine.subscribed for engine in engines))
    await _say(engine, 2)
    await bridge.until(lambda: len(bridge.log.messages("a")) == 2)
    engines.remove(engine)
    engine.close()
    await bridge.until(lambda: next(iter(bridge.endpoints.values())).leaving)
    assert inbound.left(1000.0, 30.0) == []
    again = _connect(engines, inbound, "kv@a@m")
    await bridge.until(lambda: all(engine.subscribed for engine in engines))
    await _say(again, 2)
    await bridge.until(lambda: len(bridge.log.messages("a")) == 4)
    assert inbound.left(5000.0, 30.0) == []
    assert [sequence for _, sequence in bridge.log.messages("a")] == [0, 1, 0, 1]
    assert [control.type for control in bridge.log.controls("a")] == ["start", "restart"]
