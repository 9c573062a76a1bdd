"""Lookups in the tables of the worker in this very process: no hop between scorer and index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from kvatlas.scorer.reader import ACTIVE, RESTORING, STANDBY, UNANSWERED, Answers, Lookups, Seen, partitions_of

_ROLES: Final = {"ACTIVE": ACTIVE, "STANDBY": STANDBY, "RESTORING": RESTORING}


class TableLookups:
    """Lookups in local table partitions; keys of partitions that are elsewhere go to ``remote``, if there is one."""

    def __init__(
        self,
        state_of: Callable[[int], Any],
        partition_count: int,
        worker: str,
        remote: Lookups | None = None,
    ) -> None:
        """Take the worker's side.

        Args:
            state_of: partition -> its :class:`kvatlas.streams.store.PartitionState`, None when it is not here.
            partition_count: partitions of ``kv-blocks``.
            worker: this worker's id, for freshness.
            remote: where to ask for the other partitions; None leaves them unanswered.
        """
        self._state_of = state_of
        self._count = partition_count
        self._worker = worker
        self._remote = remote

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        """Look keys up, here as far as possible."""
        if not keys:
            return Answers([], {})
        numbers = partitions_of(b"".join(keys), self._count)
        values: list[bytes | None] = [None] * len(keys)
        seen: dict[int, Seen] = {}
        elsewhere: list[int] = []
        for partition in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == partition).tolist()
            state = self._state_of(partition)
            role = _ROLES.get(state.role.name, UNANSWERED) if state is not None else UNANSWERED
            if role != ACTIVE and (self._remote is not None or role != STANDBY):
                elsewhere += rows
                seen[partition] = Seen(role, self._worker, -1, 0)
                continue
            seen[partition] = Seen(role, self._worker, state.meta.source_offset, state.meta.receive_ns)
            for row, value in zip(rows, state.get_many([keys[row] for row in rows]), strict=True):
                values[row] = value or b""
        if elsewhere and self._remote is not None:
            answers = await self._remote.lookup([keys[row] for row in elsewhere], deadline)
            seen |= answers.partitions
            for row, value in zip(elsewhere, answers.values, strict=True):
                values[row] = value
        return Answers(values, seen)

    def unready(self) -> str | None:
        """Return why nothing can be answered now: no partition is here and caught up, and nobody else is known."""
        for partition in range(self._count):
            state = self._state_of(partition)
            if state is not None and state.role.name in ("ACTIVE", "STANDBY"):
                return None
        return self._remote.unready() if self._remote is not None else "no partition is caught up here"

    async def close(self) -> None:
        """Let connections to others go."""
        if self._remote is not None:
            await self._remote.close()
