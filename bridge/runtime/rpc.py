"""gRPC server that no call ends: what is asked by a name that nobody serves is refused without a look at the name.

gRPC's server on asyncio decodes the method's name of every call that is none of its registered methods, in the loop
that takes calls: a name that is no UTF-8 ended that loop, and with it the server, for every caller. So methods are
registered, and the others are taken by a loop of our own, which answers UNIMPLEMENTED whatever the name.

It also takes one call of a method per pass of the event loop, so that under overload most calls end in a queue that
nobody sees. Here many are taken at a time; they wait for their turn before anything is read of them, and those that
there is no time for are refused by their headers alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import importlib
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

import grpc.aio

from kvatlas.bridge.errors import OverloadedError, TaskEndedError
from kvatlas.bridge.runtime.admission import Admission

#: Has no types.
cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")

#: gRPC tells the error of a server's loop only when a wait for its end has run out: calls in progress hold that up.
_LOOK_SECONDS: Final = 1.0
#: Trailing metadata that gRPC clients with a retry policy obey: milliseconds until they may ask again.
PUSHBACK: Final = "grpc-retry-pushback-ms"
#: Calls of a method that are taken in one pass of the event loop.
_TAKERS: Final = 64

#: The place of the interceptors in what gRPC makes a server of.
_INTERCEPTORS: Final = 3


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

    def add_registered_method_handlers(self, handlers: dict[str, Any]) -> None:
        """Take handlers by the names of their methods."""
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
        work = cygrpc._handle_rpc(name, self._resolver, self._interceptors_given, call, self._loop_here, False)
        self._keep(cygrpc._schedule_rpc_coro(work, call, self._loop_here, name))

    def _refuse(self, gate: Gate, name: str, call: Any, error: OverloadedError) -> None:
        """Answer a call by its headers alone."""
        gate.refused(name)
        # A task of its own: an answer waits for a peer that does not read.
        self._keep(_refuse(call, error, self._loop_here))

    async def _refuse_others(self) -> None:
        """Answer calls of unknown methods, until the server stops."""
        nothing = cygrpc._MethodResolver([], {})
        while True:
            call = await _whole(self._request_call())
            self._keep(cygrpc._handle_rpc("", nothing, (), call, self._loop_here, False))

    def _keep(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop_here.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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


async def _refuse(call: Any, error: OverloadedError, loop: asyncio.AbstractEventLoop) -> None:
    """Answer a call by its headers alone."""
    code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    answer = (
        cygrpc.SendInitialMetadataOperation((), 0),
        cygrpc.SendStatusFromServerOperation(pushback(error), code, str(error), 0),
    )
    with contextlib.suppress(cygrpc.ExecuteBatchError):  # the caller is gone
        await cygrpc.execute_batch(call, answer, loop)


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
            ],
        )
    finally:
        cygrpc.AioServer = theirs


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
