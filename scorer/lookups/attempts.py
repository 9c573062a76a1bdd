"""Hedging and failover of a lookup, per partition.

Pure apart from time; :mod:`kvatlas.scorer.lookups.router` does the asking.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

#: Partitions answered, and the owners named for others.
Outcome = tuple[set[int], dict[int, str]]
Ask = Callable[[str, list[int]], Awaitable[Outcome]]

_ROUNDS: Final = 3


class Asking:
    """The asks of one lookup under way.

    Attributes:
        pending: partitions without an answer.
    """

    def __init__(
        self,
        candidates: dict[int, list[str]],
        ask: Ask,
        *,
        hedge_seconds: float,
        deadline: float,
        on_event: Callable[[str], None],
    ) -> None:
        """Take what is to be asked.

        Args:
            candidates: partition -> endpoints that may answer for it, best first; used up.
            ask: asks one endpoint for some partitions; returns by the deadline and never raises for a worker.
            hedge_seconds: ask the next candidate too after so long; 0 never.
            deadline: monotonic seconds.
            on_event: told of ``hedged`` and ``redirected``.
        """
        self.pending = set(candidates)
        self._targets = candidates
        self._ask = ask
        self._hedge_seconds = hedge_seconds
        self._deadline = deadline
        self._on_event = on_event
        self._rounds = dict.fromkeys(candidates, 0)
        self._running: dict[asyncio.Future[Outcome], tuple[str, list[int]]] = {}
        self._hedges: dict[asyncio.Future[Outcome], float] = {}  # when the next candidates are asked as well

    async def run(self) -> set[int]:
        """Ask until everything is answered, nobody is left to ask, or time is up; returns what has no answer."""
        try:
            self._next(self.pending)
            while self.pending and self._running:
                wake = min(self._hedges.values(), default=None)
                timeout = None if wake is None else max(wake - time.monotonic(), 0.0)
                done, _ = await asyncio.wait(self._running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                self._take(done)
                self._hedge()
        finally:
            for task in self._running:
                task.cancel()
        return self.pending

    def _take(self, done: Collection[asyncio.Future[Outcome]]) -> None:
        """Take answers in and ask on for what they left open."""
        open_still: set[int] = set()
        for task in done:
            endpoint, partitions = self._running.pop(task)
            self._hedges.pop(task, None)
            answered, owners = task.result()
            self.pending -= answered
            for partition, owner in owners.items():
                if partition in self._targets and owner != endpoint:
                    others = [target for target in self._targets[partition] if target != owner]
                    self._targets[partition] = [owner, *others]
            open_still.update(partitions)
        if self._next(open_still & self.pending):
            self._on_event("redirected")

    def _hedge(self) -> None:
        """Ask the next candidates of what is slow."""
        now = time.monotonic()
        slow = [task for task, at in self._hedges.items() if at <= now]
        for task in slow:
            del self._hedges[task]
            if self._start(self.pending.intersection(self._running[task][1]), hedged=True):
                self._on_event("hedged")

    def _next(self, partitions: Iterable[int]) -> bool:
        """Ask the next candidate of each partition that may still be asked; returns whether anybody was."""
        allowed = [partition for partition in partitions if self._rounds[partition] < _ROUNDS]
        for partition in allowed:
            self._rounds[partition] += 1
        return self._start(allowed, hedged=False)

    def _start(self, partitions: Iterable[int], *, hedged: bool) -> bool:
        now = time.monotonic()
        if now >= self._deadline:
            return False
        groups: dict[str, list[int]] = {}
        for partition in partitions:
            if (endpoint := self._choose(partition)) is not None:
                groups.setdefault(endpoint, []).append(partition)
        for endpoint, parts in groups.items():
            task = asyncio.ensure_future(self._ask(endpoint, parts))
            self._running[task] = endpoint, parts
            if self._hedge_seconds and not hedged:
                self._hedges[task] = now + self._hedge_seconds
        return bool(groups)

    def _choose(self, partition: int) -> str | None:
        """Return the next candidate that is not being asked for the partition already."""
        asked = {endpoint for endpoint, parts in self._running.values() if partition in parts}
        targets = self._targets[partition]
        while targets:
            if (endpoint := targets.pop(0)) not in asked:
                return endpoint
        return None
