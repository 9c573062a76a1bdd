"""Questions to the log are asked on a thread of their own, and end when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvatlas.deploy.console.past import apart


async def test_an_answer_comes_from_another_thread() -> None:
    """With its error, where it has one."""

    async def name() -> str:
        return threading.current_thread().name

    async def fail() -> None:
        raise LookupError("nothing there")

    assert await apart(name()) != threading.current_thread().name
    with pytest.raises(LookupError):
        await apart(fail())


async def test_who_goes_away_ends_the_question() -> None:
    """Its clean-up is done before the next one has its turn."""
    begun, ended = threading.Event(), threading.Event()

    async def endless() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    asked = asyncio.ensure_future(apart(endless()))
    assert await asyncio.to_thread(begun.wait, 90)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert ended.is_set()


async def test_a_question_given_up_before_it_began_ends_too() -> None:
    """However early it is cancelled."""
    asked = asyncio.ensure_future(apart(asyncio.Event().wait()))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
