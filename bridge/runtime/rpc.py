"""gRPC server that no call ends: what is asked by a name that nobody serves is refused without a look at the name.

gRPC's server on asyncio decodes the method's name of every call that is none of its registered methods, in the loop
that takes calls: a name that is no UTF-8 ended that loop, and with it the server, for every caller. So methods are
registered, and the others are taken by a loop of our own, which answers UNIMPLEMENTED whatever the name.

It also takes one call of a method per pass of the event loop, so that under overload most calls end in a queue that
nobody sees. Here many are taken at a time; they wait for their turn before anything is read of them, and those that
there is no time for are refused by their headers alone.

A call whose message does not come, and a connection that says nothing, only hold memory and files: they end after a
while, the oldest first where there are many. Bytes that are no message are the caller's error, not the method's.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import functools
import importlib
import inspect
import math
import resource
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

import grpc.aio

from kvatlas.bridge.errors import OverloadedError, TaskEndedError
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.bridge.runtime.unfinished import Unfinished

#: Has no types.
cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")

#: gRPC tells the error of a server's loop only when a wait for its end has run out: calls in progress hold that up.
_LOOK_SECONDS: Final = 1.0
#: Trailing metadata that gRPC clients with a retry policy obey: milliseconds until they may ask again.
PUSHBACK: Final = "grpc-retry-pushback-ms"
#: Calls of a method that are taken in one pass of the event loop.
_TAKERS: Final = 64
#: A call's message comes within so long after its turn to be read, and so many are waited for.
MESSAGE_SECONDS: Final = 10.0
_MOST_UNREAD: Final = 1_024
#: Health checks that go on; each ends after a day at the latest, and is asked for again by whoever means it.
_MOST_WATCHES: Final = 1_024
_WATCH_SECONDS: Final = 86_400.0
_MOST_STREAMS: Final = 16_384
_HANDSHAKE_SECONDS: Final = 10.0
_IDLE_SECONDS: Final = 300.0
#: A server's connections: so many, or a quarter of the files that the process may open where those are fewer.
_MOST_CONNECTIONS: Final = 4_096

#: The place of the interceptors in what gRPC makes a server of.
_INTERCEPTORS: Final = 3

#: Told in a call's context that its message is there.
_CAME: Final[contextvars.ContextVar[Callable[[], None]]] = contextvars.ContextVar("came")


class Gate(NamedTuple):
    """Where calls wait for their turn before they are read; ``refused`` is told the method of each that is refused."""

    admission: Admission
    refused: Callable[[str], None]


def pushback(error: Exception) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of a refusal: when to ask again, where that is known."""
    if not isinstance(error, OverloadedError):
        return ()
    return ((PUSHBACK, str(math.ceil(error.retry_seconds * 1e3))),)


class _Calls(cygrpc.AioServer):  # type: ignore[misc]
    """The part of gRPC's server that takes calls."""

    def __init__(self, gate: Gate | None, *given: Any) -> None:
        super().__init__(*given)
        self._gate = gate
        self._interceptors_given = tuple(given[_INTERCEPTORS] or ())
        self._handlers: dict[str, Any] = {}
        self._loop_here = asyncio.get_running_loop()
        self._resolver: Any = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unread = Unfinished(_MOST_UNREAD, MESSAGE_SECONDS)
        self._watches = Unfinished(_MOST_WATCHES, _WATCH_SECONDS)

    def add_registered_method_handlers(self, handlers: dict[str, Any]) -> None:
        """Take handlers by the names of their methods."""
        handlers = {name: _read_here(handler) for name, handler in handlers.items()}
        super().add_registered_method_handlers(handlers)
        self._handlers.update(handlers)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """Return what ends when calls of a method cannot be taken; None stands for all that are not registered."""
        if self._resolver is None:
            self._resolver = cygrpc._MethodResolver([], self._handlers)
        if method is None:
            return self._loop_here.create_task(self._refuse_others())
        takers = [self._loop_here.create_task(self._take(method)) for _ in range(_TAKERS)]
        return asyncio.gather(*takers)

    async def _take(self, method: bytes) -> None:
        """Take calls of a method, until the server stops."""
        name = method.decode()
        gate = self._gate if not name.startswith("/grpc.") else None  # health is asked for above all then
        while True:
            call = await _whole(self._request_registered_call(method))
            if gate is None:
                self._begin(name, call)
                continue
            gate.admission.come(
                functools.partial(self._begin, name, call), functools.partial(self._refuse, gate, name, call)
            )

    def _begin(self, name: str, call: Any) -> None:
        """Begin to read a call."""
        handler = self._handlers[name]
        ended = self._gate.admission.begun() if self._gate is not None else None
        work = cygrpc._handle_rpc(name, self._resolver, self._interceptors_given, call, self._loop_here, False)
        if not handler.request_streaming:
            text = f"no message came within {MESSAGE_SECONDS:g} s, or others were waited for"
            late = functools.partial(self._end, call, grpc.StatusCode.DEADLINE_EXCEEDED, text)
            self._unread.begin(call, late)
        watched = handler.response_streaming and name.startswith("/grpc.")
        _CAME.set(functools.partial(self._came, call, watched))
        task = self._keep(cygrpc._schedule_rpc_coro(work, call, self._loop_here, name))

        def over(_task: asyncio.Task[Any]) -> None:
            self._unread.done(call)
            self._watches.done(call)
            if ended is not None:
                ended()

        task.add_done_callback(over)

    def _came(self, call: Any, watched: bool) -> None:
        """Take a call whose message is there; to be called in its own task."""
        self._unread.done(call)
        if watched:
            text = "many watch: ask again"
            self._watches.begin(
                call, functools.partial(self._end, call, grpc.StatusCode.UNAVAILABLE, text, asyncio.current_task())
            )

    def _end(self, call: Any, code: grpc.StatusCode, text: str, task: asyncio.Task[Any] | None = None) -> None:
        if task is not None:
            task.cancel()
        self._keep(_answer(call, self._loop_here, code, text))

    def _refuse(self, gate: Gate, name: str, call: Any, error: OverloadedError) -> None:
        """Answer a call by its headers alone."""
        gate.refused(name)
        # A task of its own: an answer waits for a peer that does not read.
        self._keep(_answer(call, self._loop_here, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), pushback(error)))

    async def _refuse_others(self) -> None:
        """Answer calls of unknown methods, until the server stops."""
        nothing = cygrpc._MethodResolver([], {})
        while True:
            call = await _whole(self._request_call())
            self._keep(cygrpc._handle_rpc("", nothing, (), call, self._loop_here, False))

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop_here.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _read_here(handler: Any) -> Any:
    """Return a handler that tells when its message is there, and whose bytes are read where the caller can be told."""
    if handler.request_streaming:
        return handler
    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    served, read = getattr(handler, kind), handler.request_deserializer

    async def message(held: list[bytes], context: Any) -> Any:
        _CAME.get()()
        if read is None:
            return held.pop()
        try:
            return read(held.pop())
        except Exception as error:  # noqa: BLE001 - each reader has errors of its own
            text = f"no message of this method: {error}"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        raise AssertionError("abort raises")

    async def generated(data: bytes, context: Any) -> Any:
        held = [data]
        del data
        try:
            async with contextlib.aclosing(served(await message(held, context), context)) as answers:
                async for answer in answers:
                    yield answer
        except grpc.aio.AbortError as error:
            raise _bare(error) from None

    async def called(data: bytes, context: Any) -> Any:
        held = [data]
        del data
        try:
            return await served(await message(held, context), context)
        except grpc.aio.AbortError as error:
            raise _bare(error) from None

    opened = generated if inspect.isasyncgenfunction(served) else called
    return handler._replace(request_deserializer=None, **{kind: opened})


def _bare(error: BaseException) -> BaseException:
    """Return an error without the way it took: gRPC keeps it with the call, and so all that was held on that way."""
    error.__context__ = None
    return error.with_traceback(None)


async def _whole(asked: Coroutine[Any, Any, Any]) -> Any:
    """Wait for a call that gRPC was asked for; whoever is cancelled meanwhile leaves what gRPC will write to in place.

    A task that is cancelled frees what its coroutine holds. At the end of a process whose server has broken, gRPC then
    wrote to memory that was no longer its own.
    """
    waited: Any = asked.send(None)
    waited._asyncio_future_blocking = False
    try:
        await asyncio.wait((waited,))
    except asyncio.CancelledError:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(asked))  # for good: it also outlives the interpreter's own end
        raise
    try:
        asked.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("gRPC waits for a call in one step")


async def _answer(
    call: Any,
    loop: asyncio.AbstractEventLoop,
    code: grpc.StatusCode,
    text: str,
    metadata: tuple[tuple[str, str], ...] = (),
) -> None:
    """Answer a call by its headers alone, or end the answer that has begun."""
    for begins in (True, False):
        status = cygrpc.SendStatusFromServerOperation(metadata, code.value[0], text, 0)
        operations = (cygrpc.SendInitialMetadataOperation((), 0), status) if begins else (status,)
        try:
            await cygrpc.execute_batch(call, operations, loop)
        except cygrpc.ExecuteBatchError:  # it has begun before, or the caller is gone
            continue
        return


def rpc_server(
    max_message_bytes: int,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    gate: Gate | None = None,
) -> grpc.aio.Server:
    """Make a server; its methods are added with ``add_registered_method_handlers``, as generated code does.

    Handlers added by ``add_generic_rpc_handlers`` are never called.

    Args:
        max_message_bytes: largest message that is taken.
        interceptors: see every call.
        gate: where calls wait for their turn, or are refused, before they are read; None takes all.
    """
    theirs = cygrpc.AioServer
    cygrpc.AioServer = functools.partial(_Calls, gate)
    try:
        return grpc.aio.server(
            interceptors=interceptors,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", _MOST_STREAMS),
                ("grpc.server_handshake_timeout_ms", round(_HANDSHAKE_SECONDS * 1e3)),
                ("grpc.max_connection_idle_ms", round(_IDLE_SECONDS * 1e3)),
                ("grpc.max_allowed_incoming_connections", _most_connections()),
            ],
        )
    finally:
        cygrpc.AioServer = theirs


def _most_connections() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(_MOST_CONNECTIONS, files // 4))


async def serving(server: grpc.aio.Server, name: str) -> None:
    """Wait until a server serves no more.

    An error in its loop closes its ports and is told nobody but who asks.

    Args:
        server: started.
        name: for the error's text.

    Raises:
        TaskEndedError: it ended by an error.
    """
    try:
        while await server.wait_for_termination(timeout=_LOOK_SECONDS):
            pass
    except Exception as error:
        raise TaskEndedError(f"the gRPC server {name} has ended: {type(error).__name__}: {error}") from error
