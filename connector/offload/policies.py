"""Which block the host tier gives up: pure, pluggable, told of every use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

Evictable = Callable[[bytes], bool]


class Policy(Protocol):
    """Order of eviction. Every key in it is resident; ``victim`` takes the key out."""

    def insert(self, key: bytes) -> None:
        """A block became resident."""

    def hit(self, key: bytes) -> None:
        """A resident block was used."""

    def remove(self, key: bytes) -> None:
        """A block left for another reason than ``victim``."""

    def victim(self, evictable: Evictable) -> bytes | None:
        """Take out and return the next block that may go; None when there is none."""


class Lru:
    """Longest unused first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:  # noqa: D102
        self._order[key] = None
        self._order.move_to_end(key)

    def hit(self, key: bytes) -> None:  # noqa: D102
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: bytes) -> None:  # noqa: D102
        self._order.pop(key, None)

    def victim(self, evictable: Evictable) -> bytes | None:  # noqa: D102
        found = next((key for key in self._order if evictable(key)), None)
        if found is not None:
            del self._order[found]
        return found


class Arc:
    """Adaptive replacement (Megiddo and Modha, 2003): scans do not push out what is used again and again.

    ``recent`` and ``frequent`` are resident; their ghosts remember what left each, and a block that comes back
    from a ghost list moves the balance towards that list.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._target = 0.0
        self._recent: OrderedDict[bytes, None] = OrderedDict()
        self._frequent: OrderedDict[bytes, None] = OrderedDict()
        self._recent_ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._frequent_ghosts: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:  # noqa: D102
        gone_recent, gone_frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if key in self._recent_ghosts:
            self._target = min(self.capacity, self._target + max(1.0, gone_frequent / gone_recent))
            del self._recent_ghosts[key]
            self._frequent[key] = None
        elif key in self._frequent_ghosts:
            self._target = max(0.0, self._target - max(1.0, gone_recent / gone_frequent))
            del self._frequent_ghosts[key]
            self._frequent[key] = None
        else:
            self._recent[key] = None

    def hit(self, key: bytes) -> None:  # noqa: D102
        if key in self._recent:
            del self._recent[key]
            self._frequent[key] = None
        elif key in self._frequent:
            self._frequent.move_to_end(key)

    def remove(self, key: bytes) -> None:  # noqa: D102
        self._recent.pop(key, None)
        self._frequent.pop(key, None)

    def victim(self, evictable: Evictable) -> bytes | None:  # noqa: D102
        pairs = [(self._recent, self._recent_ghosts), (self._frequent, self._frequent_ghosts)]
        if len(self._recent) <= self._target:
            pairs.reverse()
        for resident, ghosts in pairs:
            found = next((key for key in resident if evictable(key)), None)
            if found is not None:
                del resident[found]
                ghosts[found] = None
                while len(ghosts) > self.capacity:
                    ghosts.popitem(last=False)
                return found
        return None


POLICIES: dict[str, Callable[[int], Policy]] = {"lru": Lru, "arc": Arc}
