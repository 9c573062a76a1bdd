"""Background tasks of a service: begun, watched and ended together.

A service that has lost one of its tasks looks whole and is not, and only a restart repairs it. So whatever ends a
watched task ends the service, and the process with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any, Final

from kvatlas.bridge.errors import TaskEndedError

log = logging.getLogger(__name__)

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


class Background:
    """Background tasks of one service, none of which may end before it is told to.

    Attributes:
        failure: the first error that ended a task, or that :meth:`fail` was told; None while there is none.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self._failed = asyncio.Event()
        self._stopping = False
        self._own: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
        """Begin a task and watch it."""
        task = asyncio.create_task(work, name=name or getattr(work, "__qualname__", None))
        self._own.add(task)
        self.watch(task)
        return task

    def once(self, work: Coroutine[Any, Any, Any], what: str) -> None:
        """Begin work that ends by itself; a failure of it is told and harms nobody else."""
        task = asyncio.create_task(work, name=what)
        self._own.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._own.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: not done", task.get_name(), exc_info=error)

    def watch(self, *tasks: asyncio.Task[Any]) -> None:
        """Watch tasks that another has begun, and ends: the end of one before :meth:`stop` is a failure."""
        for task in tasks:
            task.add_done_callback(self._ended)

    def release(self, task: asyncio.Task[Any]) -> None:
        """Watch a task no longer: it is about to be ended."""
        task.remove_done_callback(self._ended)

    def fail(self, error: BaseException) -> None:
        """Take note of an error that ends the service; the first one counts. Only from the loop's thread."""
        if self.failure is None and not self._stopping:
            self.failure = error
            self._failed.set()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._own.discard(task)
        error = None if task.cancelled() else task.exception()
        if self._stopping:
            if error is not None:
                log.warning("%s: %r while it was stopped", task.get_name(), error)
            return
        how = "was cancelled" if task.cancelled() else "returned"
        self.fail(error or TaskEndedError(f"background task {task.get_name()} {how}, though it runs for ever"))

    async def until(self, stop: asyncio.Event) -> None:
        """Wait until ``stop`` is set.

        Raises:
            BaseException: what ended a task meanwhile.
        """
        waiters = [asyncio.ensure_future(event.wait()) for event in (stop, self._failed)]
        try:
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiters:
                waiter.cancel()
        if self.failure is not None and not stop.is_set():
            raise self.failure

    def stopping(self) -> None:
        """Take note that tasks end from here on because they are told to."""
        self._stopping = True

    async def stop(self) -> None:
        """End the tasks that were begun here."""
        self.stopping()
        await end_tasks(list(self._own))
