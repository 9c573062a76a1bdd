"""Background tasks: how they are ended, and that none ends unseen."""

from __future__ import annotations

import asyncio

import pytest

from kvatlas.bridge.errors import TaskEndedError
from kvatlas.bridge.runtime.tasks import Background, end_tasks


async def test_a_task_that_lost_its_cancellation_is_cancelled_again() -> None:
    """What swallows one cancellation does not hold a stop up."""
    swallowed = 0

    async def deaf() -> None:
        nonlocal swallowed
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed += 1
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(deaf()) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.wait_for(end_tasks(tasks, again_seconds=0.01), 60)
    assert swallowed == 2
    assert all(task.cancelled() for task in tasks)


async def test_errors_stay_in_the_tasks_that_raised_them() -> None:
    """Ending does not raise what went wrong before, or on the way out."""

    async def failing() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError

    task = asyncio.create_task(failing())
    await asyncio.sleep(0)
    await end_tasks([task])
    assert isinstance(task.exception(), ValueError)
    await end_tasks([task])


async def forever() -> None:
    await asyncio.Event().wait()


async def until(background: Background) -> None:
    await asyncio.wait_for(background.until(asyncio.Event()), 60)


async def test_an_error_in_any_background_task_ends_the_service() -> None:
    """The first error is the one that is told, whichever task it was."""
    background = Background()

    async def failing() -> None:
        raise ValueError("why")

    background.start(forever())
    background.start(failing())
    with pytest.raises(ValueError, match="why"):
        await until(background)
    background.fail(KeyError("later"))
    assert isinstance(background.failure, ValueError)
    await background.stop()


@pytest.mark.parametrize("how", ["returned", "was cancelled"])
async def test_a_task_that_merely_ends_ends_the_service_too(how: str) -> None:
    """What runs for ever and does not any more is missed, also where nobody raised anything."""
    background = Background()

    async def ending() -> None:
        if how != "returned":
            await asyncio.Event().wait()

    task = background.start(ending(), "the sweeper")
    await asyncio.sleep(0)
    if how != "returned":
        task.cancel()
    with pytest.raises(TaskEndedError, match=f"the sweeper {how}"):
        await until(background)


async def test_what_ends_because_it_is_told_to_is_no_failure() -> None:
    """Neither at the stop, nor a watched task that its owner ends."""
    background = Background()
    own, theirs = background.start(forever()), asyncio.create_task(forever())
    leaving = asyncio.create_task(forever())
    background.watch(theirs)
    background.watch(leaving)
    background.release(leaving)
    await end_tasks([leaving])
    stop = asyncio.Event()
    waiting = asyncio.create_task(background.until(stop))
    await asyncio.sleep(0)
    stop.set()
    await asyncio.wait_for(waiting, 60)
    await background.stop()
    assert own.cancelled()
    assert not theirs.done()  # its owner's to end
    await end_tasks([theirs])
    assert background.failure is None
