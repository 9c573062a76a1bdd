"""Keeping the file tier within its budget."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvatlas.connector.files import scan
from kvatlas.connector.files.catalog import Budget
from kvatlas.connector.files.fs import FileSystem
from kvatlas.connector.files.holdings import Holdings

_LIMIT_SECONDS: Final = 5.0
_RELIEF_SECONDS: Final = 5.0
#: Share of the bytes in use that goes when the file system is full.
_RELIEF_SHARE: Final = 0.05


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
        budget: Budget,
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
        self._asked = (0, -_LIMIT_SECONDS - 1)
        self._relieved = -_RELIEF_SECONDS - 1

    def limit_bytes(self) -> int:
        """Return how much the tier may take now."""
        limit, moment = self._asked
        now = self._monotonic()
        # Asked anew only now and then: on a remote file system the question is a round trip, and stores ask twice.
        if limit and now - moment < _LIMIT_SECONDS:
            return limit
        try:
            limit = self._budget.limit_bytes(self._fs.space(self._directory).total)
        except OSError:
            return self._budget.max_bytes or 1 << 62
        self._asked = (limit, now)
        return limit

    def exceeded(self) -> bool:
        """Return whether eviction is due."""
        return self._excess(self._holdings.used_bytes) > 0

    def make_room(self, incoming: int) -> bool:
        """Return whether ``incoming`` bytes fit the budget, after evicting if they would not."""
        limit = self.limit_bytes()
        if self._holdings.used_bytes + incoming <= limit:
            return True
        self.evict_excess(incoming)
        return self._holdings.used_bytes + incoming <= limit

    def evict_excess(self, incoming: int = 0) -> int:
        """Evict what was longest unused until the low watermark is met; returns the bytes freed."""
        with self._evicting:
            victims = self._holdings.victims(lambda used: self._excess(used, incoming))
            return sum(self._holdings.evict_file(victim) for victim in victims)

    def relieve(self, needed: int) -> int:
        """Give room back after the file system itself was full; returns the bytes freed.

        Other data may fill the disk while the budget is not used up. What is quarantined goes, and then so much of
        what was longest unused as was needed, or a share of everything; no more until some seconds later, so that
        whoever goes on filling the disk does not cost all blocks at once.
        """
        with self._evicting:
            now = self._monotonic()
            if now - self._relieved < _RELIEF_SECONDS:
                return 0
            self._relieved = now
            freed = scan.empty_quarantine(self._fs, self._directory, 0, 0)
            victims = self._holdings.victims(lambda used: max(needed, int(used * _RELIEF_SHARE), self._excess(used)))
            return freed + sum(self._holdings.evict_file(victim) for victim in victims)

    def _excess(self, used: int, incoming: int = 0) -> int:
        return self._budget.excess_bytes(used, self.limit_bytes(), incoming)
