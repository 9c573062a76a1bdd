"""Errors put into background tasks: what a task waits for raises."""

from __future__ import annotations

import asyncio
from typing import Any

Task = asyncio.Task[Any]


class InjectedError(Exception):
    """What a background task gets."""


def inject(task: Task) -> bool:
    """Have what a task waits for raise; False where it waits for nothing right now, or has ended."""
    waiter: Any = getattr(task, "_fut_waiter", None)
    while isinstance(waiter, asyncio.Task) and getattr(waiter, "_fut_waiter", None) is not None:
        waiter = getattr(waiter, "_fut_waiter")  # noqa: B009 - known to the C implementation alone
    if waiter is None or waiter.done() or isinstance(waiter, asyncio.Task):
        return False
    waiter.set_exception(InjectedError(task.get_name()))
    return True


async def break_task(task: Task) -> None:
    """Break a task as soon as it waits for something; one that has ended by itself stays as it is."""
    while not task.done() and not inject(task):
        await asyncio.sleep(0)


def name_of(task: Task) -> str:
    """Name of a task's coroutine."""
    return str(getattr(task.get_coro(), "__qualname__", "?"))


def tasks_since(before: set[Task]) -> list[Task]:
    """Return the loop's tasks that were not there before, by name; not the one that asks."""
    return sorted(asyncio.all_tasks() - before - {asyncio.current_task()}, key=name_of)
