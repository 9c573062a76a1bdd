"""Keeping the file tier within its budget, and within what others leave of the disk.

Engines that share a disk know nothing of each other. Each looks at the free space: where it runs out, every engine
gives up the same share of what it holds, so that those who hold much give much and shares become even, and nobody
writes into a disk that is known to be full.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvatlas.connector.files import scan
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.fs import FileSystem, Space
from kvatlas.connector.files.holdings import Holdings

#: How often the file system is asked for its free space, and how often where little is left that others may take.
_LIMIT_SECONDS: Final = 5.0
_NEAR_SECONDS: Final = 0.25
_NEAR_FREE: Final = 0.1
_RELIEF_SECONDS: Final = 2.0
#: Share of the bytes in use that goes when the file system is full, or nearly so.
_RELIEF_SHARE: Final = 0.05
#: Free share of the file system below which room is given back, and half of it, below which nothing is stored.
_KEEP_FREE: Final = 0.02
#: How long nothing is stored after the file system was full and nothing could be given back.
_FULL_SECONDS: Final = 1.0


class Capacity:
    """The budget of one directory. Thread-safe.

    Args:
        fs: the file system.
        directory: the fingerprint's directory.
        budget: how much may be taken.
        holdings: what is there.
        monotonic: seconds that never go back; the size of the file system is asked for once in a while.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        budget: DiskBudget,
        holdings: Holdings,
        *,
        monotonic: Callable[[], float],
    ) -> None:
        self._fs = fs
        self._directory = directory
        self._budget = budget
        self._holdings = holdings
        self._monotonic = monotonic
        self._evicting = threading.Lock()
        self._asked = -_LIMIT_SECONDS - 1
        self._space = Space(0, 0)
        self._used_then = 0
        self._relieved = -_RELIEF_SECONDS - 1
        self._full_until = 0.0

    def limit_bytes(self) -> int:
        """Return how much the tier may take now."""
        if not self._look():
            return self._budget.max_bytes or 1 << 62
        return self._budget.limit_bytes(self._space.total)

    def _look(self) -> bool:
        """Ask the file system for its size and free space, now and then; False while it never answered."""
        # On a remote file system the question is a round trip, and stores ask twice.
        now = self._monotonic()
        near = self._free_bytes() < self._space.total * _NEAR_FREE
        if not self._space.total or now - self._asked >= (_NEAR_SECONDS if near else _LIMIT_SECONDS):
            try:
                self._space = self._fs.space(self._directory)
            except OSError:
                return self._space.total > 0
            self._asked, self._used_then = now, self._holdings.used_bytes
        return True

    def _free_bytes(self) -> int:
        """Return the free space: what it was when last asked for, less what we took since."""
        return self._space.free - (self._holdings.used_bytes - self._used_then)

    def _crowded(self) -> bool:
        return self._look() and self._free_bytes() < self._space.total * _KEEP_FREE

    def exceeded(self) -> bool:
        """Return whether eviction is due."""
        due = self._crowded() and self._monotonic() - self._relieved >= _RELIEF_SECONDS
        return due or self._budget.excess_bytes(self._holdings.used_bytes, self.limit_bytes()) > 0

    @property
    def full(self) -> bool:
        """Whether the disk, not the budget, has no room."""
        if self._monotonic() < self._full_until:
            return True
        return self._look() and self._free_bytes() < self._space.total * _KEEP_FREE / 2

    def make_room(self, incoming: int) -> bool:
        """Return whether ``incoming`` bytes fit disk and budget, after evicting if they would not."""
        if self.full:
            self.relieve(incoming)
            if self.full:
                return False
        limit = self.limit_bytes()
        if self._holdings.used_bytes + incoming <= limit:
            return True
        self.evict_excess(incoming)
        return self._holdings.used_bytes + incoming <= limit

    def evict_excess(self, incoming: int = 0) -> int:
        """Evict what was longest unused until the low watermark is met; returns the bytes freed."""
        if self._crowded():
            return self.relieve(incoming)
        limit = self.limit_bytes()  # not below: the holdings are locked while they ask how much must go
        with self._evicting:
            victims = self._holdings.victims(lambda used: self._budget.excess_bytes(used, limit, incoming))
            return sum(self._holdings.evict_file(victim) for victim in victims)

    def refused(self, needed: int) -> None:
        """Note that the file system had no room for ``needed`` bytes: nothing is stored until some was given back."""
        self._full_until = self._monotonic() + _FULL_SECONDS
        self._asked = -_LIMIT_SECONDS - 1
        self.relieve(needed)

    def relieve(self, needed: int) -> int:
        """Give room back where the file system itself is full; returns the bytes freed.

        Other data may fill the disk while the budget is not used up. What is quarantined goes, and then so much of
        what was longest unused as was needed, or a share of everything; no more until some seconds later, so that
        whoever goes on filling the disk does not cost all blocks at once.
        """
        with self._evicting:
            now = self._monotonic()
            if now - self._relieved < _RELIEF_SECONDS:
                return 0
            self._relieved = now
            freed, limit = scan.empty_quarantine(self._fs, self._directory, 0, 0), self.limit_bytes()
            victims = self._holdings.victims(
                lambda used: max(needed, int(used * _RELIEF_SHARE), self._budget.excess_bytes(used, limit))
            )
            freed += sum(self._holdings.evict_file(victim) for victim in victims)
            if freed >= needed:
                self._full_until = 0.0
            self._asked = -_LIMIT_SECONDS - 1
            return freed
