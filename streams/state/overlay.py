"""Uncommitted changes of one partition: what its writer applies to, and what readers see over the database.

Applying and committing take turns of their own: while one cut of changes is on its way to the changelog, the next one
gathers. Readers see both at once: the changes come from source records that Kafka has, so they are true whether or not
this worker lives to commit them, and the next owner comes to the same from the same records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from kvatlas.streams.state.cache import BytesCache

_ABSENT: Final = object()


class ChangeSet(NamedTuple):
    """ChangeSet of a partition that are committed together.

    Attributes:
        writes: key -> value, None removes; in the order of the first write of each key.
        source_offset: last source record that they reflect.
        receive_ns: newest receive time in them, bridge clock.
    """

    writes: Mapping[bytes, bytes | None]
    source_offset: int
    receive_ns: int


class Committed(Protocol):
    """What an overlay reads of the partition below it."""

    @property
    def cache(self) -> BytesCache:
        """Values read or written lately, none of them newer than the database."""

    def get(self, key: bytes) -> bytes | None:
        """Return a value from the cache or the database."""

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return values straight from the database in one multi-get."""

    async def fetch_apart(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return values straight from the database, in a thread when there are many keys."""


class Overlay:
    """The changes of one partition that are applied and not committed; there is one writer at a time.

    A :class:`kvatlas.streams.index.view.View` for the writer: a read sees its own writes, then the partition.

    Args:
        below: the partition.

    Attributes:
        values: what is newer than the partition, or was fetched ahead from it; None where there is no value. Readers
            look into the cache first and take what is in here instead, whichever of the two it is: it is never older.
    """

    __slots__ = ("_advanced", "_below", "_committing", "_cut", "_receive_ns", "_source_offset", "_writes", "values")

    def __init__(self, below: Committed) -> None:
        self._below = below
        self.values: dict[bytes, bytes | None] = {}
        self._writes: dict[bytes, bytes | None] = {}
        self._cut: dict[bytes, bytes | None] = {}
        self._source_offset, self._receive_ns = -1, 0
        self._advanced = self._committing = False

    @property
    def reflected(self) -> tuple[int, int] | None:
        """Return source offset and receive time of what was applied; None when all of it is committed."""
        return (self._source_offset, self._receive_ns) if self._advanced or self._committing else None

    # --- the writer's reads and writes ----------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """Return the value under ``key``, None when there is none."""
        value: Any = self.values.get(key, _ABSENT)
        if value is _ABSENT:
            value = self._below.get(key)
        return value  # type: ignore[no-any-return]

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value; visible at once to all readers."""
        self._writes[key] = self.values[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""
        self._writes[key] = self.values[key] = None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys in order, None where there is none; quick for keys that were fetched ahead."""
        try:
            return list(map(self.values.__getitem__, keys))
        except KeyError:
            return [self.get(key) for key in keys]

    def write_all(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Write values, None removes; visible at once to all readers."""
        self.values.update(writes)
        self._writes.update(writes)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Fetch what is neither cached nor written in one multi-get."""
        missing = self._missing(keys)
        if missing:
            self.values.update(zip(missing, self._below.fetch(missing), strict=True))

    async def prefetch_apart(self, keys: Iterable[bytes]) -> None:
        """Fetch like :meth:`prefetch`, beside the event loop when there are many; only the writer may."""
        missing = self._missing(keys)
        if missing:
            found = await self._below.fetch_apart(missing)
            self.values.update(zip(missing, found, strict=True))

    def _missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return the keys that only the database can tell; what the cache holds is taken over on the way."""
        known, cache = self.values, self._below.cache
        # Nearly all keys of a message are new, or nearly all are known: so loops in C for both.
        missing = [key for key in keys if key not in known]
        if not missing:
            return missing
        values = list(map(cache.young.get, missing))
        absent = values.count(None)
        if absent < len(missing):
            cache.hits += len(missing) - absent
            known.update(pair for pair in zip(missing, values, strict=True) if pair[1] is not None)
            missing = [key for key, value in zip(missing, values, strict=True) if value is None]
        if cache.old and not cache.old.keys().isdisjoint(missing):
            old = [key for key in missing if key in cache.old]
            known.update((key, cache.get(key)) for key in old)
            missing = [key for key in missing if key not in known]
        cache.misses += len(missing)
        return missing

    # --- from applied to committed --------------------------------------------------------------------------------

    def advance(self, source_offset: int, receive_ns: int) -> None:
        """Take note of the source records that were applied.

        Args:
            source_offset: last one before which nothing is left to be applied.
            receive_ns: newest receive time among them, bridge clock.
        """
        self._advanced, self._source_offset = True, source_offset
        self._receive_ns = max(self._receive_ns, receive_ns)

    def cut(self) -> ChangeSet:
        """Return what was applied since the last cut; what is applied from now on gathers on top of it."""
        self._cut, self._writes = self._writes, {}
        self._advanced, self._committing = False, True
        self.values = dict(self._cut)
        return ChangeSet(self._cut, self._source_offset, self._receive_ns)

    def committed(self, changes: ChangeSet) -> None:
        """Take note that the partition reflects changes: the last cut, or what a sweep has written beside it."""
        if changes.writes is not self._cut:
            for key in changes.writes:
                if key not in self._writes and key not in self._cut:
                    self.values.pop(key, None)  # fetched ahead, and older than the database now
            return
        self._cut, self._committing = {}, False
        if not self._writes:
            self.values = {}

    def drop(self) -> None:
        """Forget what is not committed: it is applied again by whoever owns the partition next."""
        self.values, self._writes, self._cut = {}, {}, {}
        self._advanced = self._committing = False


class Draft:
    """Writes of one large message over an overlay: nobody else sees them before all of it is applied.

    What is committed meanwhile thus holds the message whole or not at all. A view for whoever applies the message.

    Args:
        overlay: what reads go on to, and :meth:`apply` writes to.
    """

    __slots__ = ("_overlay", "_writes")

    def __init__(self, overlay: Overlay) -> None:
        self._overlay = overlay
        self._writes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        """Return the value under ``key``, None when there is none."""
        value: Any = self._writes.get(key, _ABSENT)
        return self._overlay.get(key) if value is _ABSENT else value

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value; visible at once to reads of this draft."""
        self._writes[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""
        self._writes[key] = None

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Fetch what is neither cached nor written in one multi-get."""
        self._overlay.prefetch(keys)

    def apply(self) -> None:
        """Write everything to the overlay."""
        for key, value in self._writes.items():
            if value is None:
                self._overlay.delete(key)
            else:
                self._overlay.put(key, value)
        self._writes.clear()
