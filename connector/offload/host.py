"""The host tier: a fixed number of slots, who is in them, and who may not be moved.

Holds no bytes itself: slot ``i`` is row ``i`` of the host memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvatlas.connector.offload.policies import Policy


@dataclass
class _Resident:
    slot: int
    ready: bool = False
    pins: int = 0


class SlotLease(NamedTuple):
    """Slots held for one transfer; all are pinned until released.

    Attributes:
        ready: key -> slot of blocks that hold their bytes.
        empty: key -> slot of blocks that the holder must fill, then :meth:`HostTier.filled`.
    """

    ready: dict[bytes, int]
    empty: dict[bytes, int]


class HostTier:
    """Slots by key. Thread-safe; a lease is taken as a whole or not at all, so holders never wait on each other.

    Args:
        slots: how many blocks fit.
        policy: order of eviction.
    """

    def __init__(self, slots: int, policy: Policy) -> None:
        self.slots = slots
        self._policy = policy
        self._free = list(range(slots - 1, -1, -1))
        self._held: dict[bytes, _Resident] = {}
        self._changed = threading.Condition()
        self.evicted = 0

    def __contains__(self, key: bytes) -> bool:
        with self._changed:
            found = self._held.get(key)
            return found is not None and found.ready

    def __len__(self) -> int:
        with self._changed:
            return sum(item.ready for item in self._held.values())

    def lease(self, keys: Sequence[bytes], wait_seconds: float = 0.0) -> SlotLease | None:
        """Pin the blocks that are here and take slots for the others; None when there is no room in time.

        A block that another transfer is filling counts as no room until that ends.
        """
        wanted = list(dict.fromkeys(keys))
        with self._changed:
            found: list[SlotLease] = []

            def attempt() -> bool:
                lease = self._try(wanted)
                if lease is not None:
                    found.append(lease)
                return lease is not None

            self._changed.wait_for(attempt, wait_seconds)
            return found[0] if found else None

    def _try(self, wanted: Sequence[bytes]) -> SlotLease | None:
        here = [key for key in wanted if key in self._held]
        if not all(self._held[key].ready for key in here):
            return None
        missing = [key for key in wanted if key not in self._held]
        keep = set(here)

        def evictable(key: bytes) -> bool:
            item = self._held[key]
            return item.ready and not item.pins and key not in keep

        if sum(map(evictable, self._held)) + len(self._free) < len(missing):
            return None
        while len(self._free) < len(missing):
            victim = self._policy.victim(evictable)
            if victim is None:
                return None
            self._free.append(self._held.pop(victim).slot)
            self.evicted += 1
        ready, empty = {}, {}
        for key in here:
            self._held[key].pins += 1
            self._policy.hit(key)
            ready[key] = self._held[key].slot
        for key in missing:
            slot = empty[key] = self._free.pop()
            self._held[key] = _Resident(slot, pins=1)
        return SlotLease(ready, empty)

    def filled(self, key: bytes, *, good: bool) -> None:
        """End the filling of a leased empty slot: its block is here from now on, or its slot is free again."""
        with self._changed:
            if good:
                self._held[key].ready = True
                self._policy.insert(key)
            else:
                self._free.append(self._held.pop(key).slot)
            self._changed.notify_all()

    def release(self, keys: Sequence[bytes]) -> None:
        """Unpin blocks of a lease; those whose filling failed are passed over."""
        with self._changed:
            for key in keys:
                item = self._held.get(key)
                if item is not None and item.pins:
                    item.pins -= 1
            self._changed.notify_all()

    def evict(self, key: bytes, gone: Callable[[], None] = lambda: None) -> bool:
        """Drop a block that no transfer holds."""
        with self._changed:
            item = self._held.get(key)
            if item is None or not item.ready or item.pins:
                return False
            del self._held[key]
            self._policy.remove(key)
            self._free.append(item.slot)
            gone()
            self._changed.notify_all()
            return True
