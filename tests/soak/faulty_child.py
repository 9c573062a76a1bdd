"""A child of the supervisor that breaks one of its background tasks when it is asked to.

It reads from the file ``break`` which one, by the name of its coroutine; what that task waits for then raises. The file
``names`` beside it lists the tasks that there are.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvatlas.deploy.processes import child, main


class InjectedError(Exception):
    """What a background task gets."""


def name_of(task: asyncio.Task[Any]) -> str:
    """A task's coroutine and, where somebody gave it one, its name."""
    coro: Any = task.get_coro()
    return f"{getattr(coro, '__qualname__', '?')}"


def break_one(wanted: str) -> None:
    """Have what a task waits for raise."""
    for task in asyncio.all_tasks():
        if name_of(task) != wanted or task.done():
            continue
        waiter: Any = getattr(task, "_fut_waiter", None)
        while isinstance(waiter, asyncio.Task) and getattr(waiter, "_fut_waiter", None) is not None:
            waiter = waiter._fut_waiter
        if waiter is not None and not waiter.done() and not isinstance(waiter, asyncio.Task):
            waiter.set_exception(InjectedError(wanted))
            return


def watch(loop: asyncio.AbstractEventLoop, folder: Path) -> None:
    """Look for what is asked for."""

    def look() -> None:
        names = sorted({name_of(task) for task in asyncio.all_tasks(loop)})
        (folder / "names.new").write_text("\n".join(names))
        (folder / "names.new").replace(folder / "names")

    while True:
        time.sleep(0.1)
        loop.call_soon_threadsafe(look)
        asked = folder / "break"
        if asked.exists():
            wanted = asked.read_text()
            asked.unlink()
            loop.call_soon_threadsafe(break_one, wanted)


def _announce(plain: Any) -> Any:
    async def announce(*args: Any) -> None:
        folder = Path(os.environ["FAULTS"])
        threading.Thread(target=watch, args=(asyncio.get_running_loop(), folder), daemon=True).start()
        await plain(*args)

    return announce


main._announce = _announce(main._announce)

if __name__ == "__main__":
    sys.exit(child.main())
