"""What peers begin and do not finish ends in time, the oldest first where there is too much of it."""

from __future__ import annotations

import asyncio

from kvatlas.bridge.runtime.unfinished import Unfinished


async def test_what_stays_unfinished_ends_in_time_and_what_is_done_does_not() -> None:
    ended: list[int] = []
    unfinished = Unfinished(10, 0.02)
    for number in range(3):
        unfinished.begin(number, lambda number=number: ended.append(number))  # type: ignore[misc]
    unfinished.done(1)
    async with asyncio.timeout(90):
        while len(unfinished):
            await asyncio.sleep(0.005)
        assert ended == [0, 2]
        unfinished.begin(7, lambda: ended.append(7))  # it looks again after there was nothing
        while len(unfinished):
            await asyncio.sleep(0.005)
    assert ended == [0, 2, 7]


async def test_the_oldest_give_way_where_there_are_too_many() -> None:
    ended: list[int] = []
    unfinished = Unfinished(3, 600.0)
    for number in range(10):
        unfinished.begin(number, lambda number=number: ended.append(number))  # type: ignore[misc]
    assert (len(unfinished), ended) == (3, list(range(7)))
    unfinished.end_all()
    assert (len(unfinished), ended) == (0, list(range(10)))
