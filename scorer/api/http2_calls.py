"""Calls of a gRPC server on the event loop: messages in, messages out, as a handler sees them.

A call reads what its connection has put together, and writes within the windows that the peer has opened.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import grpc
import grpc.aio

from kvatlas.bridge.runtime.logs import whereabouts
from kvatlas.scorer.api import http2
from kvatlas.scorer.api.http2 import Bytes

log = logging.getLogger(__name__)

INTERNAL: Final = grpc.StatusCode.INTERNAL.value[0]
UNKNOWN: Final = grpc.StatusCode.UNKNOWN.value[0]


class Method(NamedTuple):
    """What answers calls of one method: one of gRPC's handlers, of those that write by themselves or return.

    Attributes:
        serve: takes the one request, or None where requests come as a stream, and the call.
        streams_in, streams_out: whether there is more than one message each way.
        decode: bytes to message.
        encode: message to bytes.
    """

    serve: Callable[[Any, Any], Any]
    streams_in: bool
    streams_out: bool
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]


def method_of(handler: Any) -> Method | None:
    """Return what serves a handler that gRPC's generated code has made; None for one that nobody has written."""
    streams_in, streams_out = handler.request_streaming, handler.response_streaming
    ways = ["stream" if streams else "unary" for streams in (streams_in, streams_out)]
    serve = getattr(handler, "_".join(ways))
    if not inspect.iscoroutinefunction(serve):
        return None
    return Method(serve, streams_in, streams_out, handler.request_deserializer, handler.response_serializer)


class Carrier(Protocol):
    """What a call needs of its connection.

    Attributes:
        window: bytes that the peer takes now, of all streams together.
        payload: the most that it takes in a frame.
        most_bytes: larger messages are not taken here.
    """

    window: int
    payload: int
    most_bytes: int

    def send(self, parts: Sequence[Bytes]) -> None:
        """Send."""

    def hold(self, more: int) -> bool:
        """Count bytes that nobody has read yet; returns whether there is room for them."""

    async def writable(self) -> None:
        """Wait until the peer reads."""

    def finish(self, stream: int, status: int, text: str) -> None:
        """End a call."""

    def cancelled(self, stream: int) -> None:
        """End a call whose handler was cancelled."""


class _CallError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Call:
    """One call, which a handler reads and writes.

    Attributes:
        window: bytes of this stream that the peer takes now.
        answered: headers were sent.
        closed: the peer sends no more.
        task: serves it, once started.
    """

    def __init__(self, carrier: Carrier, stream: int, method: Method, window: int) -> None:
        self.window = window
        self.answered = self.closed = False
        self._carrier = carrier
        self._stream = stream
        self._method = method
        self._messages = http2.Messages(carrier.most_bytes)
        self._ready: deque[bytes] = deque()
        self._held = 0
        self._taken = 0  # bytes read since the peer was told so
        self._reader: asyncio.Future[None] | None = None
        self._unsent: deque[memoryview] = deque()
        self._sent: asyncio.Future[None] | None = None
        self.task: asyncio.Task[None] | None = None

    # --- for the handler ------------------------------------------------------------------------------------------

    async def read(self) -> Any:
        """Return the next message, ``grpc.aio.EOF`` after the last."""
        while not self._ready:
            if self.closed:
                return grpc.aio.EOF
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message = self._ready.popleft()
        size = len(message) + http2.PREFIX_BYTES
        self._hold(-size)
        self._taken += size
        if self._taken > self._carrier.most_bytes // 2 and not self.closed:
            self._carrier.send((http2.numbered(http2.WINDOW_UPDATE, self._stream, self._taken),))
            self._taken = 0
        return self._method.decode(message)

    async def write(self, message: Any) -> None:
        """Send a message; returns once the peer takes it."""
        carrier, data = self._carrier, self._method.encode(message)
        if not self.answered:
            self.answered = True
            carrier.send((http2.frame(http2.HEADERS, http2.END_HEADERS, self._stream, http2.ANSWER_HEADERS),))
        size = len(data) + http2.PREFIX_BYTES
        if not self._unsent and size <= min(self.window, carrier.window):
            self.window -= size
            carrier.window -= size
            carrier.send(http2.message_frames(self._stream, data, carrier.payload))
        else:
            self._unsent.append(memoryview(b"\x00" + len(data).to_bytes(4, "big") + data))
            self.flush()
            while self._unsent:
                self._sent = asyncio.get_running_loop().create_future()
                await self._sent
        await carrier.writable()

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        """End the call with a status."""
        raise _CallError(code.value[0], details)

    # --- for the connection ---------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve it."""
        self.task = loop.create_task(self._run())

    def feed(self, piece: bytes) -> int:
        """Take a piece of the stream; returns how many messages it made whole.

        Raises:
            MessageError: a message is not taken, or there is no room for it.
        """
        if not self._hold(len(piece)):
            raise http2.MessageError("too much is waiting here to be read")
        whole = self._messages.feed(piece)
        if whole:
            self._ready.extend(whole)
            self._wake(self._reader)
        return len(whole)

    def close(self) -> None:
        """Take note that the peer sends no more."""
        self.closed = True
        self._wake(self._reader)

    def flush(self) -> None:
        """Send what the windows let through."""
        carrier, unsent = self._carrier, self._unsent
        while unsent and (room := min(self.window, carrier.window, carrier.payload)) > 0:
            piece = unsent[0][:room]
            unsent[0] = unsent[0][room:]
            if not unsent[0]:
                unsent.popleft()
            self.window -= len(piece)
            carrier.window -= len(piece)
            carrier.send((http2.head(len(piece), http2.DATA, 0, self._stream), piece))
        if not unsent:
            self._wake(self._sent)

    def end(self) -> None:
        """Forget what was not read, and end the handler."""
        self._hold(-self._held)
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()

    def _hold(self, more: int) -> bool:
        self._held += more
        return self._carrier.hold(more)

    @staticmethod
    def _wake(waiting: asyncio.Future[None] | None) -> None:
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def _run(self) -> None:
        status, text = 0, ""
        try:
            await self._serve()
        except _CallError as error:
            status, text = error.status, error.text
        except asyncio.CancelledError:
            self._carrier.cancelled(self._stream)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this call's
            log.error("a call failed: %s", whereabouts(error))
            status, text = UNKNOWN, type(error).__name__
        self._carrier.finish(self._stream, status, text)

    async def _serve(self) -> None:
        method, request = self._method, None
        if not method.streams_in and (request := await self.read()) is grpc.aio.EOF:
            raise _CallError(INTERNAL, "a call without a message")
        answer = await method.serve(request, self)
        if not method.streams_out:
            await self.write(answer)
