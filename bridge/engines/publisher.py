"""Publish engine events over ZMQ as vLLM 0.33 does: a PUB socket for the live stream, a ROUTER socket for replay.

Used where kvatlas itself is the engine's side: the simulated fleet, the connector on a model node, and tests. Needs
pyzmq alone (no Kafka client).

Frames of the live stream::

    topic (UTF-8) | sequence (8 bytes, big-endian) | payload (msgpack batch)

Replay, as the ROUTER sees it: request ``[identity, b"", start]``; answers ``[identity, b"", topic, sequence,
payload]`` for every buffered batch from ``start`` on, then ``[identity, b"", b"", ff*8, b""]``. Engines before 0.26
leave the topic frame out (``replay_layout="bare"``), which can be asked for, so that readers can be tested against it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Final, Literal, Self

import zmq

from kvatlas.bridge.errors import EngineError
from kvatlas.bridge.model.adapters.fields import RemovedFields, StoredFields, encode_batch

SEQUENCE_BYTES: Final = 8
END_OF_REPLAY: Final = b"\xff" * SEQUENCE_BYTES
_POLL_MS: Final = 100
_LINGER_MS: Final = 500
_COUNT_EACH: Final = 1024
_ARRAY_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "BlockStored": StoredFields.__struct_fields__,
    "BlockRemoved": RemovedFields.__struct_fields__,
    "AllBlocksCleared": (),
}


def binds(endpoint: str) -> bool:
    """Tell whether a publisher binds an endpoint: vLLM's rule, and port 0 besides."""
    return (
        "*" in endpoint or "::" in endpoint or endpoint.startswith(("ipc://", "inproc://")) or endpoint.endswith(":0")
    )


def allow_ipv6(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Let a socket use an address in brackets; names stay with IPv4, where engines listen by default."""
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)


class EnginePublisher:
    """One engine process (one data-parallel rank) as its subscribers see it. Thread-safe.

    Attributes:
        endpoint: address of the live stream; after :meth:`start` with the port that was bound.
        replay_endpoint: address of the replay socket, None when there is none.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        buffer_steps: int = 10_000,
        hwm: int = 100_000,
        wire: Literal["map", "array"] = "map",
        bind: bool | None = None,
        replay_layout: Literal["topic", "bare"] = "topic",
    ) -> None:
        """Describe the publisher; nothing is opened before :meth:`start`.

        Args:
            endpoint: ZMQ address of the live stream; ``*`` or port 0 takes a free port.
            replay_endpoint: ZMQ address of the replay socket (always bound).
            topic: first frame of every message.
            buffer_steps: batches kept for replay.
            hwm: messages queued per subscriber; beyond it they are dropped for that subscriber, as ZMQ does.
            wire: events as maps (since 0.24) or arrays (before).
            bind: whether to bind ``endpoint``; None follows :func:`binds`.
            replay_layout: ``topic`` since 0.26, ``bare`` before.
        """
        self.endpoint = endpoint
        self.replay_endpoint = replay_endpoint
        self._bind = binds(endpoint) if bind is None else bind
        self._topic = topic.encode()
        self._hwm = hwm
        self._wire = wire
        self._bare = replay_layout == "bare"
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self._sequence = self._subscribed = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._pub: zmq.Socket[bytes] | None = None
        self._thread: threading.Thread | None = None

    @property
    def next_sequence(self) -> int:
        """The sequence that the next batch takes."""
        return self._sequence

    def start(self) -> None:
        """Open the sockets.

        Raises:
            EngineError: an address cannot be bound or connected.
        """
        if self._context is not None:
            return
        self._context = zmq.Context()
        try:
            self._pub = self._context.socket(zmq.XPUB)  # a PUB that tells of subscriptions
            self._pub.setsockopt(zmq.XPUB_VERBOSE, 1)
            self._pub.set_hwm(self._hwm)
            self.endpoint = _open(self._pub, self.endpoint, bind=self._bind)
            if self.replay_endpoint is not None:
                router = self._context.socket(zmq.ROUTER)
                router.setsockopt(zmq.SNDHWM, 0)  # drops nothing
                self.replay_endpoint = _open(router, self.replay_endpoint, bind=True)
                self._thread = threading.Thread(target=self._serve, args=(router,), name="replay", daemon=True)
                self._thread.start()
        except EngineError:
            self._context.destroy(linger=0)
            self._context = self._pub = None
            raise

    def publish(self, events: Sequence[Mapping[str, Any]], *, timestamp: float, dp_rank: int | None = 0) -> int:
        """Send one batch; returns its sequence.

        Args:
            events: maps with ``type`` and vLLM's field names.
            timestamp: the engine's clock, seconds since the epoch.
            dp_rank: data-parallel rank in the batch.
        """
        shaped: list[Any] = [_as_array(event) for event in events] if self._wire == "array" else list(events)
        return self.publish_raw(encode_batch(timestamp, shaped, dp_rank))

    def publish_raw(self, payload: bytes) -> int:
        """Send these payload bytes as one message; returns its sequence."""
        with self._lock:
            if self._pub is None:
                raise EngineError(f"publisher of {self.endpoint} is not started")
            sequence = self._sequence
            self._sequence += 1
            self._buffer.append((sequence, payload))
            if not sequence % _COUNT_EACH:  # nobody may ever ask, and they are kept until they are read
                self._count_subscriptions(self._pub)
            self._pub.send_multipart((self._topic, sequence.to_bytes(SEQUENCE_BYTES, "big"), payload))
        return sequence

    @property
    def subscribed(self) -> int:
        """How many subscriptions have come since the start: what is published before reaches no subscriber."""
        with self._lock:
            if self._pub is not None:
                self._count_subscriptions(self._pub)
        return self._subscribed

    def _count_subscriptions(self, pub: zmq.Socket[bytes]) -> None:
        while int(pub.get(zmq.EVENTS)) & zmq.POLLIN:
            self._subscribed += pub.recv().startswith(b"\1")

    def withhold(self, payload: bytes) -> int:
        """Take a sequence and keep its batch for replay without sending it: a message lost on the way."""
        with self._lock:
            sequence = self._sequence
            self._sequence += 1
            self._buffer.append((sequence, payload))
        return sequence

    def skip(self) -> int:
        """Take a sequence without a message, as an engine does whose encoding failed; no replay can fill it."""
        with self._lock:
            sequence = self._sequence
            self._sequence += 1
        return sequence

    def close(self) -> None:
        """Close the sockets; what subscribers have not read within half a second is dropped."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            pub, self._pub = self._pub, None
        if self._context is not None:
            if pub is not None:
                pub.close(linger=_LINGER_MS)
            self._context.term()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, router: zmq.Socket[bytes]) -> None:
        try:
            while not self._closing.is_set():
                if not router.poll(_POLL_MS):
                    continue
                request = router.recv_multipart()
                if len(request) == 3 and not request[1] and len(request[2]) == SEQUENCE_BYTES:
                    self._answer(router, request[0], int.from_bytes(request[2], "big"))
        finally:
            router.close(linger=_LINGER_MS)

    def _answer(self, router: zmq.Socket[bytes], identity: bytes, start: int) -> None:
        with self._lock:
            # Sequences only grow and rarely skip, so most of what is too old can be left out of the copy.
            oldest = self._buffer[0][0] if self._buffer else 0
            wanted = list(
                islice(self._buffer, max(0, start - oldest - (self._sequence - oldest - len(self._buffer))), None)
            )
        head = (identity, b"") if self._bare else (identity, b"", self._topic)
        for sequence, payload in wanted:
            if sequence >= start:
                router.send_multipart((*head, sequence.to_bytes(SEQUENCE_BYTES, "big"), payload))
        end = (END_OF_REPLAY, b"") if self._bare else (b"", END_OF_REPLAY, b"")
        router.send_multipart((identity, b"", *end))


def _open(socket: zmq.Socket[bytes], endpoint: str, *, bind: bool) -> str:
    """Bind or connect; returns the address that a peer on this machine connects to."""
    if endpoint.startswith("tcp://") and endpoint.endswith(":0"):
        endpoint = endpoint[:-1] + "*"
    allow_ipv6(socket, endpoint)
    try:
        if not bind:
            socket.connect(endpoint)
            return endpoint
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise EngineError(f"cannot {'bind' if bind else 'connect'} {endpoint}: {error}") from error
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return bound.replace("tcp://0.0.0.0:", "tcp://127.0.0.1:").replace("tcp://[::]:", "tcp://127.0.0.1:")


def _as_array(event: Mapping[str, Any]) -> list[Any]:
    """Lay an event out as an array: the type, then the fields in wire order, trailing unset ones left out."""
    kind = event["type"]
    values = [event.get(name) for name in _ARRAY_FIELDS[kind]]
    while values and values[-1] is None:
        values.pop()
    return [kind, *values]
