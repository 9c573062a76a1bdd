"""The service main: starts, announces, watches and ends any of the services, in a process that is theirs alone.

A service that fails is not repaired in place: it gets a moment to leave its group and to say goodbye, then the process
ends, with a log line that says why and an exit code that says whether a restart helps. No library's thread or task that
ignores its cancellation can hold that up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.deploy.cli import common
from kvatlas.deploy.processes.parts import PARTS, Part, Service

log = logging.getLogger(__name__)

#: What a service that was told to stop may take; the longest, the bridge, gives Kafka up to 11 s.
STOP_SECONDS: Final = 14.0
#: What one that failed may take to say goodbye.
_FAILED_SECONDS: Final = 6.0
#: What is left of one that has stopped gets this long to end by itself.
_LEAVE_SECONDS: Final = 3.0

Say = Callable[[str, str], None]


def say(kind: str, text: str) -> None:
    """Print the line ``ready ...`` for whoever started the process; why it ends is told on standard error alone."""
    if kind == "ready":
        print(f"ready {text}", flush=True)


class Deadline:
    """Ends the process when it does not end by itself in time, with the exit code that it would have had."""

    def __init__(self) -> None:
        self.code = 1
        self._at = float("inf")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def within(self, seconds: float, code: int) -> None:
        """Have the process ended with ``code`` after so long; an earlier deadline stays."""
        with self._lock:
            self.code = code
            self._at = min(self._at, time.monotonic() + seconds)
            if self._thread is None:
                self._thread = threading.Thread(target=self._wait, name="deadline", daemon=True)
                self._thread.start()

    def _wait(self) -> None:
        while (left := self._at - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code)


def run(
    name: str,
    sections: Mapping[str, Any],
    *,
    prepared: bool = False,
    restarts: Restarts | None = None,
    tell: Say = say,
    orphaned: threading.Event | None = None,
    parts: Mapping[str, Part] = PARTS,
) -> int:
    """Run a service in this process until SIGTERM, Ctrl-C, or something ends it; once in a process.

    Args:
        name: the part, a key of ``parts``.
        sections: settings by section.
        prepared: rights and topics have been looked after.
        restarts: of this process, as its supervisor counts them.
        tell: gets ``ready`` and what is there once the service is, and ``failed`` and why when it ends by an error.
        parts: what there is.
        orphaned: set by a thread when whoever started the process is gone; the service stops then.

    Returns:
        The exit code: 0 stopped as told, 1 a restart may help, 2 it does not.
    """
    ending = _Ending(name, tell)
    # Errors are told by whoever sees them first; those of what is left at the loop's end are of no use.
    with contextlib.suppress(Exception), asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(_Start(parts[name], sections, prepared, restarts or Restarts(), orphaned), ending))
        ending.within(_LEAVE_SECONDS)
    return ending.code


def serve(part: str, args: argparse.Namespace, defaults: Mapping[str, Mapping[str, Any]] | None = None) -> int:
    """Run a part as a subcommand does, with the settings and the log that its flags describe; see :func:`run`."""
    sections = common.load_sections(args, defaults=defaults)
    configure_logging(sections["log"], args.command)
    return run(part, sections)


class _Start(NamedTuple):
    """What a service is started with, see :func:`run`."""

    part: Part
    sections: Mapping[str, Any]
    prepared: bool
    restarts: Restarts
    orphaned: threading.Event | None


class _Ending:
    """How the process ends: the code, why, and a deadline after which it ends whatever still holds it up."""

    def __init__(self, name: str, tell: Say) -> None:
        self.code = 0
        self.tell = tell
        self._name = name
        self._deadline = Deadline()

    def within(self, seconds: float) -> None:
        self._deadline.within(seconds, self.code)

    def failed(self, error: Exception) -> None:
        """Say why, before anything that could hang is tried."""
        self.code = common.exit_code(error)
        known = isinstance(error, KvatlasError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        helps = "a restart may help" if self.code == 1 else "a restart does not help"
        print(f"kvatlas {self._name}: {text}", file=sys.stderr, flush=True)
        log.log(logging.DEBUG if known else logging.ERROR, "%s ends, %s", self._name, helps, exc_info=error)
        self.tell("failed", text)
        self.within(_FAILED_SECONDS)


async def _serve(start: _Start, ending: _Ending) -> None:
    part, orphaned = start.part, start.orphaned
    stop = common.async_stop_event()
    beside = [] if orphaned is None else [asyncio.create_task(_stop_when(orphaned, stop))]
    broken = _broken_callbacks()
    service: Service | None = None
    try:
        service = await part.open(start.sections, stop, start.prepared)
        if service is None:
            return
        beside.append(asyncio.create_task(_announce(service, part.ready, ending.tell)))
        service.tell_restarts(start.restarts)
        if await common.unless_stopped(stop, service.start()):
            await _until(stop, service, broken)
        ending.within(STOP_SECONDS)
    except Exception as error:  # noqa: BLE001 # whatever it is, the process ends by it
        ending.failed(error)
    finally:
        for task in beside:
            task.cancel()
        if service is not None:
            await service.stop()


async def _until(stop: asyncio.Event, service: Service, broken: asyncio.Future[None]) -> None:
    running = asyncio.ensure_future(service.run_until(stop))
    try:
        await asyncio.wait({running, broken}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        else:
            broken.result()
    finally:
        running.cancel()


async def _announce(service: Service, ready: Callable[[Any], str], tell: Say) -> None:
    await service.ready.wait()
    tune_interpreter()
    tell("ready", ready(service))


async def _stop_when(orphaned: threading.Event, stop: asyncio.Event) -> None:
    while not orphaned.is_set():  # noqa: ASYNC110 # a thread sets it
        await asyncio.sleep(0.1)
    stop.set()


def _broken_callbacks() -> asyncio.Future[None]:
    """Return what gets the error of a callback of ours that raised.

    The loop only logs it, and what the callback was there for, such as reading a socket, may never be done again.
    """
    loop = asyncio.get_running_loop()
    broken: asyncio.Future[None] = loop.create_future()

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        error = context.get("exception")
        if "handle" in context and isinstance(error, Exception) and _ours(error.__traceback__) and not broken.done():
            broken.set_exception(error)

    loop.set_exception_handler(handle)
    broken.add_done_callback(lambda done: done.cancelled() or done.exception())  # it is no task that nobody looks at
    return broken


def _ours(trace: TracebackType | None) -> bool:
    """Tell whether an error went through code of ours."""
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith("kvatlas."):
            return True
        trace = trace.tb_next
    return False


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes event loops, None for Python's own."""
    try:
        import uvloop  # noqa: PLC0415 - faster where it is installed
    except ImportError:
        return None
    return uvloop.new_event_loop
