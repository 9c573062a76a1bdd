"""A child of the supervisor that breaks one of its background tasks when it is asked to.

It reads from the file ``break`` which one, by name; what that task waits for then raises. The file ``names`` beside it
lists the tasks that there have been since the service was ready, those of Faust's consumer thread included.
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

Task = asyncio.Task[Any]
#: Tasks that come and go come within it.
PATIENCE_SECONDS = 2.0


class InjectedError(Exception):
    """What a background task gets."""


def name_of(task: Task) -> str:
    """Name of a task's coroutine; of one that only runs another's, as those of mode's services do, the other's."""
    coro: Any = task.get_coro()
    inner: Any = getattr(task, "__wrapped__", None)
    name = getattr(coro, "__qualname__", "?")
    return name if inner is None else f"{name}({getattr(inner, '__qualname__', '?')})"


def named(task: Task, loop: asyncio.AbstractEventLoop) -> str:
    """Name of a task; of those that keep the metadata of a client of Kafka, also whose it is."""
    name = name_of(task)
    frame = getattr(task.get_coro(), "cr_frame", None)
    if name != "AIOKafkaClient._md_synchronizer" or frame is None:
        return name
    topics = frame.f_locals["self"]._topics
    if len(topics) == 1 and min(topics).endswith(("kv-pods", "kv-workers")):
        return f"{name} of the follower of {min(topics)}"
    return f"{name} of Faust's {'consumer' if loop in LOOPS else 'producer'}"


def break_one(wanted: str, loop: asyncio.AbstractEventLoop) -> bool:
    """Have what a task waits for raise; False where it waits for nothing right now."""
    for task in asyncio.all_tasks(loop):
        if named(task, loop) != wanted or task.done():
            continue
        waiter: Any = getattr(task, "_fut_waiter", None)
        while isinstance(waiter, asyncio.Task) and getattr(waiter, "_fut_waiter", None) is not None:
            waiter = waiter._fut_waiter
        if waiter is not None and not waiter.done() and not isinstance(waiter, asyncio.Task):
            sys.stderr.write(f"broken: {wanted}\n")
            sys.stderr.flush()
            waiter.set_exception(InjectedError(wanted))
            return True
    return False


def replace(file: Path, text: str) -> None:
    """Write a file so that nobody reads a part of it."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


class Watch:
    """Looks for what is asked for, in a thread.

    Args:
        loops: the loops of the process, more to come.
        folder: of the files.
    """

    def __init__(self, loops: list[asyncio.AbstractEventLoop], folder: Path) -> None:
        self._loops, self._folder = loops, folder
        self._seen: set[str] = set()
        self._writing = threading.Lock()  # the loops have threads of their own
        self._asked_since = 0.0

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            time.sleep(0.1)
            for loop in self._loops:
                loop.call_soon_threadsafe(self._look, loop)

    def _break(self, loop: asyncio.AbstractEventLoop) -> None:
        """Break what is asked for: at the next look where it is about to run, not at all where it stays away."""
        asked = self._folder / "break"
        if not asked.exists():
            self._asked_since = 0.0
            return
        self._asked_since = self._asked_since or time.monotonic()
        wanted = asked.read_text()
        away = not wanted.startswith("AIOKafkaClient.") and time.monotonic() - self._asked_since > PATIENCE_SECONDS
        if break_one(wanted, loop) or away:
            asked.unlink()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        found = {named(task, loop) for task in asyncio.all_tasks(loop)}
        with self._writing:
            self._break(loop)
            if not found <= self._seen:
                self._seen |= found
                replace(self._folder / "names", "\n".join(sorted(self._seen)))


LOOPS: list[asyncio.AbstractEventLoop] = []


def _set_event_loop(plain: Any) -> Any:
    def set_event_loop(loop: asyncio.AbstractEventLoop | None) -> None:
        if loop is not None and loop not in LOOPS:
            LOOPS.append(loop)
        plain(loop)

    return set_event_loop


def _announce(plain: Any) -> Any:
    async def announce(*args: Any) -> None:
        await plain(*args)
        running = asyncio.get_running_loop()
        loops = LOOPS if running in LOOPS else [running, *LOOPS]
        watch = Watch(loops, Path(os.environ["FAULTS"]))
        threading.Thread(target=watch.run, daemon=True).start()

    return announce


main._announce = _announce(main._announce)
asyncio.set_event_loop = _set_event_loop(asyncio.set_event_loop)

if __name__ == "__main__":
    sys.exit(child.main())
