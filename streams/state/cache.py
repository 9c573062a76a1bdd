"""A bounded cache of bytes in two generations.

A hit in the young generation costs one dict lookup and moves nothing, which is what a walk over hot prefixes needs.
When the young generation has half of the budget it becomes the old one and the old one is dropped; a hit in the old
generation moves the entry back to the young one. So an entry that is read once in a while stays, and one that is
not leaves after at most two turns: an approximation of least-recently-used without its list.
"""

from __future__ import annotations

from typing import Final

#: Memory of an entry beside its bytes: two bytes objects' headers and a dict slot at its usual fill (CPython 3.11).
ENTRY_BYTES: Final = 180


class BytesCache:
    """Bytes to bytes, bounded by an estimate of the memory it takes.

    Attributes:
        young: the generation that is filled; readers may look here directly on a hot path.
        hits: reads answered, apart from those that looked into ``young`` directly.
        misses: reads not answered.
    """

    __slots__ = ("_half", "_old_bytes", "_young_bytes", "hits", "misses", "old", "young")

    def __init__(self, max_bytes: int) -> None:
        self.young: dict[bytes, bytes] = {}
        self.old: dict[bytes, bytes] = {}
        self.hits = 0
        self.misses = 0
        self._young_bytes = 0
        self._old_bytes = 0
        self._half = max_bytes // 2

    @property
    def size_bytes(self) -> int:
        """Return the estimated memory, at most the bound plus one entry."""
        return self._young_bytes + self._old_bytes

    def resize(self, max_bytes: int) -> None:
        """Set a new bound; the old generation goes at once where it is above it, the young one at its next turn."""
        self._half = max_bytes // 2
        if self._old_bytes > self._half:
            self.old = {}
            self._old_bytes = 0
        if self._young_bytes > self._half:
            self._turn()

    def get(self, key: bytes) -> bytes | None:
        """Return the value, None when it is not here (which says nothing about the table)."""
        value = self.young.get(key)
        if value is not None:
            self.hits += 1
            return value
        value = self.old.pop(key, None)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self.put(key, value)
        return value

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value."""
        before = self.young.get(key)
        self._young_bytes += len(value) - len(before) if before is not None else len(key) + len(value) + ENTRY_BYTES
        self.young[key] = value
        self.old.pop(key, None)
        if self._young_bytes > self._half:
            self._turn()

    def apply(self, writes: dict[bytes, bytes | None]) -> None:
        """Take over what was written to the table; None removes."""
        young, old = self.young, self.old
        for key in old.keys() & writes.keys():
            del old[key]
        size = 0
        for key in young.keys() & writes.keys():
            size -= len(key) + len(young[key]) + ENTRY_BYTES
            if writes[key] is None:
                del young[key]
        kept: dict[bytes, bytes] = {key: value for key, value in writes.items() if value is not None}
        size += len(kept) * ENTRY_BYTES + sum(map(len, kept)) + sum(map(len, kept.values()))
        young.update(kept)
        self._young_bytes += size
        if self._young_bytes > self._half:
            self._turn()

    def clear(self) -> None:
        """Forget everything."""
        self.young = {}
        self.old = {}
        self._young_bytes = 0
        self._old_bytes = 0

    def __len__(self) -> int:
        return len(self.young) + len(self.old)

    def _turn(self) -> None:
        self.old = self.young
        self.young = {}
        self._old_bytes = self._young_bytes
        self._young_bytes = 0
