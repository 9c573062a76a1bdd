"""Ending background tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

#: Long enough for what a task does on its way out, such as to close a consumer while Kafka is away.
_AGAIN_SECONDS: Final = 5.0


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], *, again_seconds: float = _AGAIN_SECONDS) -> None:
    """Cancel tasks and wait until they have ended; what they raise is left in them.

    A cancellation that comes in the moment when what a task waits for is there can be lost: ``asyncio.wait_for`` before
    Python 3.12 drops it, and client libraries use that. So it is asked for again until the task has ended.

    Args:
        tasks: what to end; those that have ended are passed over.
        again_seconds: how long a task may take to end before it is cancelled again.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=again_seconds)
