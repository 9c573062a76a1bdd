"""Subprocess sandbox: work done in processes of their own, under hard limits of CPU time and memory.

For work that a request can make as dear as it likes: a template of the caller's, a JSON document of millions of values.
Beside this process it holds neither the event loop nor the interpreter's lock; past its limits the kernel
ends it. A process serves one piece after the other and is started anew when it was ended::

    to the child      u8 job, u32 length, payload
    from the child    u8 0, u32 length, payload of the answer
                      u8 1, u32 length, JSON [name of the error, text]
"""

from __future__ import annotations

import json
import logging
import os
import queue
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Final, cast

from kvatlas.scorer import errors
from kvatlas.scorer.tokenization import errors as own

log = logging.getLogger(__name__)

FRAME: Final = struct.Struct("<BI")
#: Numbers of the kinds of work, on the wire to the child.
RENDER: Final = 0
READ_BODY: Final = 1
READ_MESSAGE: Final = 2

_MODULE: Final = "kvatlas.scorer.tokenization.aside_child"
_CHUNK: Final = 1 << 18
#: What a child may say went wrong; anything else is its own fault.
_ERRORS: Final[dict[str, type[errors.ScorerError]]] = {
    kind.__name__: kind
    for kind in (
        errors.InputError,
        errors.TooLargeError,
        own.NoTemplateError,
        own.PromptLimitError,
        own.TemplateError,
        own.TemplateLimitError,
        own.TokenizeInputError,
    )
}


class _Child:
    """One process, between two pieces of work."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - ours
        self._input = cast("IO[bytes]", self._process.stdin).fileno()
        self._output = cast("IO[bytes]", self._process.stdout).fileno()
        for fd in (self._input, self._output):
            os.set_blocking(fd, False)

    def exchange(self, job: int, payload: bytes, most: int, ends_at: float, clock: Callable[[], float]) -> bytes:
        """Send work and return the raw answer, without its length.

        Raises:
            TimeoutError: no answer in time.
            EOFError: the process ended.
            ValueError: the answer is larger than ``most``.
        """
        send = memoryview(FRAME.pack(job, len(payload)) + payload)
        received = bytearray()
        wanted = FRAME.size
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            selector.register(self._input, selectors.EVENT_WRITE)
            while len(received) < wanted:
                left = ends_at - clock()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fd == self._input:
                        send = self._write(send)
                        if not send:
                            selector.unregister(self._input)
                    else:
                        received += self._read(wanted - len(received))
                if wanted == FRAME.size and len(received) == wanted:
                    wanted += FRAME.unpack(received)[1]
                    if wanted > most:
                        raise ValueError(wanted)
        return bytes(received[:1] + received[FRAME.size :])

    def _write(self, data: memoryview) -> memoryview:
        try:
            return data[os.write(self._input, data[:_CHUNK]) :]
        except BrokenPipeError as error:
            raise EOFError from error

    def _read(self, most: int) -> bytes:
        data = os.read(self._output, min(most, _CHUNK))
        if not data:
            raise EOFError
        return data

    def kill(self) -> None:
        """Kill the process; whoever waits for its answer learns it."""
        self._process.kill()

    def end(self) -> int:
        """Kill the process and clean up; returns how it ended."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return self._process.wait()

    def ended_by(self) -> int | None:
        """Return how the process ended by itself, None where it did not within a moment."""
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None


class Aside:
    """A few such processes, started when they are needed. Calls block and may come from many threads at once."""

    def __init__(
        self,
        *,
        processes: int,
        cpu_seconds: float,
        memory_bytes: int,
        answer_bytes: int,
        what: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the limits; nothing is started yet.

        Args:
            processes: how many there are at most.
            cpu_seconds: processor time of one piece of work.
            memory_bytes: address space of a process, beyond what it has at its start.
            answer_bytes: largest answer.
            what: names the work and its settings, for errors.
            clock: monotonic seconds.
        """
        self._cpu_seconds = cpu_seconds
        self._memory_bytes = memory_bytes
        self._most = answer_bytes + FRAME.size
        self._what = what
        self._clock = clock
        self._slots: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._active: set[_Child] = set()
        self._closed = False
        self._processes = processes
        for _ in range(processes):
            self._slots.put(None)

    def run(self, job: int, payload: bytes, *, timeout_seconds: float) -> bytes:
        """Have one piece of work done.

        Args:
            job: which, see the numbers of this module.
            payload: what the job takes.
            timeout_seconds: longest wait, for a free process and for the answer together.

        Raises:
            TooLargeError: a limit was passed.
            InputError: the work refuses the request, as told by the child.
            BusyError: no process was free in time.
            BackendError: the process ended for another reason.
        """
        ends_at = self._clock() + timeout_seconds
        child = self._free(ends_at)
        back: _Child | None = None
        try:
            child = self._begun(child)
            answer = child.exchange(job, payload, self._most, ends_at, self._clock)
            back = child
        except TimeoutError as error:
            raise errors.TooLargeError(f"{self._what} took longer than {timeout_seconds:g} s") from error
        except ValueError as error:
            raise errors.TooLargeError(f"{self._what} made too much: {error} bytes") from error
        except EOFError as error:
            raise self._ended(child) from error
        except OSError as error:
            raise own.TokenizerBackendError(f"{self._what}: no process for it: {error}") from error
        finally:
            self._done(child, back)
        return _opened(answer)

    def close(self) -> None:
        """End all processes, and with them the work under way."""
        with self._lock:
            self._closed = True
            for active in self._active:
                active.kill()
        for _ in range(self._processes):
            idle = self._slots.get()
            if idle is not None:
                idle.end()
        for _ in range(self._processes):
            self._slots.put(None)

    def _free(self, ends_at: float) -> _Child | None:
        try:
            return self._slots.get(timeout=max(0.0, ends_at - self._clock()))
        except queue.Empty as error:
            raise errors.BusyError(f"{self._what}: too many at once; try again") from error

    def _begun(self, child: _Child | None) -> _Child:
        with self._lock:
            if self._closed:
                raise own.TokenizerBackendError(f"{self._what}: shutting down")
            child = child or _Child(self._command())
            self._active.add(child)
            return child

    def _done(self, child: _Child | None, back: _Child | None) -> None:
        if child is not None:
            with self._lock:
                self._active.discard(child)
            if back is None:
                child.end()
        self._slots.put(back)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", _MODULE, str(self._cpu_seconds), str(self._memory_bytes)]

    def _ended(self, child: _Child | None) -> errors.ScorerError:
        code = child.ended_by() if child is not None else None
        if code in (-signal.SIGPROF, -signal.SIGXCPU):
            return errors.TooLargeError(f"{self._what} took longer than {self._cpu_seconds:g} s of processor time")
        if code in (MEMORY_EXIT, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT):
            return errors.TooLargeError(f"{self._what} took more than {self._memory_bytes} bytes of memory")
        log.error("a process beside the scorer ended with %s", code)
        return own.TokenizerBackendError(f"{self._what}: its process ended with {code}")


#: Exit code of a child that ran out of its memory.
MEMORY_EXIT: Final = 77


def _opened(answer: bytes) -> bytes:
    if answer[0] == 0:
        return answer[1:]
    name, text = json.loads(answer[1:])
    if name in _ERRORS:
        raise _ERRORS[name](text)
    raise own.TokenizerBackendError(text)
