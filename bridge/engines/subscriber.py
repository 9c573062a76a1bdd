"""One SUB socket on the event loop: frames come by callback, in bursts, without a task per message.

``ZMQ_MAXMSGSIZE`` makes ZMQ drop the *peer*, so it is set far above the limit on messages: a message over that limit
is received, counted and left out alone.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Final

import zmq

from kvatlas.bridge.engines.publisher import allow_ipv6
from kvatlas.bridge.engines.replay_client import SOCKET_MESSAGE_BYTES
from kvatlas.bridge.errors import EngineError

_BURST = 200

#: As plain numbers: pyzmq makes an enumeration of them at each call otherwise.
_EVENTS, _RCVMORE, _POLLIN = int(zmq.EVENTS), int(zmq.RCVMORE), int(zmq.POLLIN)
_EVENT = struct.Struct("=HI")
#: Messages that ZMQ queues per engine, minutes of a busy one; what is beyond is replayed.
_QUEUED_MESSAGES: Final = 100_000

Receive = Callable[[list[bytes]], None]
#: Gets a connection's number and whether it is there from now on, or no longer.
Connection = Callable[[int, bool], None]


class Subscriber:
    """A connected (or bound) SUB socket; ``receive`` gets the frames of each message."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        receive: Receive,
        *,
        reconnected: Callable[[], None] = lambda: None,
        connection: Connection | None = None,
    ) -> None:
        """Open the socket and read from it.

        Args:
            context: the ZMQ context.
            address: where to connect, or to bind.
            receive: gets the frames of each message.
            reconnected: called with each (re)connect.
            connection: told of peers that come and go; given, the socket binds. A peer is told before its first message
                and after its last one, but for what ZMQ had received and not handed out when the peer left.

        Raises:
            EngineError: the address cannot be used.
        """
        self._receive = receive
        self._reconnected = reconnected
        self._loop = asyncio.get_running_loop()
        self._closed = False
        #: Address and connection of the peer whose message is being received, only for sockets that bind.
        self.peer, self.number = "", -1
        self._connection = connection
        bind = connection is not None
        self._socket = context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, SOCKET_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "")
        allow_ipv6(self._socket, address)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED if bind else zmq.EVENT_HANDSHAKE_SUCCEEDED
        )
        try:
            (self._socket.bind if bind else self._socket.connect)(address)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise EngineError(f"cannot {'bind' if bind else 'connect to'} {address}: {error}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._drain = self._drain_bound if bind else self._drain_connected
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._loop.add_reader(self._monitor_fd, self._watch)
        self._loop.call_soon(self._drain)
        self._loop.call_soon(self._watch)

    def close(self) -> None:
        """Stop reading and close."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    # The descriptor fires once for many messages, so both read until nothing is left, in bursts to be fair. Asking
    # whether there is more costs half of what being refused does, and most wake-ups are for one message.

    def _drain_connected(self) -> None:
        read, more, burst = self._read_frames, self._socket.get, list[list[bytes]]()
        while not self._closed and int(more(_EVENTS)) & _POLLIN:
            burst.append(read())
            if len(burst) == _BURST:
                self._loop.call_soon(self._drain)
                break
        # A new connection is told before its first message: that one may go on where the old connection ended.
        if burst and int(self._monitor.get(_EVENTS)) & _POLLIN:
            self._watch()
        receive = self._receive
        for frames in burst:
            receive(frames)

    def _drain_bound(self) -> None:
        receive, read, more = self._receive, self._read_from, self._socket.get
        for _ in range(_BURST):
            if self._closed or not int(more(_EVENTS)) & _POLLIN:
                return
            receive(read())
        self._loop.call_soon(self._drain)

    def _read_frames(self) -> list[bytes]:
        recv, more = self._socket.recv, self._socket.get
        frames = [recv(zmq.NOBLOCK)]
        while more(_RCVMORE):
            frames.append(recv())
        return frames

    def _read_from(self) -> list[bytes]:
        frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        number = int(frames[0].get(zmq.SRCFD))
        if number != self.number:
            self.number = number
            self._watch()  # it may be new
        try:
            self.peer = str(frames[0].get("Peer-Address"))
        except zmq.ZMQError:  # transports without addresses
            self.peer = ""
        return [frame.bytes for frame in frames]

    def _watch(self) -> None:
        while not self._closed:
            try:
                event, _ = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if self._connection is None:
                self._reconnected()
                continue
            kind, number = _EVENT.unpack(event)
            self._connection(number, kind == zmq.EVENT_ACCEPTED)
