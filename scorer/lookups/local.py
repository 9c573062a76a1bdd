"""Lookups in the tables of the worker in this very process: no hop between scorer and index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from kvatlas.scorer.lookups.index import ServiceLookups
from kvatlas.scorer.lookups.router import partitions_of
from kvatlas.scorer.scoring.lookup import ACTIVE, RESTORING, STANDBY, UNANSWERED, Answers, Seen
from kvatlas.streams.serving.answers import Readable, fill, read_slices

_ROLES: Final = {"ACTIVE": ACTIVE, "STANDBY": STANDBY, "RESTORING": RESTORING}
_FIRST_BLOCKS: Final = 128


class Partition(Readable, Protocol):
    """What is read of a :class:`kvatlas.streams.state.partition.PartitionState`; the scorer imports no RocksDB."""

    role: Any

    @property
    def reflected(self) -> tuple[int, int]:
        """Source offset and receive time that answers reflect."""


class LocalTables(NamedTuple):
    """The index of the worker in this process, as a scorer takes it over.

    Attributes:
        state_of: partition -> its state, None when it is not here.
        partition_count: returns the partitions of ``kv-blocks``, 0 while the worker starts.
        worker: returns the worker's id, for freshness.
        index_version: the index version that it keeps.
    """

    state_of: Callable[[int], Partition | None]
    partition_count: Callable[[], int]
    worker: Callable[[], str]
    index_version: str


class TableLookups:
    """Lookups in local table partitions; keys of partitions that are elsewhere go to ``remote``, if there is one.

    An active partition answers here. A standby copy answers only when ``remote`` did not: its owner knows more.

    Attributes:
        first_blocks: blocks to ask for first. Without a hop a round costs little, while keys that nobody holds cost
            a look into RocksDB each, so rounds begin small.
    """

    first_blocks = _FIRST_BLOCKS

    def __init__(
        self,
        tables: LocalTables,
        remote: ServiceLookups | None = None,
    ) -> None:
        """Take the worker's side.

        Args:
            tables: what is here.
            remote: where to ask for the other partitions; None leaves them unanswered.
        """
        self._state_of = tables.state_of
        self._tables = tables
        self._remote = remote

    @property
    def stale(self) -> bool:
        """Whether no worker has said of late that it keeps the index up to date, this one included."""
        return self._remote is not None and self._remote.stale

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        """Look keys up, here as far as possible."""
        if not keys:
            return Answers([], {})
        count = self._tables.partition_count()
        if not count:
            return Answers([None] * len(keys), {})
        numbers: list[int] = partitions_of(b"".join(keys), count).tolist()
        seen: dict[int, Seen] = {}

        def active(touched: set[int]) -> dict[int, Partition]:
            """Return the partitions that are this worker's, from the first slice on; what is told is as of that one."""
            states, now = self._states(touched)
            for number in touched:
                seen.setdefault(number, now[number])
            return {n: state for n, state in states.items() if now[n].role == seen[n].role == ACTIVE}

        values, rows = await read_slices(keys, numbers, active)
        if not rows:
            return Answers(values, seen)
        if self._remote is not None:
            missing = {numbers[row] for row in rows}
            answers = await self._remote.lookup([keys[row] for row in rows], deadline)
            seen |= {number: state for number, state in answers.partitions.items() if number in missing}
            for row, value in zip(rows, answers.values, strict=True):
                values[row] = value
        self._fall_back(values, keys, numbers, seen)
        return Answers(values, seen)

    def _states(self, partitions: Iterable[int]) -> tuple[dict[int, Partition], dict[int, Seen]]:
        """Return the partitions that are here, and what is to be said of all."""
        states: dict[int, Partition] = {}
        seen: dict[int, Seen] = {}
        worker = self._tables.worker()
        for number in partitions:
            state = self._state_of(number)
            if state is None:
                seen[number] = Seen(UNANSWERED, worker, -1, 0)
                continue
            states[number] = state
            role = _ROLES.get(state.role.name, UNANSWERED)
            seen[number] = Seen(role, worker, *state.reflected)
        return states, seen

    def _fall_back(
        self, values: list[bytes | None], keys: Sequence[bytes], numbers: Sequence[int], seen: dict[int, Seen]
    ) -> None:
        """Answer from standby copies what nobody else answered."""
        missing = {number for number, value in zip(numbers, values, strict=True) if value is None}
        # Looked at again: the wait for the others may have changed what is here.
        states, roles = self._states(missing)
        here = {number: state for number, state in states.items() if roles[number].role in (ACTIVE, STANDBY)}
        if here:
            fill(values, keys, numbers, here)
            seen |= {number: roles[number] for number in here}
        for number in missing - here.keys():
            if seen[number].role in (ACTIVE, STANDBY):
                seen[number] = Seen(UNANSWERED, seen[number].worker, -1, 0)

    def unready(self) -> str | None:
        """Return why nothing can be answered now: no partition is here and caught up, and nobody else is known."""
        for partition in range(self._tables.partition_count()):
            state = self._state_of(partition)
            if state is not None and state.role.name in ("ACTIVE", "STANDBY"):
                return None
        return self._remote.unready() if self._remote is not None else "no partition is caught up here"

    async def forget_gone(self) -> None:
        """Close connections to workers that are gone."""
        if self._remote is not None:
            await self._remote.forget_gone()

    async def close(self) -> None:
        """Let connections to others go."""
        if self._remote is not None:
            await self._remote.close()
