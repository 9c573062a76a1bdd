"""How much of an engine's life is on the log: from its start, from its oldest replayable message, or not known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.recovered import Recovered, apply_control, fold
from kvatlas.bridge.model import records
from kvatlas.bridge.model.directory import merge_pod
from kvatlas.bridge.model.records import Control, PodRecord

_CLEAR = [{"type": "AllBlocksCleared"}]


@pytest.fixture
def engine() -> Iterator[EnginePublisher]:
    """An engine whose replay buffer holds four messages."""
    made = EnginePublisher(
        topic="kv@pod@m",
        endpoint="tcp://127.0.0.1:*",
        replay_endpoint="tcp://127.0.0.1:*",
        bind=True,
        buffer_steps=4,
    )
    made.start()
    yield made
    made.close()


def _open(bridge: Any, engine: EnginePublisher, *, replay: bool = True) -> EngineEndpoint:
    text = f"{engine.endpoint},{engine.replay_endpoint}" if replay else engine.endpoint
    return bridge.open(parse_engine(text)[0])


def _say(engine: EnginePublisher, count: int) -> None:
    for _ in range(count):
        engine.publish(_CLEAR, timestamp=1.0)


def _covered(endpoint: EngineEndpoint) -> tuple[str, int]:
    session = endpoint.session
    assert session is not None
    session.write_record()
    return session.record.coverage, session.record.heard_from


async def test_an_idle_engine_heard_from_its_start_is_whole(bridge: Any, engine: EnginePublisher) -> None:
    """All that it said before is still in its replay buffer, and it need say nothing more to be asked."""
    _say(engine, 3)
    stream = _open(bridge, engine)
    await bridge.until(lambda: len(bridge.log.messages("pod")) == 3)
    assert _covered(stream) == ("whole", 0)
    assert bridge.log.pod("pod").coverage == "whole"


async def test_a_late_joiner_knows_what_the_replay_buffer_holds(bridge: Any, engine: EnginePublisher) -> None:
    """The first sequence that is known is said, also of an engine that is idle since."""
    _say(engine, 10)
    stream = _open(bridge, engine)
    await bridge.until(lambda: len(bridge.log.messages("pod")) == 4)
    assert _covered(stream) == ("partial", 6)


async def test_without_a_replay_socket_it_is_known_from_the_first_live_message(
    bridge: Any, engine: EnginePublisher
) -> None:
    """Nothing can be asked for what came before."""
    _say(engine, 5)
    stream = _open(bridge, engine, replay=False)

    def heard() -> bool:
        if not bridge.log.messages("pod"):
            _say(engine, 1)
        return bool(bridge.log.messages("pod"))

    await bridge.until(heard)
    first = bridge.log.messages("pod")[0][1]
    assert first >= 5
    assert _covered(stream) == ("partial", first)


def _control(kind: str, incarnation: int, first: int = -1, last: int = -1) -> Control:
    return Control(type=kind, incarnation=incarnation, first_lost=first, last_lost=last)


def test_a_pod_that_has_said_nothing_is_not_known() -> None:
    """Also one whose record was written before anyone noted where it was heard from."""
    new = PodRecord(pod="p", writer="bridge")
    assert new.coverage == ""
    assert apply_control(new, _control("start", 1)).coverage == ""
    assert PodRecord(pod="p", writer="bridge", last_sequence=7).coverage == ""
    assert apply_control(new, _control("gap", 1)).heard_from == -1


def test_readers_take_it_from_the_bridge() -> None:
    """The stream workers see only what is on the log."""
    bridge = PodRecord(pod="p", writer="bridge", last_sequence=9, heard_from=4)
    streams = PodRecord(pod="p", writer="streams", last_sequence=9)
    assert merge_pod(bridge, streams).coverage == "partial"
    assert merge_pod(None, streams).coverage == ""


_steps = st.lists(st.one_of(st.just("message"), st.just("restart"), st.integers(1, 5)), max_size=30)


@given(_steps)
def test_whatever_happens_nothing_is_missing_from_there_on(steps: list[str | int]) -> None:
    """Messages, gaps and restarts in any order, read back from the log: what is said is what a plain list says."""
    pods: dict[str, Recovered] = {}
    incarnation, following, held = 1, 0, list[int]()
    offset = 0

    def take(value: bytes, **headers: bytes) -> None:
        nonlocal offset
        fold(pods, b"p", value, headers, (0, offset))
        offset += 1

    def turn(control: Control) -> None:
        take(records.encode(control), content_type=b"control", incarnation=b"%d" % control.incarnation)

    turn(_control("start", incarnation))
    for step in steps:
        if step == "message":
            take(b"", content_type=b"engine", incarnation=b"%d" % incarnation, sequence=b"%d" % following)
            held.append(following)
            following += 1
            continue
        incarnation += 1
        if isinstance(step, int):
            turn(_control("gap", incarnation, following, following + step - 1))
            following += step
        else:
            turn(_control("restart", incarnation))
            following, held = 0, []
    record = pods["p"].record
    if not following:
        assert record.coverage == ""
    else:
        first = following
        while first - 1 in held:
            first -= 1
        assert (record.coverage, record.heard_from) == ("partial" if first else "whole", first)
