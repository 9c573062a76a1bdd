"""The other end of :mod:`~kvatlas.scorer.tokenization.aside`: a process that does work under hard limits.

Run as ``python -m``, with the processor time of one piece of work in seconds and the memory in bytes. It ends with its
input. The interval timer's signal has no handler, so the kernel ends the process whatever it is doing.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer.tokenization import aside, aside_jobs

_NICE: Final = 10
_JOBS: Final[dict[int, Callable[[bytes], bytes]]] = {
    aside.RENDER: aside_jobs.render,
    aside.READ_BODY: aside_jobs.read_body,
    aside.READ_MESSAGE: aside_jobs.read_message,
}


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _address_space() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.setrecursionlimit(2_000)
    gc.disable()  # millions of values are made at once and dropped at once
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(aside.FRAME.size)) == aside.FRAME.size:
        job, length = aside.FRAME.unpack(head)
        payload = source.read(length)
        if len(payload) < length:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            _answer(target, 0, _JOBS[job](payload))
        except KvatlasError as error:
            _answer(target, 1, json.dumps([type(error).__name__, str(error)]).encode())
        except MemoryError:
            raise SystemExit(aside.MEMORY_EXIT) from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            if job == aside.RENDER:
                gc.collect()  # values of templates may refer to each other


def _answer(target: BinaryIO, status: int, payload: bytes) -> None:
    target.write(aside.FRAME.pack(status, len(payload)))
    target.write(payload)
    target.flush()


def _address_space() -> int:
    """Return the bytes of address space in use, which differ much between machines."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 1 << 30
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
