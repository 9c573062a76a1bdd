"""Ask an engine's replay socket for what is missing: a DEALER that speaks both reply layouts.

::

    request          [b"", start]                          start: 8 bytes, big-endian
    reply, 0.26 on   [b"", topic, sequence, payload]       end [b"", b"", ff*8, b""]
    reply, before    [b"", sequence, payload]              end [b"", ff*8, b""]

Replies are read from the end. Old engines drop replies, sometimes the end marker too; silence ends a try.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import zmq
import zmq.asyncio

from kvatlas.bridge.engines.publisher import END_OF_REPLAY, SEQUENCE_BYTES, allow_ipv6

#: ZMQ drops a peer that sends a larger message, so this is far above what is forwarded: it bounds memory alone.
SOCKET_MESSAGE_BYTES: Final = 512 * 1024 * 1024

#: Gets topic (None where the engine's replies have none), sequence and payload.
Take = Callable[[bytes | None, int, bytes], bool]


async def replay(
    context: zmq.Context[zmq.Socket[bytes]],
    address: str,
    start: int,
    take: Take,
    *,
    timeout_seconds: float,
    piece: int = 20_000,
    room: Callable[[], bool] = lambda: True,
) -> tuple[bool, int | None]:
    """Run one try.

    Args:
        context: the ZMQ context.
        address: the ROUTER socket.
        start: first sequence wanted.
        take: gets topic, sequence and payload of each reply; False ends the reading.
        timeout_seconds: silence that ends the try.
        piece: messages read before asking again, so that none waits for a whole buffer.
        room: whether more may be read now; reading pauses while it says no.

    Returns:
        Whether what was asked for came whole (the end marker, or ``take`` had enough), and the newest sequence seen.
    """
    socket = zmq.asyncio.Socket(zmq.asyncio.Context(context), zmq.DEALER)
    newest: int | None = None
    try:
        allow_ipv6(socket, address)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, SOCKET_MESSAGE_BYTES)
        socket.connect(address)
        await socket.send_multipart([b"", start.to_bytes(SEQUENCE_BYTES, "big")])
        for _ in range(piece):
            while not room():  # noqa: ASYNC110 - room comes with acknowledgements of many places
                await asyncio.sleep(0.05)
            if not await socket.poll(int(timeout_seconds * 1000)):
                return False, newest
            frames = await socket.recv_multipart()
            if len(frames) < 3:
                continue
            bare = len(frames) == 3
            if frames[1 if bare else 2] == END_OF_REPLAY:
                return True, newest
            # An old end marker has an empty payload behind it, so it looks like a short reply; both are told above.
            if len(frames[-2]) != SEQUENCE_BYTES:
                continue
            sequence = int.from_bytes(frames[-2], "big")
            newest = sequence if newest is None else max(newest, sequence)
            if not take(None if bare else frames[1], sequence, frames[-1]):
                return True, newest
        return False, newest
    finally:
        socket.close(linger=0)
