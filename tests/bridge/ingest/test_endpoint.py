"""Whose a pod is: endpoints of other bridges, pods listed twice, pods that move, change their name or leave."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.bridge.engines.spec import parse_engine
from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.model import epochs, records
from kvatlas.bridge.model.adapters.fields import encode_batch

_CLEAR = [{"type": "AllBlocksCleared"}]


class Engine(EnginePublisher):
    """An engine that counts how often its replay socket is asked."""

    def __init__(self, pod: str = "pod-x", **options: Any) -> None:
        options = {"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*", "bind": True, **options}
        super().__init__(topic=f"kv@{pod}@m", **options)
        self.asked: list[int] = []
        self.start()

    def _answer(self, router: Any, identity: bytes, start: int) -> None:
        self.asked.append(start)
        super()._answer(router, identity, start)

    def say(self, first: int, end: int) -> None:
        """Publish messages; their timestamps tell them apart."""
        for number in range(first, end):
            self.publish(_CLEAR, timestamp=float(number))


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Engines that are closed at the end."""
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def _open(bridge: Any, engine: EnginePublisher, host: str = "127.0.0.1") -> EngineEndpoint:
    text = f"{engine.endpoint},{engine.replay_endpoint}".replace("127.0.0.1", host)
    return bridge.open(parse_engine(text)[0])


async def test_a_pod_of_another_bridge_is_not_asked_again(bridge: Any, engines: list[Engine]) -> None:
    """It is asked once to learn its name, then neither heartbeats nor its own messages lead to a replay."""
    engine = Engine()
    engines.append(engine)
    engine.say(0, 5)
    bridge.shared.owns = lambda _: False
    endpoint = _open(bridge, engine)
    await bridge.until(lambda: endpoint.waiting)
    for number in range(5, 15):
        endpoint.beat()
        engine.say(number, number + 1)
        await asyncio.sleep(0.03)
    assert engine.asked == [0]
    assert bridge.log.records == []
    assert endpoint.pod == "pod-x"


async def test_a_pod_taken_over_goes_on_where_the_log_ends(bridge: Any, engines: list[Engine]) -> None:
    """Once the pod is ours, only what the log lacks is asked for, under the incarnation of before."""
    engine = Engine()
    engines.append(engine)
    engine.say(0, 8)
    bridge.shared.owns = lambda _: False
    endpoint = _open(bridge, engine)
    await bridge.until(lambda: endpoint.waiting)
    epoch = epochs.epoch_of(77)
    record = records.PodRecord(pod="pod-x", writer="bridge", epoch=epoch, last_sequence=4, last_event_ns=4 * 10**9)
    bridge.shared.recovered["pod-x"] = Recovered(record)
    bridge.shared.owns = lambda _: True
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 3)
    assert bridge.log.messages("pod-x") == [(77, 5), (77, 6), (77, 7)]
    assert engine.asked == [0, 4]
    assert bridge.log.controls("pod-x") == []


async def test_one_engine_under_two_addresses_is_on_the_log_once(bridge: Any, engines: list[Engine]) -> None:
    """The second endpoint of a pod is left out, counted once, and goes on with the pod once the first leaves."""
    engine = Engine()
    engines.append(engine)
    first = _open(bridge, engine)
    engine.say(0, 3)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 3)
    second = _open(bridge, engine, "localhost")
    await bridge.until(lambda: second.waiting)
    engine.say(3, 6)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 6)
    assert bridge.shared.conflicts == 1
    first.leaving = True
    await bridge.until(lambda: not second.waiting)
    engine.say(6, 9)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 9)
    first.end()
    found = bridge.log.messages("pod-x")
    assert [sequence for _, sequence in found] == list(range(9))
    assert len({incarnation for incarnation, _ in found}) == 1
    assert [control.type for control in bridge.log.controls("pod-x")] == ["start"]
    assert second.session is not None
    second.session.write_record()
    assert bridge.log.pod("pod-x").endpoint == second.spec.live


async def test_a_pod_that_moved_restarts_and_is_not_gone(bridge: Any, engines: list[Engine]) -> None:
    """A new engine of the same name elsewhere is a restart; the old address, which ends later, changes nothing."""
    old, new = Engine(), Engine()
    engines += [old, new]
    first = _open(bridge, old)
    old.say(0, 4)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 4)
    first.leaving = True
    new.say(100, 106)
    _open(bridge, new)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 10)
    first.end()
    found = bridge.log.messages("pod-x")
    assert [sequence for _, sequence in found] == [*range(4), *range(6)]
    assert found[4][0] > found[3][0]
    assert [control.type for control in bridge.log.controls("pod-x")] == ["start", "restart"]
    assert bridge.log.pod("pod-x").state == records.LIVE


async def test_a_pod_that_comes_back_is_above_its_end(bridge: Any, engines: list[Engine]) -> None:
    """Gone is recorded with a raised epoch, and what comes later goes on above it, from the first message."""
    engine = Engine()
    engines.append(engine)
    endpoint = _open(bridge, engine)
    engine.say(0, 3)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 3)
    await endpoint.close()
    endpoint.end()
    endpoint.end()
    gone = bridge.log.pod("pod-x")
    assert (gone.state, gone.valid_from, gone.last_sequence) == (records.GONE, gone.epoch, -1)
    again = _open(bridge, engine)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 6)
    assert again.session is not None
    again.session.write_record()
    found = bridge.log.messages("pod-x")
    assert [sequence for _, sequence in found[3:]] == [0, 1, 2]
    assert {incarnation for incarnation, _ in found[3:]} == {epochs.incarnation_of(gone.epoch)}
    assert gone.epoch > epochs.epoch_of(found[0][0])
    assert [control.type for control in bridge.log.controls("pod-x")] == ["start", "gone"]
    assert bridge.log.pod("pod-x").state == records.LIVE


async def test_late_acknowledgements_say_nothing_of_the_next_pod(bridge: Any, engines: list[Engine]) -> None:
    """An endpoint whose pod changes its name: what Kafka acknowledges later counts for the pod that it was."""
    bridge.log.holding = True
    engine = Engine("pod-a")
    engines.append(engine)
    endpoint = _open(bridge, engine)
    engine.say(0, 3)
    await bridge.until(lambda: len(bridge.log.messages("pod-a")) == 3)
    engine._topic = b"kv@pod-b@m"
    engine.say(3, 6)
    await bridge.until(lambda: len(bridge.log.messages("pod-b")) >= 1)
    bridge.log.acknowledge()
    assert endpoint.session is not None
    endpoint.session.write_record()
    assert bridge.log.pod("pod-a").state == records.GONE
    assert bridge.log.pod("pod-b").state == records.LIVE
    assert bridge.log.pod("pod-b").last_sequence == bridge.log.messages("pod-b")[-1][1]
    assert bridge.log.controls("pod-b")[0].type == "start"


async def test_an_engine_whose_clock_says_nonsense_harms_nothing(bridge: Any, engines: list[Engine]) -> None:
    """Its messages are on the log like any other, and the record has no time of the last event."""
    engine = Engine()
    engines.append(engine)
    endpoint = _open(bridge, engine)
    for number in (math.nan, math.inf, -1e300):
        engine.publish(_CLEAR, timestamp=number)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 3)
    assert endpoint.session is not None
    endpoint.session.write_record()
    record = bridge.log.pod("pod-x")
    assert (record.last_sequence, record.last_event_ns) == (2, 0)


async def test_a_topic_counts_for_the_size_of_a_message(bridge: Any, engines: list[Engine]) -> None:
    """A topic goes into a header, so a huge one is as little forwarded as a huge payload."""
    bridge.change(message_bytes=4096)
    engine = Engine("p" * 5000)
    engines.append(engine)
    _open(bridge, engine)
    engine.say(0, 1)
    await bridge.until(lambda: bridge.shared.oversized > 0)
    assert all(len(value) < 4096 for _, item in bridge.log.records for _, value in item.headers)


async def test_replies_without_topics_wait_for_the_name(bridge: Any, engines: list[Engine]) -> None:
    """Old engines' replies do not say whose they are: nothing is put on the log under another name meanwhile."""
    engine = Engine(replay_layout="bare")
    engines.append(engine)
    engine.say(0, 5)
    endpoint = _open(bridge, engine)
    await bridge.until(lambda: bool(engine.asked))
    for _ in range(5):
        endpoint.beat()
        await asyncio.sleep(0.05)
    assert bridge.log.records == []
    engine.say(5, 6)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 6)
    assert [sequence for _, sequence in bridge.log.messages("pod-x")] == list(range(6))
    assert {item.key for _, item in bridge.log.records} == {b"pod-x", b"bridge|pod-x"}


async def test_engines_that_do_not_answer_hold_up_no_repair(
    bridge: Any, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one replay at a time, a hole is filled while another engine's socket keeps silent."""
    monkeypatch.setattr("kvatlas.bridge.engines.wires.PARALLEL_REPLAYS", 1)
    bridge.change(replay_timeout_seconds=600.0)
    engine, silent = Engine(), Engine("silent")
    engines += [engine, silent]
    _open(bridge, engine)
    engine.say(0, 1)
    await bridge.until(lambda: bool(engine.asked) and len(bridge.log.messages("pod-x")) == 1)
    bridge.open(parse_engine(f"{silent.endpoint},tcp://127.0.0.1:1")[0])
    await bridge.until(bridge.streams.wires.silent_replays.locked)
    engine.withhold(b"\x93\x01\x90\xc0")
    engine.say(2, 3)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 3)


async def test_the_first_message_of_a_new_connection_is_not_the_old_ones_next(
    bridge: Any, engines: list[Engine]
) -> None:
    """An engine that restarted and says exactly the next sequence is told from the one before it."""
    engine = Engine()
    engines.append(engine)
    endpoint = _open(bridge, engine)
    engine.say(0, 3)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 3)
    await bridge.until(lambda: endpoint.session is not None and endpoint.session.tracker.request is None)
    live, replay = engine.endpoint, engine.replay_endpoint
    engine.close()
    engines[0] = again = Engine(endpoint=live, replay_endpoint=replay)
    again.say(100, 103)  # nobody is connected yet
    assert endpoint._socket is not None
    deadline = time.monotonic() + 90
    while not endpoint._socket._socket.get(zmq.EVENTS) & zmq.POLLIN:  # the event loop stands still meanwhile
        assert time.monotonic() < deadline
        if again.next_sequence == 3 and again.subscribed:
            again.say(103, 104)
        time.sleep(0.01)
    endpoint._socket._drain()
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) >= 7)
    found = bridge.log.messages("pod-x")
    assert [sequence for _, sequence in found] == [0, 1, 2, 0, 1, 2, 3]
    assert found[3][0] > found[2][0]


async def test_an_address_in_brackets_is_heard(bridge: Any, engines: list[Engine]) -> None:
    """Pods of an IPv6 network are heard and replayed."""
    # The mapped address needs sockets of IPv6 like any other, and is there also where no interface has one.
    engine = Engine(endpoint="tcp://[::ffff:127.0.0.1]:0", replay_endpoint="tcp://[::ffff:127.0.0.1]:0")
    engines.append(engine)
    engine.say(0, 2)
    _open(bridge, engine)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 2)

    def live() -> bool:
        engine.say(2, 3)
        return b"live" in {dict(item.headers).get("source") for _, item in bridge.log.records}

    await bridge.until(live)


async def test_one_message_under_a_foreign_name_ends_no_pod(bridge: Any, engines: list[Engine]) -> None:
    """It is dead-lettered, its sequence is a hole like any other, and the pod goes on."""
    engine = Engine("pod-a")
    engines.append(engine)
    endpoint = _open(bridge, engine)
    engine.say(0, 3)
    await bridge.until(lambda: len(bridge.log.messages("pod-a")) == 3)
    own, engine._topic = engine._topic, b"kv@pod-b@m"
    engine.say(3, 4)
    engine._topic = own
    engine.say(4, 6)
    await bridge.until(lambda: len(bridge.log.messages("pod-a")) == 6)
    assert [sequence for _, sequence in bridge.log.messages("pod-a")] == list(range(6))
    assert [control.type for control in bridge.log.controls("pod-a")] == ["start"]
    assert bridge.log.messages("pod-b") == []
    assert bridge.shared.dead == {"foreign topic": 1}
    assert (endpoint.pod, bridge.shared.claims) == ("pod-a", {"pod-a": endpoint})


async def test_another_pods_replay_is_not_taken_for_the_pods_own(bridge: Any, engines: list[Engine]) -> None:
    """A replay address that leads to another pod's engine repairs nothing: what is missing is lost, and no restart."""
    engine, other = Engine("pod-a"), Engine("pod-b")
    engines += [engine, other]
    other.say(0, 9)
    endpoint = _open(bridge, engine)
    engine.say(0, 3)
    await bridge.until(lambda: len(bridge.log.messages("pod-a")) == 3)
    endpoint.spec = msgspec.structs.replace(endpoint.spec, replay=other.replay_endpoint)
    engine.skip()
    engine.say(4, 6)
    await bridge.until(lambda: len(bridge.log.messages("pod-a")) == 5)
    assert [sequence for _, sequence in bridge.log.messages("pod-a")] == [0, 1, 2, 4, 5]
    assert [control.type for control in bridge.log.controls("pod-a")] == ["start", "gap"]
    assert bridge.log.messages("pod-b") == []


async def test_an_address_that_another_pod_took_is_the_other_pods(bridge: Any, engines: list[Engine]) -> None:
    """A new engine under another name, seen in its replays alone: the old pod is gone, the other one begins."""
    engine = Engine("pod-a")
    engines.append(engine)
    endpoint = _open(bridge, engine)
    engine.say(0, 5)
    await bridge.until(lambda: len(bridge.log.messages("pod-a")) == 5)
    engine.close()
    other = Engine("pod-b", endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
    engines.append(other)
    for number in range(7):
        other.withhold(encode_batch(float(number), _CLEAR, 0))
    await bridge.until(lambda: len(bridge.log.messages("pod-b")) == 7)
    assert [control.type for control in bridge.log.controls("pod-a")] == ["start", "gone"]
    assert len(bridge.log.messages("pod-a")) == 5
    assert bridge.shared.claims == {"pod-b": endpoint}


async def test_a_replay_of_a_former_engine_ends_with_its_restart(bridge: Any, engines: list[Engine]) -> None:
    """What is still on its way from the old process is not put into the endpoint of the new one."""
    engine = Engine()
    engines.append(engine)
    endpoint = _open(bridge, engine)
    engine.say(0, 5)
    await bridge.until(lambda: len(bridge.log.messages("pod-x")) == 5)
    assert endpoint.session is not None
    tracker = endpoint.session.tracker
    endpoint._asked, take = (endpoint.session, tracker.counts.restarts), endpoint.reply
    tracker.ask()
    payload = encode_batch(99.0, _CLEAR, 0)
    assert take(b"kv@pod-x@m", 5, payload)
    endpoint.received([b"kv@pod-x@m", bytes(8), payload])
    assert not take(b"kv@pod-x@m", 6, payload)
    assert not tracker.held
