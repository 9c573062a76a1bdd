"""A pod's session without sockets: what it puts into a sink, and what is left of it once it has ended."""

from __future__ import annotations

from typing import Any

from kvatlas.bridge.engines.identity import Identity
from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.ingest.recovered import Handover
from kvatlas.bridge.ingest.session import StreamSession
from kvatlas.bridge.model import records
from kvatlas.bridge.model.adapters.fields import encode_batch

_SPEC = EngineSpec(live="tcp://here:1", replay="tcp://here:2")
_TOPIC = b"kv@pod@m"


class _Place:
    """An endpoint that has a session."""

    spec = _SPEC
    leaving = False

    def __init__(self, session: StreamSession | None = None) -> None:
        self.session = session

    def hand_over(self) -> Handover | None:
        """Give the pod away."""
        return None if self.session is None else self.session.hand_over()

    def continue_without(self, *what: Any) -> None:
        """Leave out a message."""
        if self.session is not None:
            self.session.continue_without(*what)


def _begin(bridge: Any) -> StreamSession:
    place = _Place()
    place.session = StreamSession(Identity("pod", "m", 0), _SPEC, bridge.shared.take("pod", place), bridge.shared)
    return place.session


def _payload(number: int) -> bytes:
    return encode_batch(float(number), [{"type": "AllBlocksCleared"}], 0)


def _say(session: StreamSession, first: int, end: int) -> None:
    for number in range(first, end):
        session.live(_TOPIC, number, _payload(number), 7)


async def test_a_session_goes_on_where_another_stands(bridge: Any) -> None:
    """What is on its way is not said again, and what is acknowledged after the hand-over writes no record of before."""
    bridge.log.holding = True
    first = _begin(bridge)
    _say(first, 0, 3)
    second = _begin(bridge)
    assert second.tracker.expected == 3
    for number in (2, 3):  # the newest of before shows that it is the same engine
        second.replayed(_TOPIC, number, _payload(number), 8)
    _say(second, 4, 5)
    bridge.log.acknowledge()
    assert [sequence for _, sequence in bridge.log.messages("pod")] == [0, 1, 2, 3, 4]
    assert not [item for topic, item in bridge.log.records if topic == "kv-pods"]  # the start was the first one's
    second.write_record()
    assert (bridge.log.pod("pod").last_sequence, bridge.log.pod("pod").state) == (4, records.LIVE)


async def test_what_the_sink_refuses_is_lost_for_the_session_that_has_the_pod(bridge: Any) -> None:
    """A message of an earlier session, too: what waited behind it comes again under the epoch after the loss."""
    bridge.log.holding = True
    first = _begin(bridge)
    _say(first, 0, 3)
    second = _begin(bridge)
    items = [item for topic, item in bridge.log.records if topic == "kv-events"][1:]
    before = second.tracker.incarnation
    items[0].refused(items[0], "too large", items[1:])
    assert [sequence for incarnation, sequence in bridge.log.messages("pod") if incarnation > before] == [1, 2]
    (gap,) = [control for control in bridge.log.controls("pod") if control.type == "gap"]
    assert (gap.first_lost, gap.last_lost, gap.incarnation) == (0, 0, second.tracker.incarnation)
    assert first.tracker.incarnation == before


async def test_without_room_a_message_is_left_to_replay(bridge: Any) -> None:
    """The tracker knows that it is missing, and the endpoint is told to ask."""
    session = _begin(bridge)
    _say(session, 0, 1)
    bridge.log.full = True
    assert session.live(_TOPIC, 1, _payload(1), 7)
    assert (session.tracker.hole, session.tracker.counts.shed) == (True, 1)
    bridge.log.full = False
    session.replayed(_TOPIC, 1, _payload(1), 8)
    assert [sequence for _, sequence in bridge.log.messages("pod")] == [0, 1]


async def test_the_end_of_a_pod_is_on_both_topics(bridge: Any) -> None:
    """A pod that left is gone under a raised epoch, and goes on from there when it comes back."""
    session = _begin(bridge)
    _say(session, 0, 2)
    session.end()
    gone = bridge.log.pod("pod")
    assert (gone.state, gone.valid_from) == (records.GONE, gone.epoch)
    assert [control.type for control in bridge.log.controls("pod")] == ["start", "gone"]
    assert bridge.shared.recovered["pod"].record.state == records.GONE
