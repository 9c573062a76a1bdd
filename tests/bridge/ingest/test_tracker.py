"""Sequence tracking under loss, repetition, reordering and restarts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvatlas.bridge.ingest.memory import HeldBytes, HeldMessages
from kvatlas.bridge.ingest.messages import EngineMessage, Forward, Output, Request, StreamPosition
from kvatlas.bridge.ingest.tracker import Tracker
from kvatlas.bridge.model.records import Control


def _message(sequence: int, source: str = "live", life: int = 0) -> EngineMessage:
    return EngineMessage(sequence, b"", b"%d/%d" % (life, sequence), 0, source)


_NEW = StreamPosition()


def _tracker(position: StreamPosition = _NEW, **options: Any) -> Tracker:
    return Tracker(position, next_incarnation=lambda previous: max(previous + 1, 100), **options)


def _forwarded(outputs: list[Output]) -> list[tuple[int, int]]:
    return [(o.incarnation, o.message.sequence) for o in outputs if isinstance(o, Forward)]


def _nothing(tracker: Tracker) -> list[Output]:
    """Ask an engine that has nothing to say."""
    tracker.ask()
    return tracker.replay_ended(complete=True, newest=None)


def test_a_hole_is_asked_for_and_filled_in_order() -> None:
    """Live messages wait behind a hole until the replay fills it."""
    tracker = _tracker()
    outputs = tracker.begin() + _nothing(tracker)
    for sequence in (0, 1, 4, 5):
        outputs += tracker.live(_message(sequence))
    assert tracker.request == Request(1, 4)
    for sequence in (2, 3):
        outputs += tracker.replayed(_message(sequence, "replay"))
    assert _forwarded(outputs) == [(100, n) for n in range(6)]
    assert tracker.request is None


def test_going_back_on_one_connection_is_a_restart() -> None:
    """A live sequence at or below the newest live one can only come from a new process."""
    tracker = _tracker()
    outputs = tracker.begin()
    for sequence in (0, 1, 2):
        outputs += tracker.live(_message(sequence))
    outputs += tracker.live(_message(0, life=1))
    assert _forwarded(outputs) == [(100, 0), (100, 1), (100, 2), (101, 0)]
    assert [o.type for o in outputs if isinstance(o, Control)] == ["start", "restart"]


def test_a_replay_that_ends_below_our_position_is_a_restart() -> None:
    """An engine always still holds its newest message, so an empty answer means another process."""
    tracker = _tracker(StreamPosition(100, 9))
    assert tracker.ask() == Request(9, None)
    (turn,) = tracker.replay_ended(complete=True, newest=None)
    assert isinstance(turn, Control)
    assert (turn.type, tracker.expected) == ("restart", 0)


def test_an_engine_that_does_not_answer_is_no_restart() -> None:
    """Silence says nothing: the position stays, and live messages wait for a bounded number of tries."""
    tracker = _tracker(StreamPosition(100, 9), tries=2)
    outputs = tracker.live(_message(10))
    assert outputs == []
    outputs += tracker.replay_ended(complete=False, newest=None)
    outputs += tracker.replay_ended(complete=False, newest=None)
    assert _forwarded(outputs)[-1:] == [(100, 10)]
    assert not tracker.hole


def test_two_engines_in_one_burst_are_told_apart() -> None:
    """A connection that is new is told before messages of the old one that came in the same burst: all are verified."""
    tracker = _tracker()
    tracker.begin()
    tracker.replay_ended(complete=True, newest=None)
    tracker.reconnected()
    outputs = [output for sequence in (0, 1, 2) for output in tracker.live(_message(sequence))]
    outputs += tracker.live(_message(3, life=1))  # the other engine's, which goes on where the old one ended
    assert tracker.request == Request(0, None)
    for sequence in range(4):
        outputs += tracker.replayed(_message(sequence, "replay", life=1))
    tracker.replay_ended(complete=True, newest=3)
    assert _forwarded(outputs) == [(100, 0), (100, 1), (100, 2), (100, 3)] + [(101, n) for n in range(4)]
    assert [o.type for o in outputs if isinstance(o, Control)] == ["restart"]


def test_what_a_dead_engine_left_behind_a_hole_is_not_taken_for_the_next_one_s() -> None:
    """A live message that no replay of the engine ever reaches is of the one before it: a restart, and no gap."""
    tracker = _tracker(tries=2)
    outputs = tracker.begin()
    tracker.ask(first=True)
    outputs += tracker.live(_message(9, life=0))  # waits in our socket since before the restart
    for number in range(8):
        outputs += tracker.replayed(_message(number, "replay", life=1))
    outputs += tracker.replay_ended(complete=True, newest=7)
    assert tracker.ask() is not None
    outputs += tracker.replayed(_message(7, "replay", life=1)) + tracker.replay_ended(complete=True, newest=7)
    assert tracker.counts.restarts == 1
    assert tracker.ask() == Request(0, None)
    for number in range(8):
        outputs += tracker.replayed(_message(number, "replay", life=1))
    outputs += tracker.replay_ended(complete=True, newest=7)
    assert not [output for output in outputs if isinstance(output, Control) and output.type == "gap"]
    assert 9 not in [sequence for _, sequence in _forwarded(outputs)]
    assert tracker.expected == 8


def test_what_a_dead_engine_left_right_behind_is_found_by_one_more_replay() -> None:
    """A first replay asked before the pod was known says nothing of what was heard after it: another one does."""
    tracker = _tracker()
    outputs = tracker.begin()
    tracker.ask(first=True)
    for number in range(8):
        outputs += tracker.replayed(_message(number, "replay", life=1))
    outputs += tracker.live(_message(8, life=0))
    outputs += tracker.replay_ended(complete=True, newest=7)
    assert tracker.ask() == Request(8, None)
    outputs += tracker.replay_ended(complete=True, newest=None)
    assert tracker.counts.restarts == 1
    assert tracker.ask() == Request(0, None)


def test_a_heartbeat_holds_no_live_message() -> None:
    """While the tail of a silent stream is asked for, live messages of the same connection go on at once."""
    tracker = _tracker()
    outputs = tracker.begin() + _nothing(tracker) + tracker.live(_message(0))
    tracker.probe()
    assert tracker.ask() == Request(0, None)
    assert tracker.accept(1, b"0/1")
    outputs += tracker.replayed(_message(0, "replay")) + tracker.replay_ended(complete=True, newest=0)
    assert [o.type for o in outputs if isinstance(o, Control)] == ["start"]
    assert tracker.request is None
    tracker.probe()
    assert [o.type for o in _nothing(tracker) if isinstance(o, Control)] == ["restart"]


def test_a_new_engine_that_answers_before_the_connection_tells_is_a_restart() -> None:
    """Its replay socket may be there first; what it answers is not appended to what the old one said."""
    tracker = _tracker()
    outputs = tracker.begin() + _nothing(tracker) + tracker.live(_message(0))
    outputs += tracker.live(_message(2))  # a hole, which the old engine never fills
    assert tracker.ask() == Request(0, 2)
    outputs += tracker.replayed(_message(0, "replay", life=1))
    assert _forwarded(outputs) == [(100, 0), (101, 0)]
    assert [o.type for o in outputs if isinstance(o, Control)] == ["start", "restart"]


def test_a_replay_asked_before_a_reconnect_proves_nothing_of_the_engine_behind_it() -> None:
    """What the old engine answered says nothing of the new connection: live messages wait until it is asked again."""
    tracker = _tracker()
    outputs = tracker.begin() + _nothing(tracker) + tracker.live(_message(0)) + tracker.live(_message(2))
    tracker.ask()
    tracker.reconnected()
    outputs += [o for n in (0, 1) for o in tracker.replayed(_message(n, "replay"))]
    outputs += tracker.replay_ended(complete=True, newest=2)
    assert _forwarded(outputs) == [(100, 0), (100, 1), (100, 2)]
    assert not tracker.accept(3, b"1/3")
    assert tracker.live(_message(3, life=1)) == []
    assert tracker.ask() == Request(0, None)
    (turn,) = tracker.replayed(_message(2, "replay", life=1))[:1]
    assert isinstance(turn, Control)
    assert turn.type == "restart"


def test_messages_that_came_after_a_replay_was_asked_for_need_not_be_in_it() -> None:
    """A reconnect right behind them does not make the shorter answer another engine's."""
    tracker = _tracker()
    outputs = tracker.begin() + _nothing(tracker) + tracker.live(_message(0))
    tracker.probe()
    tracker.ask()
    outputs += tracker.live(_message(1))
    tracker.reconnected()
    outputs += tracker.replayed(_message(0, "replay")) + tracker.replay_ended(complete=True, newest=0)
    assert [o.type for o in outputs if isinstance(o, Control)] == ["start"]


def test_a_late_message_after_a_takeover_is_no_restart() -> None:
    """What is heard late and is on the log already says nothing; the replay that is under way tells."""
    position = StreamPosition(100, 9, digests=((9, xxh3_64_intdigest(b"0/9")),))
    tracker = _tracker(position)
    outputs = tracker.live(_message(7)) + tracker.live(_message(8)) + tracker.live(_message(10))
    for sequence in (9, 10):
        outputs += tracker.replayed(_message(sequence, "replay"))
    outputs += tracker.replay_ended(complete=True, newest=10)
    assert _forwarded(outputs) == [(100, 10)]
    assert tracker.request is None
    restarted = _tracker(position)
    restarted.ask()
    outputs = restarted.live(_message(0, life=1)) + restarted.replay_ended(complete=True, newest=0)
    outputs += restarted.replayed(_message(0, "replay", life=1))
    assert _forwarded(outputs) == [(101, 0)]


def test_behind_a_gap_the_clock_of_before_says_nothing() -> None:
    """A message that was given up and is there after all has another clock than the last one before the gap."""
    tracker = Tracker(
        StreamPosition(100, 9, 9.0),
        next_incarnation=lambda previous: previous + 1,
        read_ts=lambda payload: float(payload.split(b"/")[1]),
        tries=1,
    )
    tracker.shed(12)
    outputs = tracker.replay_ended(complete=False, newest=None)
    tracker.reconnected()
    outputs += tracker.replayed(_message(12, "replay")) + tracker.replay_ended(complete=True, newest=12)
    assert [o.type for o in outputs if isinstance(o, Control)] == ["gap"]


def test_a_sequence_that_is_nonsense_leaves_no_trace() -> None:
    """Far beyond the last one, heard or left to replay, it neither makes a hole nor looks like a restart later."""
    tracker = _tracker()
    outputs = tracker.begin() + _nothing(tracker) + tracker.live(_message(0))
    tracker.shed(1 << 40)
    outputs += tracker.live(_message(1 << 40)) + tracker.live(_message(1))
    assert _forwarded(outputs) == [(100, 0), (100, 1)]
    assert not tracker.hole


def test_what_is_held_is_bounded_over_all_pods() -> None:
    """Pods that wait for replays at one time share a bound: what goes beyond it is left to replay."""
    holding = HeldBytes(6)
    one, two = (
        Tracker(StreamPosition(1, 0), next_incarnation=lambda n: n + 1, held=HeldMessages(holding)) for _ in range(2)
    )
    for tracker in (one, two):
        tracker.live(_message(5))
        tracker.live(_message(6))
    assert (len(one.held), len(two.held), holding.held_bytes, two.counts.shed) == (2, 0, 6, 2)
    one.held.clear()
    two.live(_message(7))
    assert (len(one.held), len(two.held), holding.held_bytes) == (0, 1, 3)


@pytest.mark.parametrize("replay", [True, False])
def test_what_cannot_be_repaired_is_lost_once(replay: bool) -> None:
    """A hole without an answer becomes one gap under a raised incarnation, and the stream goes on."""
    tracker = _tracker(tries=1, can_replay=replay)
    outputs = tracker.begin() + tracker.live(_message(0)) + tracker.live(_message(3))
    if replay:
        tracker.ask()
        outputs += tracker.replay_ended(complete=True, newest=3)
    gap = outputs[-2]
    assert isinstance(gap, Control)
    assert (gap.type, gap.first_lost, gap.last_lost) == ("gap", 1, 2)
    assert _forwarded(outputs)[-1] == (101, 3)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), buffer=st.integers(1, 40), hold=st.integers(1, 10))
def test_every_message_is_forwarded_once_or_recorded_as_lost(seed: int, buffer: int, hold: int) -> None:
    """Under loss, overlap, restarts and small buffers each (incarnation, sequence) comes once, in order, or is lost."""
    chance = random.Random(seed)
    tracker = _tracker(tries=2, held=HeldMessages(most=hold))
    outputs = tracker.begin()
    kept: list[EngineMessage] = []
    published, life = 0, 0

    def ask(lossy: float) -> None:
        request = tracker.ask()
        if request is None:
            return
        newest = None
        restarts = tracker.counts.restarts
        for message in kept:
            if message.sequence < request.start or chance.random() < lossy:
                continue
            if request.until is not None and message.sequence >= request.until:
                break
            newest = message.sequence
            outputs.extend(tracker.replayed(message._replace(source="replay")))
            if tracker.counts.restarts != restarts:
                return
        # The end of a lossy answer does not come: its missing tail would look like an engine that restarted.
        outputs.extend(tracker.replay_ended(complete=not lossy, newest=newest))

    for _ in range(chance.randrange(150)):
        step = chance.random()
        if step < 0.7:
            message = _message(published, life=life)
            published += 1
            kept = [*kept, message][-buffer:]
            if chance.random() < 0.8:
                accepted = tracker.accept(message.sequence, message.payload or b"")
                outputs.extend([Forward(message, tracker.incarnation)] if accepted else tracker.live(message))
        elif step < 0.9:
            ask(0.3 if chance.random() < 0.3 else 0.0)
        elif step < 0.93:
            published, life, kept = 0, life + 1, []
            tracker.reconnected()
        else:
            tracker.reconnected()
    tracker.probe()
    for _ in range(300):
        if tracker.request is None:
            break
        ask(0.0)
    assert tracker.request is None
    assert not tracker.held
    # An engine that has said nothing since its restart looks like one whose buffer is empty; its first message tells.
    assert published == 0 or tracker.expected == published
    seen: set[tuple[int, int]] = set()
    expected, incarnation, lives = 0, 0, set[bytes]()
    for output in outputs:
        if isinstance(output, Control):
            assert output.incarnation > incarnation
            incarnation = output.incarnation
            if output.type == "gap":
                assert output.first_lost == expected
                expected = output.last_lost + 1
            else:
                expected = 0
                lives = set()
        else:
            assert output.incarnation == incarnation
            assert output.message.sequence == expected
            assert (incarnation, expected) not in seen
            seen.add((incarnation, expected))
            lives.add((output.message.payload or b"").split(b"/")[0])
            expected += 1
