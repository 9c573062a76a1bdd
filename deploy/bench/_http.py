"""The cheapest HTTP/1.1 pods and client that a benchmark of a gateway can have: neither may be what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

_ANSWER: Final = (
    b'{"choices":[{"index":0,"text":"ok"}],"usage":{"prompt_tokens":1,"completion_tokens":1,'
    b'"prompt_tokens_details":{"cached_tokens":0}}}'
)
_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_EVENT: Final = b'data: {"choices":[{"index":0,"text":"w"}]}\n\n'


class _PodProtocol(asyncio.Protocol):
    """Answers each request once its body is there; ``/stream`` in 100 pieces."""

    def __init__(self, pod: FastPod) -> None:
        self._pod = pod
        self._kept = b""
        self._transport: asyncio.Transport | None = None
        self._need = -1
        self._chunked = False
        self._stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._kept += data
        while self._kept:
            if self._need < 0 and not self._head():
                return
            if self._chunked:
                end = self._kept.find(b"\r\n0\r\n\r\n" if not self._kept.startswith(b"0\r\n\r\n") else b"0\r\n\r\n")
                if end < 0:
                    return
                self._kept = b""
            elif len(self._kept) < self._need:
                return
            else:
                self._kept = self._kept[self._need :]
            self._need = -1
            self._answer()

    def _head(self) -> bool:
        end = self._kept.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._kept[:end].lower()
        self._kept = self._kept[end + 4 :]
        self._stream = b" /stream" in head[:64]
        self._chunked = b"transfer-encoding: chunked" in head
        at = head.find(b"content-length:")
        self._need = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if not self._chunked and not self._need:
            self._need = -1
            self._answer()
            return False
        return True

    def _answer(self) -> None:
        assert self._transport is not None
        self._pod.requests += 1
        if self._stream:
            asyncio.get_running_loop().create_task(self._events())
        else:
            self._transport.write(_HEAD % len(_ANSWER) + _ANSWER)

    async def _events(self) -> None:
        assert self._transport is not None
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for _ in range(100):
            self._transport.write(b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT))
            await asyncio.sleep(0.002)
        self._transport.write(b"0\r\n\r\n")


class FastPod:
    """An HTTP server that costs next to nothing.

    Attributes:
        requests: answered so far.
        address: once started.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.address = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _PodProtocol(self), "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()


class Connection:
    """One connection to a gateway, one request at a time."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> float:
        """Send a request and read the whole answer; returns seconds.

        Raises:
            ConnectionError: the answer is no 200.
        """
        if self._writer is None:
            host, _, port = self._address.rpartition(":")
            self._reader, self._writer = await asyncio.open_connection(host, int(port), limit=1024 * 1024)
        reader, writer = self._reader, self._writer
        assert reader is not None
        began = time.perf_counter()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise ConnectionError(head.split(b"\r\n", 1)[0].decode())
        at = head.find(b"content-length:")
        if at >= 0:
            await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
        else:
            while size := int(await reader.readline(), 16):
                await reader.readexactly(size + 2)
            await reader.readline()
        return time.perf_counter() - began

    def close(self) -> None:
        """Close it."""
        if self._writer is not None:
            self._writer.close()


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """Return a request."""
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def closed_loop(address: str, requests: Sequence[bytes], connections: int, seconds: float) -> list[float]:
    """Send as fast as answers come, over some connections; returns each request's seconds."""
    taken: list[float] = []
    until = time.perf_counter() + seconds

    async def one(number: int) -> None:
        connection, turn = Connection(address), number
        try:
            while time.perf_counter() < until:
                taken.append(await connection.ask(requests[turn % len(requests)]))
                turn += connections
        finally:
            connection.close()

    await asyncio.gather(*(one(number) for number in range(connections)))
    return taken


async def open_loop(address: str, requests: Sequence[bytes], rate: float, seconds: float) -> list[float]:
    """Send at a rate, whatever the answers do; returns each request's seconds, counted from when it was due."""
    free: list[Connection] = []
    taken: list[float] = []
    begun = time.perf_counter()

    async def one(number: int, due: float) -> None:
        connection = free.pop() if free else Connection(address)
        await connection.ask(requests[number % len(requests)])
        taken.append(time.perf_counter() - due)
        free.append(connection)

    tasks = []
    for number in range(int(rate * seconds)):
        due = begun + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(number, due)))
    await asyncio.gather(*tasks)
    for connection in free:
        connection.close()
    return taken
