"""What the pure parts see of a table: one partition, as bytes.

The resolve and index functions read and write through a :class:`View` and know nothing of RocksDB, changelogs or
caches. A view gathers its writes; whoever made it applies them in one batch, or drops them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol


class View(Protocol):
    """One partition of a table during one flush. A read sees the writes of the same flush."""

    def get(self, key: bytes) -> bytes | None:
        """Return the value under ``key``, None when there is none."""

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value; visible at once to reads of this view."""

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Tell which keys will be read, so that they can be fetched in one go; a hint only."""


class BulkView(View, Protocol):
    """A view of the index, read and written by many keys at once: a call for each would cost more than the work."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys in order, None where there is none."""

    def write_all(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Write values, None removes; visible at once to reads of this view."""


class DictView:
    """A view over a plain dict: the library's store and the tests' model."""

    def __init__(self, values: dict[bytes, bytes] | None = None) -> None:
        self.values: dict[bytes, bytes] = {} if values is None else values

    def get(self, key: bytes) -> bytes | None:
        """Return the value under ``key``, None when there is none."""
        return self.values.get(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        self.values[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""
        self.values.pop(key, None)

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Do nothing: a dict has nothing to fetch."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys in order."""
        return list(map(self.values.get, keys))

    def write_all(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Write values, None removes."""
        write_each(self, writes)


def write_each(view: View, writes: Mapping[bytes, bytes | None]) -> None:
    """Write values one by one, for a view that has no shorter way."""
    for key, value in writes.items():
        if value is None:
            view.delete(key)
        else:
            view.put(key, value)
