"""The gRPC server on the event loop: gRPC's own client is served, and no peer harms another."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import hpack
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvatlas.scorer.api import http2
from kvatlas.scorer.api.http2_server import Http2Server

_WAIT = 90.0
_MOST = 4_000_000
_REQUEST = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test.Echo/Echo"),
    (":authority", "picker"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Echo:
    """Sends back what it gets; says who was cut off."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.cut = asyncio.Event()
        self.go = asyncio.Event()

    async def echo(self, _requests: Any, call: Any) -> None:
        self.begun.set()
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if message == b"wait":
                    await self.go.wait()
                if message == b"fail":
                    raise ValueError("a prompt that nobody may read")
                await call.write(message)
        except asyncio.CancelledError:
            self.cut.set()
            raise


def same(data: bytes) -> bytes:
    return data


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(echo: Echo) -> AsyncIterator[Http2Server]:
    made = Http2Server(_MOST)
    handler = grpc.stream_stream_rpc_method_handler(echo.echo, request_deserializer=same, response_serializer=same)
    made.add_registered_method_handlers("test.Echo", {"Echo": handler})
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, made)
    await servicer.set("echo", health_pb2.HealthCheckResponse.SERVING)
    made.servicer = servicer  # type: ignore[attr-defined]
    made.port = await made.listen("127.0.0.1:0")  # type: ignore[attr-defined]
    yield made
    await made.stop(0.0)


@pytest.fixture
async def channel(server: Http2Server) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as made:  # type: ignore[attr-defined]
        yield made


def call_of(channel: grpc.aio.Channel, method: str = "/test.Echo/Echo") -> Any:
    return channel.stream_stream(method, request_serializer=same, response_deserializer=same)(timeout=_WAIT)


async def served(channel: grpc.aio.Channel, messages: list[bytes]) -> list[bytes]:
    """Send messages and return what comes back, to the end."""
    call = call_of(channel)

    async def send() -> None:
        for message in messages:
            await call.write(message)
        await call.done_writing()

    sending = asyncio.create_task(send())
    found = [message async for message in call]
    await sending
    assert await call.code() == grpc.StatusCode.OK
    return found


# --- gRPC's own client ------------------------------------------------------------------------------------------------


async def test_many_calls_at_once_get_their_own_messages_of_every_size(channel: grpc.aio.Channel) -> None:
    rng = random.Random(5)
    calls = [[rng.randbytes(rng.choice((0, 1, 100, 16_379, 16_380, 70_000))) for _ in range(6)] for _ in range(40)]
    assert await asyncio.gather(*(served(channel, messages) for messages in calls)) == calls


async def test_large_messages_go_both_ways_again_and_again(channel: grpc.aio.Channel) -> None:
    """More in all than any window that was opened at the start."""
    messages = [random.Random(number).randbytes(_MOST) for number in range(12)]
    assert await served(channel, messages) == messages


async def test_a_message_past_the_limit_ends_its_call_alone(channel: grpc.aio.Channel) -> None:
    call, other = call_of(channel), call_of(channel)
    await other.write(b"before")
    assert await other.read() == b"before"
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await call.write(bytes(_MOST + 1))
    assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(_MOST) in await call.details()
    await other.write(b"after")
    assert await other.read() == b"after"
    other.cancel()


async def test_a_handler_that_fails_ends_its_call_and_tells_nothing_of_the_message(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    call = call_of(channel)
    await call.write(b"fail")
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call.read()
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.UNKNOWN, "ValueError")
    assert "a call failed: ValueError < test_http2_server.py:" in caplog.text
    assert "nobody may read" not in caplog.text


async def test_a_method_that_nobody_serves_is_unimplemented(channel: grpc.aio.Channel) -> None:
    for method in ("/test.Echo/Other", "/grpc.health.v1.Health/List", "/"):
        call = call_of(channel, method)
        assert await call.code() == grpc.StatusCode.UNIMPLEMENTED
    assert await served(channel, [b"still"]) == [b"still"]


async def test_health_is_told_once_and_on_change(server: Http2Server, channel: grpc.aio.Channel) -> None:
    stub, status = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckResponse
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="echo"), timeout=_WAIT)
    assert answer.status == status.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=_WAIT)
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="echo"), timeout=_WAIT)
    assert (await watch.read()).status == status.SERVING
    await server.servicer.set("echo", status.NOT_SERVING)  # type: ignore[attr-defined]
    assert (await watch.read()).status == status.NOT_SERVING
    watch.cancel()


async def test_a_client_that_leaves_ends_its_handler(channel: grpc.aio.Channel, echo: Echo) -> None:
    call = call_of(channel)
    await call.write(b"wait")
    await asyncio.wait_for(echo.begun.wait(), _WAIT)
    call.cancel()
    await asyncio.wait_for(echo.cut.wait(), _WAIT)


async def test_a_stop_lets_calls_end_and_takes_no_more(
    server: Http2Server, channel: grpc.aio.Channel, echo: Echo
) -> None:
    call = call_of(channel)
    await call.write(b"wait")
    await asyncio.wait_for(echo.begun.wait(), _WAIT)
    stopping = asyncio.create_task(server.stop(_WAIT))
    refused = call_of(channel)
    assert await refused.code() == grpc.StatusCode.UNAVAILABLE
    echo.go.set()
    assert await call.read() == b"wait"
    await call.done_writing()
    assert await call.code() == grpc.StatusCode.OK
    await asyncio.wait_for(stopping, _WAIT)
    assert not server.connections
    assert server.held == 0


async def test_a_stop_ends_calls_that_do_not_end_and_peers_that_do_not_read(server: Http2Server, echo: Echo) -> None:
    waits, unread = await Peer.to(server), await Peer.to(server)
    waits.send(HELLO, request(), http2.frame(http2.DATA, 0, 1, message(b"wait")))
    await asyncio.wait_for(echo.begun.wait(), _WAIT)
    unread.writer.transport.pause_reading()  # type: ignore[attr-defined]
    unread.send(HELLO, http2.numbered(http2.WINDOW_UPDATE, 0, 100_000_000))
    unread.send(http2.settings({http2.INITIAL_WINDOW: 100_000_000}), request())
    whole = message(bytes(_MOST))
    for _ in range(10):
        for at in range(0, len(whole), 16_384):
            unread.send(http2.frame(http2.DATA, 0, 1, whole[at : at + 16_384]))

    async def stuck() -> None:
        while not any(one.stuck for one in server.connections):
            await asyncio.sleep(0.01)

    await asyncio.wait_for(stuck(), _WAIT)
    await asyncio.wait_for(server.stop(0.0), _WAIT)
    assert echo.cut.is_set()
    assert not server.connections
    assert server.held == 0


# --- peers by hand ----------------------------------------------------------------------------------------------------


class Peer:
    """A client that sends whatever bytes it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, server: Http2Server) -> Peer:
        return cls(*await asyncio.open_connection("127.0.0.1", server.port))  # type: ignore[attr-defined]

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def frame(self, *kinds: int) -> tuple[int, int, int, bytes]:
        """Return type, flags, stream and payload of the next frame of some kind."""
        while True:
            head = await asyncio.wait_for(self.reader.readexactly(http2.FRAME_BYTES), _WAIT)
            length, kind, flags, stream = http2.read_head(head, 0)
            payload = await asyncio.wait_for(self.reader.readexactly(length), _WAIT)
            if kind in kinds:
                return kind, flags, stream, payload

    async def closed(self) -> int:
        """Wait until the server closes; returns the code that it gave, -1 for none."""
        code = -1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                code = int.from_bytes((await self.frame(http2.GOAWAY))[3][4:8], "big")
        self.writer.close()
        return code


HELLO = http2.PREFACE + http2.settings({})


def request(stream: int = 1, *, flags: int = http2.END_HEADERS) -> bytes:
    """A call of the echo; each block stands alone."""
    block = b"".join(
        bytes((0, len(name))) + name.encode() + bytes((len(value),)) + value.encode() for name, value in _REQUEST
    )
    return http2.frame(http2.HEADERS, flags, stream, block)


def message(data: bytes) -> bytes:
    return b"\x00" + len(data).to_bytes(4, "big") + data


async def test_a_call_in_single_bytes_is_a_call(server: Http2Server) -> None:
    peer = await Peer.to(server)
    data = HELLO + request() + http2.frame(http2.DATA, http2.END_STREAM, 1, message(b"slow"))
    for at in range(len(data)):
        peer.send(data[at : at + 1])
        await peer.writer.drain()
    assert (await peer.frame(http2.DATA))[3] == message(b"slow")
    _, flags, _, block = await peer.frame(http2.HEADERS)
    assert flags & http2.END_STREAM
    assert hpack.Decoder().decode(block) == [("grpc-status", "0")]
    peer.writer.close()


async def test_padding_priorities_and_what_is_not_known_do_not_matter(server: Http2Server) -> None:
    peer = await Peer.to(server)
    block = request()[http2.FRAME_BYTES :]
    padded = bytes((3,)) + b"\x00\x00\x00\x00\x10" + block[:20] + b"\x00" * 3
    flags = http2.PADDED | http2.HAS_PRIORITY
    peer.send(
        HELLO,
        http2.frame(0x77, 0, 0, b"later"),
        http2.frame(http2.HEADERS, flags, 1, padded),
        http2.frame(http2.CONTINUATION, 0, 1, block[20:30]),
        http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, block[30:]),
        http2.frame(2, 0, 1, b"\x00\x00\x00\x00\x10"),
        http2.frame(http2.PING, 0, 0, b"12345678"),
        http2.frame(http2.DATA, http2.PADDED | http2.END_STREAM, 1, b"\x02" + message(b"padded") + b"\x00\x00"),
    )
    assert (await peer.frame(http2.PING))[3] == b"12345678"
    assert (await peer.frame(http2.DATA))[3] == message(b"padded")
    peer.writer.close()


async def test_answers_wait_for_the_windows_of_the_peer(server: Http2Server) -> None:
    peer = await Peer.to(server)
    sent = message(random.Random(1).randbytes(70_000))
    peer.send(http2.PREFACE, http2.settings({http2.INITIAL_WINDOW: 10}), request())
    for at in range(0, len(sent), 16_384):
        peer.send(http2.frame(http2.DATA, 0, 1, sent[at : at + 16_384]))
    found = (await peer.frame(http2.DATA))[3]
    assert found == sent[:10]
    peer.send(http2.settings({http2.INITIAL_WINDOW: 25}))
    found += (await peer.frame(http2.DATA))[3]
    assert found == sent[:25]
    peer.send(http2.numbered(http2.WINDOW_UPDATE, 1, 1_000_000))
    while len(found) < http2.WINDOW_BYTES:  # of the connection
        found += (await peer.frame(http2.DATA))[3]
    assert len(found) == http2.WINDOW_BYTES
    peer.send(http2.numbered(http2.WINDOW_UPDATE, 0, 1_000_000))
    while len(found) < len(sent):
        found += (await peer.frame(http2.DATA))[3]
    assert found == sent
    peer.writer.close()


async def test_a_peer_that_is_gone_ends_its_calls(server: Http2Server, echo: Echo) -> None:
    peer = await Peer.to(server)
    peer.send(HELLO, request(), http2.frame(http2.DATA, 0, 1, message(b"wait")))
    await asyncio.wait_for(echo.begun.wait(), _WAIT)
    peer.writer.transport.abort()
    await asyncio.wait_for(echo.cut.wait(), _WAIT)


async def test_a_reset_ends_its_call_and_a_late_piece_is_let_go(server: Http2Server, echo: Echo) -> None:
    peer = await Peer.to(server)
    peer.send(HELLO, request(), http2.frame(http2.DATA, 0, 1, message(b"wait")))
    await asyncio.wait_for(echo.begun.wait(), _WAIT)
    peer.send(http2.numbered(http2.RST_STREAM, 1, http2.CANCEL), http2.frame(http2.DATA, 0, 1, b"late"))
    peer.send(request(3), http2.frame(http2.DATA, 0, 3, message(b"next")))
    await asyncio.wait_for(echo.cut.wait(), _WAIT)
    assert await peer.frame(http2.DATA) == (http2.DATA, 0, 3, message(b"next"))
    assert server.held == 0
    peer.writer.close()


async def alive(channel: grpc.aio.Channel) -> None:
    assert await served(channel, [b"alive"]) == [b"alive"]


_WRONG: dict[str, tuple[Callable[[], bytes], int]] = {
    "no HTTP/2": (lambda: b"GET / HTTP/1.1\r\nhost: picker\r\n\r\n", http2.PROTOCOL_ERROR),
    "large frame": (lambda: HELLO + http2.head(16_385, http2.DATA, 0, 1), http2.FRAME_SIZE_ERROR),
    "data of no stream": (lambda: HELLO + http2.frame(http2.DATA, 0, 1, b"x"), http2.PROTOCOL_ERROR),
    "even stream": (lambda: HELLO + request(2), http2.PROTOCOL_ERROR),
    "padding": (lambda: HELLO + http2.frame(http2.HEADERS, http2.PADDED, 1, b"\xffx"), http2.PROTOCOL_ERROR),
    "headers cut": (lambda: HELLO + request(flags=0) + HELLO[24:], http2.PROTOCOL_ERROR),
    "headers of no call": (lambda: HELLO + http2.frame(http2.CONTINUATION, 4, 1, b"x"), http2.PROTOCOL_ERROR),
    "headers without end": (
        lambda: HELLO + request(flags=0) + http2.frame(http2.CONTINUATION, 0, 1, bytes(16_384)) * 5,
        http2.ENHANCE_YOUR_CALM,
    ),
    "headers that are none": (lambda: HELLO + http2.frame(http2.HEADERS, 4, 1, b"\xff" * 30), http2.COMPRESSION_ERROR),
    "push": (lambda: HELLO + http2.frame(http2.PUSH_PROMISE, 4, 1, bytes(4)), http2.PROTOCOL_ERROR),
    "short ping": (lambda: HELLO + http2.frame(http2.PING, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "settings": (lambda: HELLO + http2.frame(http2.SETTINGS, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "frames of nothing": (lambda: HELLO + http2.settings({http2.MAX_FRAME: 1}), http2.PROTOCOL_ERROR),
    "window": (
        lambda: HELLO + http2.numbered(http2.WINDOW_UPDATE, 0, http2.LARGEST_WINDOW),
        http2.FLOW_CONTROL_ERROR,
    ),
    "pings without end": (lambda: HELLO + http2.frame(http2.PING, 0, 0, bytes(8)) * 40_000, http2.ENHANCE_YOUR_CALM),
    "resets without end": (
        lambda: (
            HELLO
            + b"".join(request(n) + http2.numbered(http2.RST_STREAM, n, http2.CANCEL) for n in range(1, 40_000, 2))
        ),
        http2.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("name", _WRONG)
async def test_a_peer_that_breaks_the_protocol_is_told_why_and_harms_nobody(
    server: Http2Server, channel: grpc.aio.Channel, name: str
) -> None:
    made, code = _WRONG[name]
    data = made()
    await alive(channel)
    peer = await Peer.to(server)
    peer.send(data)
    # What is on its way when a connection is closed may take the last word with it.
    assert await peer.closed() in ((code,) if len(data) < 1_000 else (code, -1))
    await alive(channel)
    assert server.held == 0


async def test_whatever_peers_send_others_are_served(
    server: Http2Server, channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    """Frames at random, most of them of calls that live; each connection is closed or goes on, without a fault here."""
    rng = random.Random(11)

    def anything() -> bytes:
        kind = rng.choice((0, 0, 0, 1, 1, 3, 4, 6, 8, 9, 5, 7, 42))
        size = rng.choice((0, 1, 4, 5, 6, 8, 20))
        return http2.frame(kind, rng.choice((0, 1, 4, 5, 8, 32, 255)), rng.choice((0, 1, 1, 3, 5)), rng.randbytes(size))

    for _ in range(150):
        peer = await Peer.to(server)
        peer.send(HELLO, request(1), request(3), *(anything() for _ in range(rng.randrange(12))))
        peer.writer.write_eof()
        await peer.closed()
    await alive(channel)

    async def nothing_held() -> None:
        while server.held or len(server.connections) > 1:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(nothing_held(), _WAIT)
    assert not [
        record for record in caplog.records if record.levelname == "ERROR" and "call failed" not in record.message
    ]


async def test_calls_past_what_may_be_held_end_and_the_others_go_on(
    server: Http2Server, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that never becomes whole holds what it has sent."""
    monkeypatch.setattr("kvatlas.scorer.api.http2_server._MOST_HELD_BYTES", 100_000)
    peer = await Peer.to(server)
    start = b"\x00" + _MOST.to_bytes(4, "big")
    peer.send(HELLO, request(1), http2.frame(http2.DATA, 0, 1, start))
    for _ in range(10):
        peer.send(http2.frame(http2.DATA, 0, 1, bytes(16_384)))
    _, flags, _, block = await peer.frame(http2.HEADERS)
    assert flags & http2.END_STREAM
    assert ("grpc-status", "8") in hpack.Decoder().decode(block)
    await alive(channel)
    assert server.held == 0
    peer.writer.close()
