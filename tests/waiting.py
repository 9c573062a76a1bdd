"""Waiting until something is so, with a limit that only a hang reaches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(true: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait beside what else the loop has to do."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


def wait_until(true: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait in this thread."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)
