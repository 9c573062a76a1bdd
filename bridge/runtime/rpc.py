"""gRPC server that no call ends: what is asked by a name that nobody serves is refused without a look at the name.

gRPC's server on asyncio decodes the method's name of every call that is none of its registered methods, in the loop
that takes calls: a name that is no UTF-8 ended that loop, and with it the server, for every caller. So methods are
registered, and the others are taken by a loop of our own, which answers UNIMPLEMENTED whatever the name.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from typing import Any, Final

import grpc.aio

from kvatlas.bridge.errors import TaskEndedError

#: Has no types.
cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")

#: gRPC tells the error of a server's loop only when a wait for its end has run out: calls in progress hold that up.
_LOOK_SECONDS: Final = 1.0


class _Calls(cygrpc.AioServer):  # type: ignore[misc]
    """The part of gRPC's server that takes calls."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Task[Any]:
        """Return a task that ends with the next call of a method; None stands for all that are not registered."""
        if method is None:
            return asyncio.get_running_loop().create_task(self._refuse_others())
        task: asyncio.Task[Any] = super()._make_request_call_future(method)
        return task

    async def _refuse_others(self) -> None:
        """Answer calls of unknown methods, until the server stops."""
        loop = asyncio.get_running_loop()
        nothing = cygrpc._MethodResolver([], {})
        answers: set[asyncio.Task[None]] = set()
        while True:
            call = await self._request_call()
            # Beside this loop: an answer waits for a peer that does not read.
            answer = loop.create_task(cygrpc._handle_rpc("", nothing, (), call, loop, False))
            answers.add(answer)
            answer.add_done_callback(answers.discard)


def rpc_server(max_message_bytes: int, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> grpc.aio.Server:
    """Make a server; its methods are added with ``add_registered_method_handlers``, as generated code does.

    Handlers added by ``add_generic_rpc_handlers`` are never called.

    Args:
        max_message_bytes: largest message that is taken.
        interceptors: see every call.
    """
    theirs = cygrpc.AioServer
    cygrpc.AioServer = _Calls
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
