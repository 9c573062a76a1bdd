"""gRPC server on the event loop itself, over HTTP/2: for a picker, whose every request waits for each of its turns.

gRPC's own server lives in threads of its own and hands every step of a call over to the event loop, six and more for a
request of a gateway. Here what arrives together is read together, and an answer is sent where it is made.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc

from kvatlas.scorer.api import http2
from kvatlas.scorer.api.http2 import Bytes, Http2Error, MessageError
from kvatlas.scorer.api.http2_calls import Call, Method, method_of

log = logging.getLogger(__name__)

#: Streams of one connection: each response that is observed has one as long as it lasts. One more is refused.
_MOST_STREAMS: Final = 16_384
#: Bytes that nobody has read, of all connections: a call that sends more ends.
_MOST_HELD_BYTES: Final = 512 * 1024 * 1024
#: What a connection may send before it is told that more is welcome.
_WINDOW_BYTES: Final = 64 * 1024 * 1024
#: Frames beyond one a message that do nothing for a call, such as pings and resets: so many at once are a flood, and
#: so many a second are forgotten.
_MOST_IDLE_FRAMES: Final = 10_000
_IDLE_FRAMES_A_SECOND: Final = 100
#: Acknowledgements that wait for a peer that sends and does not read.
_MOST_UNREAD_BYTES: Final = 64 * 1024 * 1024
#: A connection says what it speaks within this time, or is closed.
_PREFACE_SECONDS: Final = 30.0
#: What was sent may take so long to leave when the server stops.
_CLOSE_SECONDS: Final = 1.0

_UNIMPLEMENTED: Final = grpc.StatusCode.UNIMPLEMENTED.value[0]
_EXHAUSTED: Final = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


class _Connection(asyncio.Protocol):
    """One HTTP/2 connection."""

    def __init__(self, server: Http2Server, loop: asyncio.AbstractEventLoop) -> None:
        self.calls: dict[int, Call] = {}
        self.window = http2.WINDOW_BYTES
        self.payload = http2.PAYLOAD_BYTES
        self.most_bytes = server.most_bytes
        self.lost: asyncio.Future[None] = loop.create_future()
        self._server = server
        self._loop = loop
        self._transport: Any = None
        self._headers = http2.HeaderBlocks()
        self._rest = b""
        self._begun = False
        self._block: tuple[int, int, bytes] | None = None  # flags, stream and headers that go on
        self._initial = http2.WINDOW_BYTES  # of a new stream, as the peer says
        self._last = 0  # stream that the peer has begun
        self._idle = 0
        self._counted = loop.time()  # when idle frames were last forgotten
        self._received = 0  # bytes since the peer was told
        self._paused: asyncio.Future[None] | None = None
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            http2.DATA: self._data,
            http2.HEADERS: self._head,
            http2.RST_STREAM: self._reset,
            http2.SETTINGS: self._settings,
            http2.PUSH_PROMISE: self._push,
            http2.PING: self._ping,
            http2.WINDOW_UPDATE: self._window_update,
            http2.CONTINUATION: self._continuation,
        }

    # --- transport ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say what is taken here."""
        self._transport = transport
        self._server.connections.add(self)
        # A peer that vanished without a word is noticed, if late.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        limits = {
            http2.MAX_STREAMS: _MOST_STREAMS,
            # The largest message fits behind what was read and not yet told.
            http2.INITIAL_WINDOW: 2 * self.most_bytes + http2.WINDOW_BYTES,
            http2.MAX_HEADERS: http2.HEADERS_BYTES,
        }
        more = http2.numbered(http2.WINDOW_UPDATE, 0, _WINDOW_BYTES - http2.WINDOW_BYTES)
        self.send((http2.settings(limits), more))
        self._loop.call_later(_PREFACE_SECONDS, self._late)

    def _late(self) -> None:
        if not self._begun:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """End what the peer has begun."""
        self._server.connections.discard(self)
        if not self.lost.done():
            self.lost.set_result(None)
        self.resume_writing()
        calls, self.calls = self.calls, {}
        for call in calls.values():
            call.end()

    def pause_writing(self) -> None:
        """Let writers wait."""
        self._paused = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let writers go on."""
        paused, self._paused = self._paused, None
        if paused is not None and not paused.done():
            paused.set_result(None)

    @property
    def stuck(self) -> bool:
        """Whether what was sent waits for a peer that does not read."""
        return self._paused is not None

    async def writable(self) -> None:
        """Wait until the peer reads."""
        while (paused := self._paused) is not None:
            await asyncio.shield(paused)

    def send(self, parts: Sequence[Bytes]) -> None:
        """Send, unless the connection has ended."""
        if not self._transport.is_closing():
            self._transport.writelines(parts)

    def hold(self, more: int) -> bool:
        """Count bytes that nobody has read yet; returns whether there is room for them."""
        self._server.held += more
        return self._server.held <= _MOST_HELD_BYTES

    def data_received(self, data: bytes) -> None:
        """Take what has arrived."""
        if (passed := self._loop.time() - self._counted) > 1.0:
            self._idle = max(0, self._idle - int(passed * _IDLE_FRAMES_A_SECOND))
            self._counted += passed
        try:
            self._rest = self._frames(self._rest + data if self._rest else data)
            unread = self._transport.get_write_buffer_size() if self._paused is not None else 0
            if self._idle > _MOST_IDLE_FRAMES or unread > _MOST_UNREAD_BYTES:
                raise Http2Error(http2.ENHANCE_YOUR_CALM, "a flood of frames")
        except Http2Error as error:
            log.debug("a connection is closed: %s", error)
            self.go_away(error.code)
            self._transport.close()
        except Exception as error:  # noqa: BLE001 - what it has sent may be in the error's text
            log.error("a connection is closed: %s", type(error).__name__)
            self._transport.abort()

    def go_away(self, code: int) -> None:
        """Tell the peer that no more is taken, and why."""
        told = self._last.to_bytes(4, "big") + code.to_bytes(4, "big")
        self.send((http2.frame(http2.GOAWAY, 0, 0, told),))

    def close(self, *, at_once: bool) -> None:
        """Close, with what was sent or at once."""
        if at_once:
            self._transport.abort()
        else:
            self._transport.close()

    # --- frames ---------------------------------------------------------------------------------------------------

    def _frames(self, data: bytes) -> bytes:
        """Take whole frames; returns what is left."""
        at, end = self._preface(data), len(data)
        while self._begun and end - at >= http2.FRAME_BYTES:
            length, kind, flags, stream = http2.read_head(data, at)
            begin = at + http2.FRAME_BYTES
            if end < begin + length or self._transport.is_closing():
                break
            at = begin + length
            if self._block is not None and kind != http2.CONTINUATION:
                raise Http2Error(http2.PROTOCOL_ERROR, "headers that do not go on")
            handler = self._handlers.get(kind)
            if handler is not None:
                handler(flags, stream, data[begin:at])
            else:
                self._idle += 1
        if self._received > _WINDOW_BYTES // 4:
            self.send((http2.numbered(http2.WINDOW_UPDATE, 0, self._received),))
            self._received = 0
        return data[at:]

    def _preface(self, data: bytes) -> int:
        """Return where the frames begin."""
        if self._begun:
            return 0
        start = data[: len(http2.PREFACE)]
        if not http2.PREFACE.startswith(start):
            raise Http2Error(http2.PROTOCOL_ERROR, "no HTTP/2")
        self._begun = len(start) == len(http2.PREFACE)
        return len(start) if self._begun else 0

    def _data(self, flags: int, stream: int, payload: bytes) -> None:
        self._received += len(payload)
        if not 0 < stream <= self._last:
            raise Http2Error(http2.PROTOCOL_ERROR, "data of no stream")
        piece = http2.unpadded(payload, flags)
        call = self.calls.get(stream)
        if call is None or call.closed:  # it has ended here, which the peer does not know yet
            self._idle += 1
            return
        try:
            whole = call.feed(piece)
        except MessageError as error:
            self.finish(stream, _EXHAUSTED, str(error))
            return
        self._idle += 1 if not whole and len(piece) < http2.PREFIX_BYTES else -min(whole, self._idle)
        if flags & http2.END_STREAM:
            call.close()
        elif len(piece) < len(payload):
            self.send((http2.numbered(http2.WINDOW_UPDATE, stream, len(payload) - len(piece)),))

    def _head(self, flags: int, stream: int, payload: bytes) -> None:
        block = http2.unpadded(payload, flags, priority=True)
        if flags & http2.END_HEADERS:
            self._request(flags, stream, block)
        else:
            self._block = (flags, stream, block)

    def _continuation(self, flags: int, stream: int, payload: bytes) -> None:
        self._idle += 1
        if self._block is None or self._block[1] != stream:
            raise Http2Error(http2.PROTOCOL_ERROR, "headers go on that have not begun")
        first, _, block = self._block
        block += payload
        if len(block) > http2.HEADERS_BYTES:
            raise Http2Error(http2.ENHANCE_YOUR_CALM, "very large headers")
        self._block = (first, stream, block)
        if flags & http2.END_HEADERS:
            self._block = None
            self._request(first, stream, block)

    def _request(self, flags: int, stream: int, block: bytes) -> None:
        headers = self._headers.of(block)
        ended = bool(flags & http2.END_STREAM)
        if stream <= self._last:  # trailers, or of a call that has ended here
            self._idle += 1
            if ended and (call := self.calls.get(stream)) is not None:
                call.close()
            return
        if not stream & 1:
            raise Http2Error(http2.PROTOCOL_ERROR, "a stream of an even number")
        self._last = stream
        if len(self.calls) >= _MOST_STREAMS or self._server.leaving:
            self._idle += 1
            self.send((http2.numbered(http2.RST_STREAM, stream, http2.REFUSED_STREAM),))
            return
        method = self._server.methods.get(headers.get(b":path", b""))
        if method is None:
            self._idle += 1
            block = http2.ANSWER_HEADERS + http2.trailers(_UNIMPLEMENTED, "no such method")
            flags = http2.END_HEADERS | http2.END_STREAM
            self.send((http2.frame(http2.HEADERS, flags, stream, block),))
            return
        call = self.calls[stream] = Call(self, stream, method, self._initial)
        call.closed = ended
        call.start(self._loop)

    def _reset(self, _flags: int, stream: int, payload: bytes) -> None:
        http2.number_of(payload)
        self._idle += 1
        if (call := self.calls.pop(stream, None)) is not None:
            call.end()

    def _settings(self, flags: int, _stream: int, payload: bytes) -> None:
        self._idle += 1
        if flags & http2.ACK:
            return
        for name, value in http2.read_settings(payload):
            if name == http2.MAX_FRAME:
                self.payload = min(value, 8 * http2.PAYLOAD_BYTES)
            elif name == http2.INITIAL_WINDOW:
                more, self._initial = value - self._initial, value
                for call in self.calls.values():
                    call.window += more
                    call.flush()
        self.send((http2.frame(http2.SETTINGS, http2.ACK, 0),))

    def _push(self, _flags: int, _stream: int, _payload: bytes) -> None:
        raise Http2Error(http2.PROTOCOL_ERROR, "a client that pushes")

    def _ping(self, flags: int, _stream: int, payload: bytes) -> None:
        self._idle += 1
        if len(payload) != 8:
            raise Http2Error(http2.FRAME_SIZE_ERROR, "a ping that is none")
        if not flags & http2.ACK:
            self.send((http2.frame(http2.PING, http2.ACK, 0, payload),))

    def _window_update(self, _flags: int, stream: int, payload: bytes) -> None:
        more = http2.number_of(payload)
        if stream:
            if (call := self.calls.get(stream)) is not None:
                call.window += more
                call.flush()
            return
        self.window += more
        if self.window > http2.LARGEST_WINDOW:
            raise Http2Error(http2.FLOW_CONTROL_ERROR, "a window that is too large")
        for call in self.calls.values():
            call.flush()

    # --- ends of calls --------------------------------------------------------------------------------------------

    def finish(self, stream: int, status: int, text: str) -> None:
        """End a call with a status; one that the peer still sends is cut."""
        call = self.calls.pop(stream, None)
        if call is None:
            return
        block = http2.trailers(status, text)
        if not call.answered:
            block = http2.ANSWER_HEADERS + block
        ends = [http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, block)]
        if not call.closed:
            ends.append(http2.numbered(http2.RST_STREAM, stream, http2.NO_ERROR))
        self.send(ends)
        call.end()

    def cancelled(self, stream: int) -> None:
        """End a call whose handler was cancelled."""
        if (call := self.calls.pop(stream, None)) is not None:
            self.send((http2.numbered(http2.RST_STREAM, stream, http2.CANCEL),))
            call.end()


class Http2Server:
    """Serves methods over HTTP/2, in the clear or with TLS.

    Args:
        most_bytes: larger messages end their call.

    Attributes:
        methods: by path.
        held: bytes that have arrived and that nobody has read.
        connections: open ones.
        leaving: new calls are refused.
    """

    def __init__(self, most_bytes: int) -> None:
        self.methods: dict[bytes, Method] = {}
        self.most_bytes = most_bytes
        self.held = 0
        self.connections: set[_Connection] = set()
        self.leaving = False
        self._server: asyncio.Server | None = None

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Take the handlers of a service, as generated code gives them."""
        for name, handler in handlers.items():
            if (method := method_of(handler)) is not None:
                self.methods[f"/{service}/{name}".encode()] = method

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Do nothing: generated code gives the same handlers by their names."""

    async def listen(self, address: str, tls: ssl.SSLContext | None = None) -> int:
        """Listen on ``host:port``; returns the port.

        Raises:
            OSError: the address cannot be bound.
            ValueError: it is no ``host:port``.
        """
        host, _, port = address.rpartition(":")
        where: dict[str, Any] = {"host": host.strip("[]") or None, "port": int(port)}
        if where["host"] == "::" and socket.has_dualstack_ipv6():  # IPv4 as well
            sock = socket.create_server(("::", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
            where = {"sock": sock}
        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self, loop), ssl=tls, backlog=1024, **where)
        number: int = self._server.sockets[0].getsockname()[1]
        return number

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls, let those under way end for so long, then end them."""
        if self._server is not None:
            self._server.close()
        self.leaving = True
        for connection in self.connections:
            connection.go_away(http2.NO_ERROR)
        tasks = [call.task for connection in self.connections for call in connection.calls.values() if call.task]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_seconds)
        for at_once in (False, True):  # a peer that does not read keeps a connection open
            left = list(self.connections)
            for connection in left:
                connection.close(at_once=at_once)
            if left:
                await asyncio.wait([connection.lost for connection in left], timeout=_CLOSE_SECONDS)
