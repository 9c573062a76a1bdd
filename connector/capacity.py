"""Keeping the file tier within its budget."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvatlas.connector import scan
from kvatlas.connector.catalog import Budget
from kvatlas.connector.fs import FileSystem
from kvatlas.connector.holdings import Holdings

_LIMIT_SECONDS: Final = 5.0


class Capacity:
    """The budget of one directory. Thread-safe.

    Args:
        fs: the file system.
        directory: the fingerprint's directory.
        budget: how much may be taken.
        holdings: what is there.
        quarantine_files: damaged files kept while there is no room.
        monotonic: seconds that never go back; the size of the file system is asked for once in a while.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        budget: Budget,
        holdings: Holdings,
        *,
        quarantine_files: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._fs = fs
        self._directory = directory
        self._budget = budget
        self._holdings = holdings
        self._quarantine_files = quarantine_files
        self._monotonic = monotonic
        self._evicting = threading.Lock()
        self._asked = (0, -_LIMIT_SECONDS - 1)

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
            if victims:
                scan.empty_quarantine(self._fs, self._directory, self._quarantine_files)
            return sum(self._holdings.evict_file(victim) for victim in victims)

    def _excess(self, used: int, incoming: int = 0) -> int:
        return self._budget.excess_bytes(used, self.limit_bytes(), incoming)
