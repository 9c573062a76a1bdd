"""ZMQ side of all endpoints of a process: one context, and how many replays run at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import zmq

from kvatlas.bridge.engines.replay_client import Take, replay
from kvatlas.bridge.options import BridgeSettings

#: Replays at a time, of engines that answer and as many of such as do not: each reads as fast as the engine sends.
PARALLEL_REPLAYS: Final = 8


class Wires:
    """The context of all sockets, and the replays."""

    def __init__(self, settings: BridgeSettings) -> None:
        """Open nothing yet."""
        self._settings = settings
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._replays = asyncio.Semaphore(PARALLEL_REPLAYS)
        #: Engines that do not answer wait for each other, and hold up nobody else's repair.
        self.silent_replays = asyncio.Semaphore(PARALLEL_REPLAYS)

    async def replay(
        self, address: str, start: int, take: Take, room: Callable[[], bool], *, silent: bool
    ) -> tuple[bool, int | None]:
        """Run one replay when it is its turn; ``silent`` says that the last one there was not answered."""
        async with self.silent_replays if silent else self._replays:
            return await replay(
                self.context,
                address,
                start,
                take,
                timeout_seconds=self._settings.replay_timeout_seconds,
                room=room,
            )

    def close(self) -> None:
        """Close what is left."""
        self.context.destroy(linger=0)
