"""Lease of a consumer group's member: until when the group surely counts it in.

A member whose session ran out has lost its partitions without being told. The lease ends before that can have
happened, by the member's own clock, so that it stops in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Lease:
    """Until when the group surely counts this member in.

    Args:
        seconds: the group's session timeout.
        clock: monotonic, seconds; it goes on while the process stands still.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._until = 0.0

    def now(self) -> float:
        """Return the time, to be noted before a heartbeat is sent."""
        return self._clock()

    def renew(self, began: float) -> None:
        """Take note that a heartbeat sent at ``began`` was accepted."""
        self._until = max(self._until, began + self._seconds)

    @property
    def valid(self) -> bool:
        """Return whether the broker cannot have given our partitions away."""
        return self._clock() < self._until

    def renew_with_heartbeats(self, consumer: Any) -> None:
        """Renew with each heartbeat of a started consumer that its group accepts, from when it was sent.

        It reaches into aiokafka's coordinator, which tells nobody of its heartbeats.
        """
        coordinator = consumer._coordinator
        heartbeat = coordinator._do_heartbeat

        async def heartbeat_and_renew() -> bool:
            began = self.now()
            accepted: bool = await heartbeat()
            if accepted:
                self.renew(began)
            return accepted

        coordinator._do_heartbeat = heartbeat_and_renew


def generation_of(consumer: Any) -> int:
    """Return the number of a group's assignment that a started consumer is in."""
    number: int = consumer._coordinator.generation
    return number
