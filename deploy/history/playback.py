"""Play recorded engine messages at a ZMQ subscriber: as they were, at their speed or another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final

import zmq

from kvatlas.bridge.engines.publisher import binds
from kvatlas.bridge.errors import EngineError, SettingsError
from kvatlas.bridge.model import topics
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.history.summary import number_of

SCHEME: Final = "zmq://"
#: A receive time further than this from the broker's is no time at all, and nobody waits for it.
_CLOCKS_APART_MS: Final = 24 * 3600 * 1000
_SEQUENCE_BYTES: Final = 8
_SUBSCRIBER_WAIT_MS: Final = 30_000


class Playback:
    """A publisher's socket that sends recorded messages; use as ``with``.

    ``zmq://*:PORT`` binds, as an engine does, and waits for a subscriber; ``zmq://HOST:PORT`` connects to a bridge that
    binds.

    Args:
        target: where to, in the form above.
        speed: 1 keeps the recorded distances, 2 halves them, 0 sends as fast as it goes.
    """

    def __init__(self, target: str, speed: float = 1.0) -> None:
        if not target.startswith(SCHEME) or ":" not in target[len(SCHEME) :]:
            raise SettingsError(f"{target!r}: give zmq://*:PORT to bind or zmq://HOST:PORT to connect")
        if speed < 0:
            raise SettingsError(f"--speed {speed}: must be 0 (as fast as it goes) or more")
        self._speed = speed
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 5_000)
        endpoint = "tcp://" + target[len(SCHEME) :]
        try:
            if binds(endpoint):
                self._socket.bind(endpoint)
            else:
                self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise EngineError(f"cannot publish at {target}: {error}") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Playback:
        """Return itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Send what is queued, then close."""
        self.close()

    def close(self) -> None:
        """Send what is queued, then close."""
        self._socket.close()
        self._context.term()

    async def wait_for_subscriber(self) -> None:
        """Wait until somebody listens, so that nothing is sent to nobody.

        Raises:
            EngineError: nobody subscribed in 30 s.
        """
        if not await asyncio.to_thread(self._socket.poll, _SUBSCRIBER_WAIT_MS, zmq.POLLIN):
            raise EngineError(f"nobody subscribed at {self.endpoint} in {_SUBSCRIBER_WAIT_MS // 1000} s")
        self._socket.recv()

    async def send(self, source: AsyncIterator[Record]) -> int:
        """Send the engine messages of a log in their order; returns how many.

        Records that no engine sent (control records, stripped batches) are left out.
        """
        sent = 0
        began: tuple[float, int] | None = None
        async for record in source:
            headers = dict(record.headers)
            if headers.get(topics.H_CONTENT_TYPE, b"engine") != topics.CONTENT_ENGINE.encode():
                continue
            now_ms = _time_ms(record, headers)
            if began is None:
                began = (time.monotonic(), now_ms)
            if self._speed:
                due = began[0] + (now_ms - began[1]) / 1000 / self._speed
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            elif sent % 256 == 0:
                await asyncio.sleep(0)
            self._socket.send_multipart(_frames(record, headers))
            sent += 1
        return sent


def _time_ms(record: Record, headers: dict[str, bytes]) -> int:
    received_ms = number_of(headers.get(topics.H_RECEIVE_NS)) // 1_000_000
    return received_ms if abs(received_ms - record.timestamp_ms) < _CLOCKS_APART_MS else record.timestamp_ms


def _frames(record: Record, headers: dict[str, bytes]) -> list[bytes]:
    pod = record.key or b""
    topic = headers.get(topics.H_ENGINE_TOPIC) or b"kv@" + pod + b"@" + headers.get(topics.H_MODEL, b"")
    sequence = max(number_of(headers.get(topics.H_SEQUENCE, b"0")), 0)
    return [topic, sequence.to_bytes(_SEQUENCE_BYTES, "big"), record.value or b""]
