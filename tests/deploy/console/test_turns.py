"""Work on threads: one at a time, a bounded number waiting, and nothing piles up behind those who go away."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from kvatlas.deploy.console.turns import Turns
from kvatlas.scorer.errors import BusyError


async def test_one_works_a_few_wait_and_more_are_refused() -> None:
    turns = Turns("questions", 3)
    running, most = 0, 0

    def work(_gone: threading.Event) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1
        return 7

    found = await asyncio.gather(*(turns.run(work) for _ in range(10)), return_exceptions=True)
    assert found.count(7) == 4
    assert sum(isinstance(one, BusyError) and "3 questions wait" in str(one) for one in found) == 6
    assert most == 1
    assert await turns.run(work) == 7


async def test_who_goes_away_ends_its_work_before_the_next_begins() -> None:
    turns = Turns("questions")
    begun, ended = threading.Event(), threading.Event()

    def endless(gone: threading.Event) -> None:
        begun.set()
        gone.wait(90)
        time.sleep(0.05)
        ended.set()

    asked = asyncio.ensure_future(turns.run(endless))
    assert await asyncio.to_thread(begun.wait, 90)
    following = asyncio.ensure_future(turns.run(lambda _gone: ended.is_set()))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await following


async def test_an_error_of_the_work_is_the_caller_s_and_gives_the_turn_back() -> None:
    turns = Turns("questions")

    def fail(_gone: threading.Event) -> None:
        raise LookupError("nothing there")

    for _ in range(2):
        with pytest.raises(LookupError):
            await turns.run(fail)
