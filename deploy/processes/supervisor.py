"""Supervisor: keeps service processes running, restarting each after a growing pause, or gives up with its reason.

Services are crash-only: what they cannot repair ends their process. The parent that is left has no state worth losing.
It starts the process again, counts how often, and gives up when the exit code says that a restart cannot help.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

from kvatlas.bridge.errors import KvatlasError, SettingsError
from kvatlas.bridge.runtime.restarts import Restarts
from kvatlas.deploy.brokers.process import tail
from kvatlas.deploy.cli.entry import EXIT_USAGE
from kvatlas.deploy.processes.main import STOP_SECONDS

log = logging.getLogger(__name__)

#: What runs a part; its name is added.
_COMMAND: Final = (sys.executable, "-m", "kvatlas.deploy.processes.child")
_POLL_SECONDS: Final = 0.1
_LOG_LINES: Final = 15
_PAUSE_FIRST_SECONDS: Final = 0.5
_PAUSE_MOST_SECONDS: Final = 30.0
#: A process that has lived so long ended of something else than the one before it.
_HEALTHY_SECONDS: Final = 60.0
#: Its own deadline comes first; a parent kills only what cannot even end itself.
KILL_SECONDS: Final = STOP_SECONDS + 1.0


class LaunchError(KvatlasError):
    """A part did not become ready, or ended by itself; the text names its log."""


class LaunchRefusedError(LaunchError, SettingsError):
    """A part ended by something that a restart does not help: its settings, its rights or a full disk."""


class Pauses:
    """How long to wait before a process is started again: twice as long each time, up to half a minute.

    Attributes:
        next_seconds: the pause after an end that comes soon.
    """

    def __init__(self, first_seconds: float = _PAUSE_FIRST_SECONDS, most_seconds: float = _PAUSE_MOST_SECONDS) -> None:
        self._first, self._most = first_seconds, most_seconds
        self.next_seconds = first_seconds

    def after(self, lived_seconds: float) -> float:
        """Return the pause after a process that has lived so long."""
        if lived_seconds >= _HEALTHY_SECONDS:
            self.next_seconds = self._first
        pause, self.next_seconds = self.next_seconds, min(self.next_seconds * 2, self._most)
        return pause


class Child:
    """One service in its own process.

    Args:
        part: what it is, a key of ``PARTS``.
        document: what it reads, see ``child.document``.
        log_file: where its standard error goes; None for the parent's.

    Attributes:
        ready: set once it has said that it is.
        said: what its ready line said.
        reason: why it failed, as it said; empty when it did not.
    """

    def __init__(self, part: str, document: dict[str, Any], log_file: Path | None) -> None:
        self.part, self.log_file = part, log_file
        self.said = self.reason = ""
        self.ready = threading.Event()
        with contextlib.ExitStack() as files:
            errors = files.enter_context(log_file.open("ab")) if log_file is not None else None
            # A session of its own: Ctrl-C reaches the parent alone, which stops its children in order.
            self.process = subprocess.Popen(  # noqa: S603 - our own module
                [*_COMMAND, part],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already; its exit code tells why
            self.process.stdin.write(json.dumps(document).encode() + b"\n")
            self.process.stdin.flush()
        self._listener = threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True)
        self._listener.start()

    def _listen(self, output: IO[bytes]) -> None:
        for line in output:
            kind, _, text = line.decode(errors="replace").partition(" ")
            if kind not in ("ready", "failed"):
                continue
            with contextlib.suppress(ValueError):
                if kind == "failed":
                    self.reason = str(json.loads(text))
                else:
                    self.said = str(json.loads(text))
                    self.ready.set()

    def address(self, name: str) -> str:
        """Return an address that its ready line said, by its name there; empty before."""
        words = (word.partition("=") for word in self.said.split())
        return next((address for key, _, address in words if key == name), "")

    def ended(self) -> int | None:
        """Return its exit code, None while it runs."""
        code = self.process.poll()
        if code is not None:
            self._listener.join(1.0)  # its last words
        return code

    def why(self, code: int) -> str:
        """Return why it ended, as it said, or by its code."""
        if self.reason:
            return self.reason
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"it ended with code {code} and did not say why"

    def told(self, code: int) -> LaunchError:
        """Return the error that tells of its end, with the end of its log where it has one."""
        text = f"the {self.part} ended by itself with code {code}"
        if self.log_file is None:
            text += f": {self.why(code)}"
        else:
            text += f"; its log {self.log_file} ends:\n{tail(self.log_file, _LOG_LINES)}"
        return LaunchRefusedError(text) if code == EXIT_USAGE else LaunchError(text)

    def terminate(self) -> None:
        """Ask it to stop."""
        if self.process.poll() is None:
            self.process.terminate()

    def wait(self, deadline: float) -> bool:
        """Wait until it has stopped; end it, with what it has started, at the deadline (monotonic seconds).

        Returns:
            Whether it stopped by itself.
        """
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
            return True
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return False
        finally:
            self.close()

    def close(self) -> None:
        """Close the pipes of one that has ended."""
        self._listener.join(1.0)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Kept:
    """One service that is kept running.

    Args:
        name: for people.
        start: starts a process, told of the restarts before it.
        clock: monotonic, seconds.

    Attributes:
        child: the process, also one that has ended and is started again after a pause.
        restarts: how often it was started again, and why last.
    """

    def __init__(
        self, name: str, start: Callable[[Restarts], Child], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.restarts = Restarts()
        self._start = start
        self._clock = clock
        self._pauses = Pauses()
        self._due: float | None = None
        self._began = clock()
        self.child = start(self.restarts)

    def look(self) -> None:
        """Start it again when it has ended and its pause is over.

        Raises:
            LaunchRefusedError: it ended by something that a restart does not help.
        """
        if self._due is not None:
            if self._clock() >= self._due:
                self._due, self._began = None, self._clock()
                self.child = self._start(self.restarts)
            return
        code = self.child.ended()
        if code is None:
            return
        if code == EXIT_USAGE:
            raise self.child.told(code)
        self.child.close()
        reason = self.child.why(code)
        pause = self._pauses.after(self._clock() - self._began)
        self._due = self._clock() + pause
        self.restarts = self.restarts.after(code, reason)
        log.warning(
            "%s ended with code %d and is started again in %.1f s (restart %d): %s",
            *(self.name, code, pause, self.restarts.total, reason),
        )


def stop_all(children: Sequence[Child]) -> tuple[list[str], list[int]]:
    """Stop processes, all at once, and kill those that do not end in time.

    Returns:
        Parts that were killed, and the exit codes of all.
    """
    for child in children:
        child.terminate()
    deadline = time.monotonic() + KILL_SECONDS
    killed = [child.part for child in children if not child.wait(deadline)]
    return killed, [child.process.returncode for child in children]


def supervise(
    name: str,
    starts: Sequence[Callable[[Restarts], Child]],
    stop: threading.Event,
    said: Callable[[str], None],
) -> int:
    """Keep processes running until ``stop`` is set.

    Args:
        name: of the command, for people.
        starts: start one process each.
        stop: set by SIGTERM and Ctrl-C; the processes are then asked to stop as well.
        said: gets what each ready line says.

    Returns:
        0 when all ended cleanly, 2 after what a restart does not help, else 1.
    """
    single = len(starts) == 1
    kept = [Kept(name if single else f"{name} process {n}", start) for n, start in enumerate(starts)]
    announced: dict[int, Child] = {}
    refused: LaunchRefusedError | None = None
    while refused is None and not stop.wait(_POLL_SECONDS):
        for number, one in enumerate(kept):
            try:
                one.look()
            except LaunchRefusedError as error:
                refused = error
                break
            if one.child.ready.is_set() and announced.get(number) is not one.child:
                announced[number] = one.child
                said(one.child.said)
    killed, codes = stop_all([one.child for one in kept])
    for part in killed:
        print(f"kvatlas {name}: {part} did not stop in time and was killed", file=sys.stderr)
    if refused is not None:
        print(f"kvatlas {name}: given up, since a restart does not help: {refused}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    if EXIT_USAGE in codes:
        return EXIT_USAGE
    return 0 if all(code == 0 for code in codes) else 1
