"""Server under HTTP pages: so many connections, each idle, or with an answer that nobody takes, for so long.

A connection without a whole header, between two requests, or whose peer does not read only holds memory and a file.
When there are too many of them, the one that has waited the longest ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from kvatlas.bridge.runtime.unfinished import Unfinished

#: From the start of a connection, or the end of an answer, to the next whole header.
HEADER_SECONDS: Final = 10.0
#: Connections that wait for a header.
_MOST_IDLE: Final = 1_024
#: An answer is taken within so long, and a second more for every MiB of it.
_ANSWER_SECONDS: Final = 10.0
_MIB: Final = 1 << 20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def started(app: web.Application, log: logging.Logger, stop_seconds: float) -> web.AppRunner:
    """Return a runner that is set up and has no site yet.

    Args:
        app: its middlewares run inside what bounds the connections.
        log: told of broken requests.
        stop_seconds: requests that run when the server stops get so long to end.
    """
    idle = Unfinished(_MOST_IDLE, 2 * HEADER_SECONDS)  # aiohttp closes them before, but for those that it waits for

    @web.middleware
    async def bounded(request: web.Request, handler: Handler) -> web.StreamResponse:
        idle.done(request.protocol)
        try:
            answer = await handler(request)
            await _sent(request, answer)
        finally:
            if request.transport is not None:
                idle.begin(request.protocol, request.transport.abort)
        return answer

    app.middlewares.insert(0, bounded)
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=log,
        handler_cancellation=True,
        shutdown_timeout=stop_seconds,
        keepalive_timeout=HEADER_SECONDS,
        lingering_time=1.0,
        auto_decompress=False,  # aiohttp answers a false encoding with a traceback
    )
    await runner.setup()
    server: Any = runner.server
    made, lost = server.connection_made, server.connection_lost

    def connection_made(handler: Any, transport: asyncio.Transport) -> None:
        made(handler, transport)
        idle.begin(handler, transport.abort)

    def connection_lost(handler: Any, *error: Any) -> None:
        lost(handler, *error)
        idle.done(handler)

    server.connection_made, server.connection_lost = connection_made, connection_lost
    return runner


async def _sent(request: web.Request, answer: web.StreamResponse) -> None:
    """Send an answer; a peer that does not take it is cut off."""
    size = answer.content_length or 0
    try:
        async with asyncio.timeout(_ANSWER_SECONDS + size / _MIB) as waiting:
            await answer.prepare(request)
            await answer.write_eof()
    except TimeoutError:
        if not waiting.expired() or request.transport is None:
            raise
        request.transport.abort()
