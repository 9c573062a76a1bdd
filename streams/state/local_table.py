"""A table outside the workers: a RocksDB of its own behind the same view that the pure functions write through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvatlas.streams.state.database import RocksBudget, open_database, write_batch

_FLUSH_ENTRIES: Final = 200_000
_CACHE_ENTRIES: Final = 1_000_000
_MISSING: Final = object()


class LocalTable:
    """A key-value table in a folder; reads see all writes, memory is bounded. Close it before the folder is moved."""

    def __init__(self, path: Path, budget: RocksBudget) -> None:
        self.path = path
        self._database: Any = open_database(path, budget)
        self._pending: dict[bytes, bytes | None] = {}
        self._cache: dict[bytes, bytes | None] = {}
        # As long as a table that began empty fits in memory, what is not there is nowhere.
        self._whole = next(iter(self._database.keys()), None) is None

    def get(self, key: bytes) -> bytes | None:
        """Return the value under ``key``, None when there is none."""
        found: Any = self._pending.get(key, _MISSING)
        if found is _MISSING:
            found = self._cache.get(key, _MISSING)
        if found is _MISSING:
            if self._whole:
                return None
            found = self._cache[key] = self._database.get(key)
        value: bytes | None = found
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        self._pending[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""
        self._pending[key] = None

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys in order."""
        return [self.get(key) for key in keys]

    def write_all(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Write values, None removes."""
        self._pending.update(writes)

    def clear(self) -> None:
        """Remove everything."""
        self._database.delete_range(b"", b"\xff" * 64)
        self._pending.clear()
        self._cache.clear()
        self._whole = True

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Read keys that are not in memory yet in one go."""
        if self._whole:
            return
        missing = [key for key in keys if key not in self._pending and key not in self._cache]
        if missing:
            self._cache.update(zip(missing, self._database.get(missing), strict=True))

    def settle(self, *, force: bool = False) -> None:
        """Write what is pending to the database when it has become much, or when forced."""
        # What fits in memory is not written before it must be: much of it is written over, or never kept.
        if not force and len(self._pending) < (_CACHE_ENTRIES if self._whole else _FLUSH_ENTRIES):
            return
        batch = write_batch()
        for key, value in self._pending.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        self._database.write(batch)
        if len(self._cache) + len(self._pending) > _CACHE_ENTRIES:
            self._cache.clear()
            self._whole = False
        self._cache.update(self._pending)
        self._pending.clear()

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield all entries in the order of their keys."""
        self.settle(force=True)
        for key, value in self._database.items():
            yield bytes(key), bytes(value)

    def close(self, *, keep: bool = True) -> None:
        """Write everything, unless it is not to be kept, and let go of the folder."""
        if keep:
            self.settle(force=True)
            self._database.flush()
        self._database.close()
        self._database = None

    def estimated_entries(self) -> int:
        """Return about how many entries there are, as RocksDB estimates it."""
        return int(self._database.property_int_value("rocksdb.estimate-num-keys") or 0) + len(self._pending)
