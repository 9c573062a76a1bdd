"""Hostile senders in threads, and what others wait for beside them, in processor time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

MIB = 2**20
#: What a machine takes for a sum of two million numbers on which all holds as it is said here; slower ones take longer.
_PACE_SECONDS = 0.03


def exchange(host: str, port: int, data: bytes) -> int:
    """Send raw bytes and return the status of the answer, 0 for a connection that was closed."""
    with socket.create_connection((host, port), 600) as link:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n" not in answer and (part := link.recv(65536)):
                answer += part
    return int(answer.split()[1]) if answer else 0


async def half_heads(host: str, port: int, path: str, count: int) -> None:
    """Open connections of which half send a part of a head, the others nothing; wait until all have been closed."""
    links = []
    for number in range(count):
        reader, writer = await asyncio.open_connection(host, port)
        if number % 2:
            writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".encode())
        links.append((reader, writer))
    for reader, writer in links:
        assert await asyncio.wait_for(reader.read(), 90) == b""
        writer.close()


class Sent(list[Any]):
    """What came of the work of threads, and the threads."""

    threads: tuple[threading.Thread, ...] = ()

    def spent(self) -> float:
        """Return the processor time of this process without theirs."""
        mine = [time.clock_gettime(time.pthread_getcpuclockid(one.ident)) for one in self.threads if one.ident]
        return time.process_time() - sum(mine)


@contextlib.asynccontextmanager
async def sending(work: Callable[[], Any], threads: int = 2) -> AsyncIterator[Sent]:
    """Do something over and over in threads while a block runs; yields what it returned so far."""
    stop, found = threading.Event(), Sent()

    def run() -> None:
        while not stop.is_set():
            found.append(work())

    running = found.threads = tuple(threading.Thread(target=run) for _ in range(threads))
    for thread in running:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in running:
            await asyncio.to_thread(thread.join)


async def waits_of(ask: Callable[[], Awaitable[None]], beside: Sent, count: int) -> tuple[list[float], list[float]]:
    """Ask for something small, one after the other; returns what each took, sorted: of the loop, and of the process.

    In processor time, so that how busy the machine is with other work does not count: that of the loop's thread, and
    that of this process without the senders, for whatever else holds the interpreter's lock.
    """
    loop, process = [], []
    for _ in range(count):
        began = time.thread_time(), beside.spent()
        await ask()
        loop.append(time.thread_time() - began[0])
        process.append(beside.spent() - began[1])
        await asyncio.sleep(0.01)
    return sorted(loop), sorted(process)


def check_waits(waits: tuple[list[float], list[float]]) -> None:
    """In 99 of 100 cases the loop is held for less than 100 ms, and nothing comes near what reading a body takes."""
    began = time.thread_time()
    sum(range(2_000_000))
    pace = max(1.0, (time.thread_time() - began) / _PACE_SECONDS)
    loop, process = waits
    assert loop[len(loop) * 99 // 100 - 1] < 0.1 * pace
    assert process[len(process) * 99 // 100 - 1] < 0.5 * pace
