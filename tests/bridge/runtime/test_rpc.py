"""gRPC servers under callers that speak HTTP/2 badly: whatever one sends, others are answered."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from kvatlas.bridge.errors import TaskEndedError
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.bridge.runtime.rpc import Gate, rpc_server, serving
from kvatlas.bridge.runtime.tasks import Background

METHOD: Final = "/test.Echo/Say"
DATA, HEADERS, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)


def coded(text: bytes) -> bytes:
    """A string of HPACK: its length in seven bits and groups of seven more, then its bytes."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, length = len(text) - 127, bytearray([127])
    while rest >= 128:
        length.append(rest % 128 | 128)
        rest //= 128
    return bytes([*length, rest]) + text


def call(message: bytes = bytes(5), **changed: bytes | None) -> bytes:
    """A connection's beginning with a call; headers may have any value, or be left out."""
    fields: dict[str, bytes | None] = {":method": b"POST", ":scheme": b"http", ":path": METHOD.encode()}
    fields |= {":authority": b"x", "te": b"trailers", "content-type": b"application/grpc"} | changed
    block = b"".join(
        b"\0" + coded(name.encode("latin1")) + coded(value) for name, value in fields.items() if value is not None
    )
    parts = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
    headers = b"".join(
        frame(CONTINUATION if at else HEADERS, END_HEADERS * (at == len(parts) - 1), 1, part)
        for at, part in enumerate(parts)
    )
    return PREFACE + headers + frame(DATA, END_STREAM, 1, message)


def path(value: bytes | None) -> bytes:
    """A call of a method that may have any name."""
    return call(**{":path": value})


BAD: Final[dict[str, bytes]] = {
    "a name that is no UTF-8": path(b"/test.Echo/\xff"),
    "a name of half a pair": path(b"/test.Echo/\xed\xa0\x80"),
    "an empty name": path(b""),
    "no name": path(None),
    "a name without slash": path(b"Say"),
    "nothing but slashes": path(b"///"),
    "a name with NUL": path(b"/test.Echo/Say\0"),
    "a long name": path(b"/" + b"n" * 7_000),
    "a huge name": path(b"/" + b"\xff" * 1_000_000),
    "a name with a query": path(METHOD.encode() + b"?a=\xff"),
    "a host that is no UTF-8": call(**{":authority": b"\xff"}),
    "no host": call(**{":authority": None}),
    "an odd HTTP method": call(**{":method": b"\xff"}),
    "an odd scheme": call(**{":scheme": b"\xff"}),
    "a deadline that is none": call(**{"grpc-timeout": b"\xff"}),
    "a deadline of 5,000 digits": call(**{"grpc-timeout": b"9" * 5_000 + b"H"}),
    "a deadline that is over": call(**{"grpc-timeout": b"0n"}),
    "an unknown encoding": call(b"\1\0\0\0\1x", **{"grpc-encoding": b"zz\xff"}),
    "what is not compressed": call(b"\1\0\0\0\4xxxx", **{"grpc-encoding": b"gzip"}),
    "another content": call(**{"content-type": b"\xff"}),
    "metadata that is no UTF-8": call(**{"x-a": b"\xff", "authorization": b"\xff", "user-agent": b"\xff\0"}),
    "a name of metadata that is no UTF-8": call(**{"x\xff": b"a", "x\0": b"a"}),
    "metadata that is no base64": call(**{"x-bin": b"!", "grpc-trace-bin": b"\xff", "grpc-tags-bin": b"!"}),
    "a status": call(**{"grpc-status": b"\xff", "grpc-previous-rpc-attempts": b"\xff"}),
    "a message of 4 GB": call(b"\0\xff\xff\xff\xffx"),
    "half a length": call(b"\0\0"),
    "an unknown flag": call(b"\7\0\0\0\1x"),
    "HTTP/1": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(1_000),
    "no frames": PREFACE + b"\xff" * 2_000,
    "no HPACK": PREFACE + frame(HEADERS, END_HEADERS, 1, b"\xff" * 100),
    "a call on stream 0": PREFACE + frame(HEADERS, END_HEADERS, 0, b"\x83"),
    "a call on an even stream": PREFACE + frame(HEADERS, END_HEADERS, 2, b"\x83"),
    "a reset at once": call() + frame(RESET, 0, 1, b"\0\0\0\x08"),
    "a reset of nothing": PREFACE + frame(RESET, 0, 7, b"\0\0\0\x08"),
    "an end at once": call() + frame(GOAWAY, 0, 0, bytes(8)),
    "a promise": PREFACE + frame(PUSH, END_HEADERS, 1, bytes(4)),
    "broken settings": PREFACE + frame(SETTINGS, 0, 0, bytes(5)),
    "many settings": PREFACE + frame(SETTINGS, 0, 0) * 1_000,
    "no window": PREFACE + frame(WINDOW, 0, 0, bytes(4)),
    "many pings": PREFACE + frame(PING, 0, 0, bytes(8)) * 1_000,
    "more of no headers": PREFACE + frame(CONTINUATION, 0, 1),
    "an unknown frame": PREFACE + frame(200, 255, 77, b"abc"),
}


async def _say(request: bytes, _context: Any) -> bytes:
    return request


@pytest.fixture
async def server() -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    server = rpc_server(1_000_000)
    server.add_registered_method_handlers("test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(_say)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield server, port
    await server.stop(0)


async def _send(port: int, data: bytes) -> None:
    """Send bytes on a connection of their own and wait until the server is done with them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with_end = data + frame(PING, 0, 0, b"the end!")
    try:
        writer.write(with_end)
        await writer.drain()
        got = b""
        # An answer to the ping comes after what was before it; a broken connection is closed instead.
        while b"the end!" not in got and (part := await asyncio.wait_for(reader.read(65_536), 90)):
            got += part
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize("what", BAD)
async def test_whatever_a_caller_sends_others_are_answered(server: tuple[grpc.aio.Server, int], what: str) -> None:
    """No frame, header or name ends the server or a call beside it."""
    running, port = server
    background = Background()
    task = background.start(serving(running, "of a test"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        say: Any = channel.unary_unary(METHOD)
        for _ in range(2):
            await _send(port, BAD[what])
            assert await say(b"hello", timeout=90, wait_for_ready=True) == b"hello"
    assert background.failure is None
    assert not task.done()
    await background.stop()


async def test_what_nobody_serves_is_unimplemented(server: tuple[grpc.aio.Server, int]) -> None:
    """Callers of a newer version learn that a method is not there, as ever; the server stops in time after that."""
    running, port = server
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name in ("/test.Echo/Sing", "/other/Say", "/test.Echo/\N{SNOWMAN}"):
            method: Any = channel.unary_unary(name)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await method(b"", timeout=90)
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    await asyncio.wait_for(running.stop(None), 90)
    await asyncio.wait_for(serving(running, "of a test"), 90)


async def test_a_grpc_server_whose_loop_has_died_ends_the_service() -> None:
    """What ends the loop of gRPC's server is told nobody but who asks: nobody could call it any more."""

    class Dead:
        async def wait_for_termination(self, timeout: float | None = None) -> bool:
            raise OSError(f"after {timeout} s")

    background = Background()
    dead: Any = Dead()
    background.start(serving(dead, "of a test"))
    with pytest.raises(TaskEndedError, match="gRPC server of a test has ended: OSError"):
        await asyncio.wait_for(background.until(asyncio.Event()), 90)


async def test_a_grpc_server_that_is_stopped_fails_nobody() -> None:
    """The end of a server as it is told to is no error."""
    server = rpc_server(1_000)
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    background = Background()
    task = background.start(serving(server, "of a test"))
    await asyncio.sleep(0)
    background.stopping()
    await server.stop(0)
    await asyncio.wait_for(task, 90)
    assert background.failure is None


def test_every_server_is_made_here() -> None:
    """A server of plain gRPC is ended by one call."""
    root = Path(__file__).parents[3]
    makes = {
        str(path.relative_to(root))
        for package in ("bridge", "streams", "scorer", "connector", "deploy")
        for path in (root / package).rglob("*.py")
        if re.search(r"\b(aio|grpc)\.server\(|add_generic_rpc_handlers\(\(", path.read_text("utf-8"))
        and "_pb2" not in path.name
    }
    assert makes == {"bridge/runtime/rpc.py"}


async def test_under_overload_a_call_is_refused_unread_with_a_hint_and_health_is_answered() -> None:
    """A refusal needs no message, says when to ask again as gRPC's clients read it, and passes with the overload."""
    admission = Admission(60, "calls", clock=lambda: 0.0)  # nobody waits too long
    refused: list[str] = []

    async def say(request: bytes, _context: Any) -> bytes:
        async with admission.turn():
            return request

    server = rpc_server(1_000_000, gate=Gate(admission, refused.append))
    server.add_registered_method_handlers("test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(say)})
    server.add_registered_method_handlers("grpc.Health", {"Check": grpc.unary_unary_rpc_method_handler(_say)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        say_it: Any = channel.unary_unary(METHOD)
        async with contextlib.AsyncExitStack() as full:
            for _ in range(60):
                await full.enter_async_context(admission.turn())
            unsent: Any = channel.stream_unary(METHOD)()  # its message never comes
            for call in (unsent, *(say_it(b"x" * 500_000, timeout=90) for _ in range(50))):
                with pytest.raises(grpc.aio.AioRpcError, match="60 calls; try again") as error:
                    await call
                assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert dict(error.value.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "50"
            check: Any = channel.unary_unary("/grpc.Health/Check")
            assert await check(b"well?", timeout=90) == b"well?"
        assert refused == [METHOD] * 51
        assert await asyncio.gather(*(say_it(b"hello", timeout=90) for _ in range(50))) == [b"hello"] * 50
    await asyncio.wait_for(server.stop(None), 90)
    await asyncio.wait_for(serving(server, "of a test"), 90)


async def test_calls_whose_message_does_not_come_hold_nobody_up() -> None:
    """As many callers as may begin at a time send nothing more: by and by they do not count; others are answered."""
    now = 0.0
    admission = Admission(1_000, "calls", clock=lambda: now)

    async def say(request: bytes, _context: Any) -> bytes:
        async with admission.turn():
            return request

    server = rpc_server(1_000_000, gate=Gate(admission, lambda _method: None))
    server.add_registered_method_handlers("test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(say)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        silent: list[Any] = [channel.stream_unary(METHOD)() for _ in range(8)]
        say_it: Any = channel.unary_unary(METHOD)
        first = asyncio.create_task(asyncio.wait_for(say_it(b"hello"), 90))
        while not first.done():
            now += 0.003
            await asyncio.sleep(0.01)
        assert first.result() == b"hello"
        for call in silent:
            call.cancel()
    await asyncio.wait_for(server.stop(None), 90)


@contextlib.asynccontextmanager
async def _echo(gate: Gate | None = None, read: Any = None) -> AsyncIterator[int]:
    """A server of one method; yields its port."""

    async def say(request: Any, _context: Any) -> bytes:
        if gate is not None:
            async with gate.admission.turn():
                return bytes(request)
        return bytes(request)

    server = rpc_server(1_000_000, gate=gate)
    handler = grpc.unary_unary_rpc_method_handler(say, request_deserializer=read)
    server.add_registered_method_handlers("test.Echo", {"Say": handler})
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield port
    await asyncio.wait_for(server.stop(0), 90)


def _silent(caplog: pytest.LogCaptureFixture) -> None:
    """GRPC has logged no error; its poller, which is all tests', tells asyncio's log of loops that were closed."""
    assert not [one for one in caplog.records if one.levelname == "ERROR" and one.name != "asyncio"]


async def test_calls_without_a_message_end_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is told why; others are answered meanwhile and after."""
    monkeypatch.setattr("kvatlas.bridge.runtime.rpc.MESSAGE_SECONDS", 5.0)
    async with _echo() as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        silent: list[Any] = [channel.stream_unary(METHOD)() for _ in range(100)]
        say: Any = channel.unary_unary(METHOD)
        assert await say(b"hello", timeout=90) == b"hello"
        for call in silent:
            with pytest.raises(grpc.aio.AioRpcError, match="no message came") as error:
                await asyncio.wait_for(call, 90)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await say(b"hello", timeout=90) == b"hello"
    _silent(caplog)


async def test_of_many_calls_without_a_message_the_oldest_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, so many are waited for."""
    monkeypatch.setattr("kvatlas.bridge.runtime.rpc._MOST_UNREAD", 20)
    monkeypatch.setattr("kvatlas.bridge.runtime.rpc.MESSAGE_SECONDS", 600.0)
    async with _echo() as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        silent: list[Any] = [channel.stream_unary(METHOD)() for _ in range(200)]
        say: Any = channel.unary_unary(METHOD)
        async with asyncio.timeout(90):
            while sum(call.done() for call in silent) < 180:
                await asyncio.sleep(0.01)
        assert await say(b"hello", timeout=90) == b"hello"
        for call in silent:
            call.cancel()


async def test_of_many_health_checks_that_go_on_the_oldest_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Names that nobody serves can be watched too: their number is bounded."""
    monkeypatch.setattr("kvatlas.bridge.runtime.rpc._MOST_WATCHES", 5)
    async with _echo() as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watching = [watch(b"\x0a\x01" + bytes([65 + number])) for number in range(25)]

        async def ends(call: Any) -> None:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                async for _ in call:
                    pass
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE

        reading = {asyncio.create_task(ends(call)) for call in watching}
        left = reading
        async with asyncio.timeout(90):
            while len(left) > 5:
                _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=90) is not None
    _silent(caplog)


async def test_bytes_that_cannot_be_read_cost_others_no_turn(caplog: pytest.LogCaptureFixture) -> None:
    """INVALID_ARGUMENT without a traceback; and where none of them ever is in time, the next ones begin at once."""
    admission = Admission(1_000, "calls", clock=lambda: 0.0)  # nobody is ever late, nor slow

    def read(data: bytes) -> bytes:
        if data == b"bad":
            raise ValueError("a reason")
        return data

    gate = Gate(admission, lambda _method: None)
    async with _echo(gate, read) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        say: Any = channel.unary_unary(METHOD)
        for _ in range(50):
            with pytest.raises(grpc.aio.AioRpcError, match="a reason") as error:
                await asyncio.wait_for(say(b"bad"), 90)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await asyncio.wait_for(say(b"good"), 90) == b"good"
    _silent(caplog)


class _Message:
    """What a call brought, whose end is noticed."""


async def test_what_a_refused_call_brought_is_not_kept() -> None:
    """An error leads back to all that its call has held, in a circle, so that it would stay until a rare clean-up."""
    kept: weakref.WeakSet[_Message] = weakref.WeakSet()

    def read(_data: bytes) -> _Message:
        kept.add(message := _Message())
        return message

    async def refuse(_request: _Message, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "nothing")

    server = rpc_server(1_000)
    handler = grpc.unary_unary_rpc_method_handler(refuse, request_deserializer=read)
    server.add_registered_method_handlers("test.Echo", {"Say": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        say: Any = channel.unary_unary(METHOD)
        gc.disable()
        try:
            for _ in range(20):
                with pytest.raises(grpc.aio.AioRpcError, match="nothing"):
                    await asyncio.wait_for(say(b""), 90)
            assert len(kept) <= 1
        finally:
            gc.enable()
    await asyncio.wait_for(server.stop(0), 90)


async def test_connections_that_say_nothing_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never speaks HTTP/2 is closed; so many are open at a time."""
    monkeypatch.setattr("kvatlas.bridge.runtime.rpc._HANDSHAKE_SECONDS", 3.0)
    monkeypatch.setattr("kvatlas.bridge.runtime.rpc._MOST_CONNECTIONS", 20)
    async with _echo() as port:
        links = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        for reader, writer in links:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 90)
            writer.close()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            say: Any = channel.unary_unary(METHOD)
            assert await say(b"hello", timeout=90, wait_for_ready=True) == b"hello"


async def test_a_call_that_is_given_up_ends_its_handler() -> None:
    """A caller's cancellation reaches the handler, as with gRPC's own loop."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait(_request: bytes, _context: Any) -> bytes:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return b""

    server = rpc_server(1_000)
    server.add_registered_method_handlers("test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(wait)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        say: Any = channel.unary_unary(METHOD)
        call = say(b"hello", timeout=90)
        await asyncio.wait_for(begun.wait(), 90)
        call.cancel()
        await asyncio.wait_for(ended.wait(), 90)
    await asyncio.wait_for(server.stop(None), 90)


BROKEN_SERVER = """
import asyncio
import grpc
from kvatlas.bridge.errors import TaskEndedError
from kvatlas.bridge.runtime.rpc import rpc_server, serving

async def answer(request, context):
    return b""

async def main():
    server = rpc_server(1 << 20)
    methods = {f"M{number}": grpc.unary_unary_rpc_method_handler(answer) for number in range(12)}
    server.add_registered_method_handlers("a.Service", methods)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.unary_unary("/a.Service/M1")(b"")
        (loop,) = (t for t in asyncio.all_tasks() if t.get_coro().__qualname__ == "AioServer._server_main_loop")
        loop._fut_waiter.set_exception(RuntimeError("broken"))
        try:
            await serving(server, "of a test")
        except TaskEndedError:
            print("ended")

asyncio.run(main())
"""


def test_a_process_whose_server_has_broken_ends() -> None:
    """Calls that gRPC was asked for, and that never come, are no reason to crash or to hang on the way out."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", BROKEN_SERVER], capture_output=True, text=True, timeout=90, check=False
        )
        assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr[-3000:]
