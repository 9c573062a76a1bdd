"""Tests of how background tasks are ended."""

from __future__ import annotations

import asyncio

from kvatlas.bridge.runtime.tasks import end_tasks


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
