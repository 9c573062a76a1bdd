"""What the file tier holds, in memory: a pure structure, rebuilt from a scan of the directory.

A catalog is a hint for accounting and eviction. Whether a block can be read is decided by reading it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Found(NamedTuple):
    """One block name found on disk.

    Attributes:
        key: the block.
        inode: number of the file behind the name; the blocks of one segment share it.
        size_bytes: size of that file.
        last_use_ns: latest known use of this block.
    """

    key: bytes
    inode: int
    size_bytes: int
    last_use_ns: int


@dataclass
class Segment:
    """One file: what it costs and the blocks whose names lead to it."""

    size_bytes: int
    keys: set[bytes] = field(default_factory=set)
    last_use_ns: int = 0
    pins: int = 0


class Victim(NamedTuple):
    """A file chosen for eviction, with the names to take away."""

    inode: int
    size_bytes: int
    keys: tuple[bytes, ...]
    last_use_ns: int


class Catalog:
    """Blocks, the files behind them, and the bytes those take. Not thread-safe: the owner locks."""

    def __init__(self) -> None:
        self._inode_of: dict[bytes, int] = {}
        self._segments: dict[int, Segment] = {}
        self.used_bytes = 0

    def __len__(self) -> int:
        return len(self._inode_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._inode_of

    def keys(self) -> Collection[bytes]:
        """Return every block known."""
        return self._inode_of.keys()

    def inode_of(self, key: bytes) -> int | None:
        """Return the file behind a block."""
        return self._inode_of.get(key)

    def add(self, found: Found) -> None:
        """Note that a block's name leads to a file; it leads nowhere else from now on."""
        if self._inode_of.get(found.key) != found.inode:
            self.remove(found.key)
        segment = self._segments.get(found.inode)
        if segment is None:
            segment = self._segments[found.inode] = Segment(found.size_bytes)
            self.used_bytes += found.size_bytes
        segment.keys.add(found.key)
        segment.last_use_ns = max(segment.last_use_ns, found.last_use_ns)
        self._inode_of[found.key] = found.inode

    def remove(self, key: bytes) -> bool:
        """Forget a block; its file's bytes are free once no block leads to it. False when it was not known."""
        inode = self._inode_of.pop(key, None)
        if inode is None:
            return False
        segment = self._segments[inode]
        segment.keys.discard(key)
        if not segment.keys:
            del self._segments[inode]
            self.used_bytes -= segment.size_bytes
        return True

    def touch(self, keys: Iterable[bytes], used_ns: int) -> None:
        """Note a use of the blocks that are known."""
        for key in keys:
            inode = self._inode_of.get(key)
            if inode is not None:
                segment = self._segments[inode]
                segment.last_use_ns = max(segment.last_use_ns, used_ns)

    def pin(self, keys: Iterable[bytes]) -> list[int]:
        """Keep the files behind ``keys`` from being chosen; returns what :meth:`unpin` takes."""
        pinned: list[int] = []
        for key in keys:
            inode = self._inode_of.get(key)
            if inode is not None:
                self._segments[inode].pins += 1
                pinned.append(inode)
        return pinned

    def unpin(self, pinned: Iterable[int]) -> None:
        """End what :meth:`pin` began."""
        for inode in pinned:
            segment = self._segments.get(inode)
            if segment is not None:
                segment.pins = max(0, segment.pins - 1)

    def victims(self, free_bytes: int) -> list[Victim]:
        """Return the files longest unused that together hold at least ``free_bytes``, pinned ones left out."""
        if free_bytes <= 0:
            return []
        heap = [(segment.last_use_ns, inode) for inode, segment in self._segments.items() if not segment.pins]
        heapq.heapify(heap)
        chosen: list[Victim] = []
        while heap and free_bytes > 0:
            last_use_ns, inode = heapq.heappop(heap)
            segment = self._segments[inode]
            chosen.append(Victim(inode, segment.size_bytes, tuple(sorted(segment.keys)), last_use_ns))
            free_bytes -= segment.size_bytes
        return chosen


@dataclass(frozen=True, kw_only=True)
class DiskBudget:
    """How much of a file system the tier may take.

    Attributes:
        max_bytes: limit in bytes; None for none.
        max_percent: limit as a share of the whole file system, 0 to 100; None for none.
        high_watermark: share of the limit at which eviction begins.
        low_watermark: share of the limit that eviction goes down to.
    """

    max_bytes: int | None = None
    max_percent: float | None = 80.0
    high_watermark: float = 0.95
    low_watermark: float = 0.85

    def limit_bytes(self, total_bytes: int) -> int:
        """Return the limit on a file system of ``total_bytes``."""
        limits = [total_bytes]
        if self.max_bytes is not None:
            limits.append(self.max_bytes)
        if self.max_percent is not None:
            limits.append(int(total_bytes * self.max_percent / 100))
        return min(limits)

    def excess_bytes(self, used_bytes: int, limit_bytes: int, incoming_bytes: int = 0) -> int:
        """Return how much to evict: nothing below the high watermark, else down to the low one."""
        after = used_bytes + incoming_bytes
        if after <= limit_bytes * self.high_watermark:
            return 0
        return max(0, after - int(limit_bytes * self.low_watermark))
