"""Answers from local partitions: the values of a prompt's keys, cache first, then what is not committed.

The hot path of every lookup, over gRPC or in the worker's own process: one dict lookup a key in the cache, and one in
the overlay where something is applied and not committed. Both run inside ``map``, without a line of Python a key.

Many keys are read slice by slice, so that they hold up nobody else: what is in no cache costs a hundred times as much.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Final, Protocol

from kvatlas.streams.state.cache import BytesCache

#: Keys that are read at once.
SLICE_KEYS: Final = 512
#: Slices follow one another without a pass of the event loop for so long.
_SLICES_SECONDS: Final = 0.002


class Newer(Protocol):
    """What is read of a :class:`kvatlas.streams.state.overlay.Overlay`."""

    values: dict[bytes, bytes | None]


class Readable(Protocol):
    """What is read of a :class:`kvatlas.streams.state.partition.PartitionState`; nothing here imports RocksDB."""

    @property
    def cache(self) -> BytesCache:
        """Values read or written lately."""

    @property
    def overlay(self) -> Newer:
        """What was applied and may be newer than the cache."""

    def answer(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys in order, None where there is none."""


def read_all(keys: Sequence[bytes], numbers: Sequence[int], partitions: Mapping[int, Readable]) -> list[bytes | None]:
    """Return the values of keys whose partitions are all here; empty bytes where nobody holds the key.

    Args:
        keys: block keys.
        numbers: partition of each of them.
        partitions: partition -> where to read it, of every one of ``numbers``.
    """
    if not keys:
        return []
    of_each = itemgetter(*numbers, numbers[0])  # of one alone it gives no tuple
    cached = {number: partition.cache.young for number, partition in partitions.items()}
    newer = {number: partition.overlay.values for number, partition in partitions.items()}
    found = map(dict.get, of_each(cached), keys)
    if any(newer.values()):
        found = map(dict.get, of_each(newer), keys, found)
    values: list[bytes | None] = list(found)
    if None in values:
        fill(values, keys, numbers, partitions)
    return values


async def read_slices(
    keys: Sequence[bytes], numbers: Sequence[int], readable: Callable[[set[int]], Mapping[int, Readable]]
) -> tuple[list[bytes | None], list[int]]:
    """Return the values of keys, and the rows of those that are not answered here.

    Args:
        keys: block keys.
        numbers: partition of each of them.
        readable: those of some partitions that may be read now; asked for each slice, since they come and go.
    """
    values: list[bytes | None] = []
    unanswered: list[int] = []
    until = time.perf_counter() + _SLICES_SECONDS
    for first in range(0, len(keys), SLICE_KEYS):
        if first and time.perf_counter() > until:
            await asyncio.sleep(0)
            until = time.perf_counter() + _SLICES_SECONDS
        some, theirs = keys[first : first + SLICE_KEYS], numbers[first : first + SLICE_KEYS]
        touched = set(theirs)
        here = readable(touched)
        if len(here) == len(touched):
            values += read_all(some, theirs, here)
        else:
            found: list[bytes | None] = [None] * len(some)
            fill(found, some, theirs, here)
            values += found
            unanswered += [row for row, number in enumerate(theirs, first) if number not in here]
    return values, unanswered


def fill(
    values: list[bytes | None], keys: Sequence[bytes], numbers: Sequence[int], partitions: Mapping[int, Readable]
) -> None:
    """Fill in what is None and whose partition is among ``partitions``: one multi-get a partition."""
    rows: dict[int, list[int]] = {number: [] for number in partitions}
    for row, value in enumerate(values):
        if value is None and numbers[row] in rows:
            rows[numbers[row]].append(row)
    for number, wanted in rows.items():
        if wanted:
            for row, value in zip(wanted, partitions[number].answer([keys[row] for row in wanted]), strict=True):
                values[row] = value or b""
