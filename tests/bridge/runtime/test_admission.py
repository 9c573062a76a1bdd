"""Admission: nobody waits longer than makes sense, nobody is refused without a line, and no place is lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import OverloadedError
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.bridge.runtime.line import Arrival, Line, Step

#: Longest wait of any that is let in, in seconds: the limit of a burst.
BURST = 0.1
#: Requests that may begin at a time, and how long one counts as such.
BEGUN = 8
SLOW = 0.01


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.floats(0, 5)),
        st.tuples(st.just("come"), st.floats(0, 5)),
        st.tuples(st.just("pass"), st.floats(0, 0.3)),
        st.tuples(st.just("next"), st.just(0.0)),
        st.tuples(st.just("leave"), st.floats(0, 1)),
    ),
    max_size=60,
)


@given(STEPS)
def test_whoever_gets_a_turn_has_waited_a_part_of_its_time_at_most(steps: Sequence[tuple[str, float]]) -> None:
    """Turns come in order of arrival; whoever waited too long by its own time or by the clock is refused instead."""
    clock = Clock()
    line = Line(10, clock)
    there: list[Arrival] = []
    order: list[Arrival] = []
    for kind, amount in steps:
        if kind in ("arrive", "come") and not line.full():
            there.append(line.join(clock.now + amount, whole=kind == "arrive"))
        elif kind == "pass":
            clock.now += amount
        elif kind == "next" and (arrival := line.next()) is not None:
            waited = clock.now - arrival.arrived
            if arrival.step is not Step.REFUSED:
                assert arrival.step is (Step.INSIDE if arrival.whole else Step.BEGUN)
                order.append(arrival)
                assert waited <= max(min(BURST, 0.25 * (arrival.until - arrival.arrived)), 0.0)
            else:
                assert waited > min(0.02, 0.25 * (arrival.until - arrival.arrived))
                there.remove(arrival)
        elif kind == "leave" and there:
            line.leave(there.pop(int(amount * (len(there) - 1))))
        assert line.inside == sum(one.step is Step.INSIDE for one in there)
        assert line.waiting == sum(one.step is Step.WAITING for one in there)
        assert line.inside + line.waiting <= 10
    assert [one.arrived for one in order] == sorted(one.arrived for one in order)


@given(st.lists(st.floats(0.0001, 10), max_size=20), st.floats(-5, 5))
def test_where_nobody_waits_nobody_is_refused(pauses: Sequence[float], seconds: float) -> None:
    """One request at a time always gets its turn at once, however long each takes and whatever its time."""
    clock = Clock()
    line = Line(1, clock)
    for pause in pauses:
        assert not line.full()
        assert not line.too_long(line.oldest(), seconds)
        arrival = line.enter(clock.now + seconds)
        clock.now += pause
        line.leave(arrival)


@given(
    st.lists(
        st.one_of(
            st.just("come"),
            st.just("next"),
            st.tuples(st.just("whole"), st.integers(0, 100)),
            st.tuples(st.just("pass"), st.floats(0, 0.005)),
        ),
        max_size=80,
    )
)
def test_few_begin_at_a_time_and_slow_ones_hold_nobody_up(steps: Sequence[str | tuple[str, float]]) -> None:
    """As many as may begin or wait to go inside; slow ones do not count after a while; all get in, in order."""
    clock = Clock()
    line = Line(1_000, clock)
    begun: list[Arrival] = []
    ready: list[Arrival] = []
    inside = 0
    for step in steps:
        match step:
            case "come":
                line.join(math.inf, whole=False)
            case "next":
                fresh = [one for one in begun if clock.now - one.turned <= SLOW]
                waiting = line.waiting
                arrival = line.next()
                if arrival is None:
                    assert not ready
                    assert not waiting or len(fresh) == BEGUN
                elif arrival.step is Step.BEGUN:
                    assert len(fresh) + len(ready) < BEGUN
                    begun.append(arrival)
                elif arrival.step is Step.INSIDE:
                    assert arrival is ready.pop(0)
                    inside += 1
            case ("whole", number) if begun:
                ready.append(line.arrived(begun.pop(int(number) % len(begun)), math.inf))
            case ("pass", seconds):
                clock.now += seconds
        assert (line.inside, line.ready) == (inside, len(ready))
    clock.now += SLOW * 1.01
    for one in ready:
        line.leave(one)
    assert not line.blocked()
    assert line.ready == 0


def test_a_standing_line_is_shorter_than_that_of_a_burst() -> None:
    """What a burst may wait is too long once the line has not been empty for a while, and is not once it was."""
    clock = Clock()
    line = Line(100, clock)
    line.oldest()
    first = line.join(math.inf)
    clock.now += 0.05
    assert not line.too_long(line.oldest(), math.inf)
    line.join(math.inf)
    assert (line.next(), first.step) == (first, Step.INSIDE)
    clock.now += 0.06
    assert line.too_long(line.oldest(), math.inf)  # 0.06 s; empty 0.11 s ago
    refused = line.next()
    assert refused is not None
    assert refused.step is Step.REFUSED
    line.join(math.inf)
    clock.now += 0.06
    assert not line.too_long(line.oldest(), math.inf)


class Rig:
    """Requests at an admission, each of which ends when it is told to."""

    def __init__(self, most: int = 100) -> None:
        self.clock = Clock()
        self.admission = Admission(most, "requests are worked on (most)", clock=self.clock)
        self.begun: list[int] = []
        self.go = asyncio.Event()

    async def request(self, number: int, until: float = math.inf) -> str:
        try:
            async with self.admission.turn(until):
                self.begun.append(number)
                await self.go.wait()
        except OverloadedError:
            return "refused"
        return "done"


async def passes(count: int) -> None:
    """Let the event loop go round so often."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_turns_are_given_in_order_a_few_at_a_time_and_all_get_theirs() -> None:
    """A burst is worked off in its order within a few passes of the event loop."""
    rig = Rig()
    tasks = [asyncio.create_task(rig.request(number)) for number in range(20)]
    await passes(1)
    assert 0 < len(rig.begun) < 20
    await passes(50)
    assert rig.begun == list(range(20))
    rig.go.set()
    assert await asyncio.gather(*tasks) == ["done"] * 20
    assert rig.admission.inside == 0


async def test_what_waited_too_long_is_refused_and_the_rest_is_not() -> None:
    """After a stall the line is refused as it stands, what comes then gets its turn."""
    rig = Rig()
    rig.go.set()
    tasks = [asyncio.create_task(rig.request(number)) for number in range(20)]
    await passes(1)
    done = len(rig.begun)
    rig.clock.now += 1
    refusal = rig.admission.refusal()
    assert refusal is not None
    assert refusal.retry_seconds == pytest.approx(1)
    ended = await asyncio.gather(*tasks)
    assert ended == ["done"] * done + ["refused"] * (20 - done)
    assert rig.admission.refusal() is None
    assert await rig.request(99) == "done"


async def test_a_caller_with_little_time_is_refused_where_others_wait() -> None:
    """The oldest has waited for more than a quarter of this caller's time, and for less of the others'."""
    rig = Rig()
    rig.go.set()
    tasks = [asyncio.create_task(rig.request(number)) for number in range(20)]
    await passes(1)
    rig.clock.now += 0.01
    assert rig.admission.refusal(rig.clock.now + 0.03) is not None
    assert rig.admission.refusal(rig.clock.now + 0.05) is None
    assert await asyncio.gather(*tasks) == ["done"] * 20


async def test_past_the_number_requests_are_refused_until_one_ends() -> None:
    """As many as allowed are inside: one more is refused, with the limit's name."""
    rig = Rig(most=2)
    tasks = [asyncio.create_task(rig.request(number)) for number in range(2)]
    await passes(10)
    refusal = rig.admission.refusal()
    assert refusal is not None
    assert "2 requests are worked on (most)" in str(refusal)
    assert await rig.request(9) == "refused"
    rig.go.set()
    assert await asyncio.gather(*tasks) == ["done"] * 2
    assert await rig.request(10) == "done"


async def test_calls_begin_a_few_at_a_time_and_go_inside_past_the_line() -> None:
    """What comes is told once that it begins; its context then lets it in though others wait, and lets others begin."""
    rig = Rig()
    rig.go.set()
    tasks: list[asyncio.Task[str]] = []
    whole = asyncio.Event()

    async def call(number: int) -> str:
        await whole.wait()
        return await rig.request(number)

    refused: list[OverloadedError] = []
    for number in range(20):
        rig.admission.come(lambda number=number: tasks.append(asyncio.create_task(call(number))), refused.append)
    await passes(50)
    assert len(tasks) == BEGUN
    assert rig.admission.inside == 0
    whole.set()
    await passes(100)
    assert await asyncio.gather(*tasks) == ["done"] * 20
    assert rig.begun == list(range(20))
    assert not refused
    assert await rig.request(99) == "done"


async def test_calls_that_waited_too_long_are_told() -> None:
    """Those that come while the line stands are refused at once, those in it when it is looked at; none is left."""
    rig = Rig()
    begun: list[int] = []
    refused: list[OverloadedError] = []
    for number in range(20):
        rig.admission.come(lambda number=number: begun.append(number), refused.append)
    rig.clock.now += 1
    assert not refused
    rig.admission.come(lambda: begun.append(99), refused.append)
    assert len(refused) == 1
    await passes(5)
    assert len(begun) + len(refused) == 21
    assert begun == list(range(len(begun)))
    assert all(error.retry_seconds == pytest.approx(1) for error in refused)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 8))
def test_requests_that_are_given_up_leave_no_place_taken(given_up: Sequence[bool], after: int) -> None:
    """Whether a caller gives up in the line, with its turn or inside: nobody is counted in the end."""

    async def run() -> None:
        rig = Rig()
        tasks = [asyncio.create_task(rig.request(number)) for number in range(len(given_up))]
        await passes(after)
        for task, gone in zip(tasks, given_up, strict=True):
            if gone:
                task.cancel()
        await passes(2)
        rig.go.set()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for end, gone in zip(ended, given_up, strict=True):
            assert isinstance(end, asyncio.CancelledError) if gone else end == "done"
        assert rig.admission.inside == 0
        rig.clock.now += 1
        assert rig.admission.refusal() is None

    asyncio.run(run())
