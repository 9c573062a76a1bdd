"""The host tier: slots belong to one block at a time, pins hold, and leases are all or nothing."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvatlas.connector.offload.host import HostTier, SlotLease
from kvatlas.connector.offload.policies import POLICIES

_SLOTS = 4
_KEYS = st.integers(0, 7).map(lambda number: b"%d" % number)


class HostBesideAModel(RuleBasedStateMachine):
    """Leases, fills and evictions in any order: what is in a slot is what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.host = HostTier(_SLOTS, POLICIES["lru"](_SLOTS))
        self.content: dict[int, bytes] = {}
        self.leases: list[SlotLease] = []
        self.filling: dict[bytes, int] = {}

    def _pinned(self) -> set[bytes]:
        return {key for lease in self.leases for key in (*lease.ready, *lease.empty)}

    @rule(keys=st.lists(_KEYS, min_size=1, max_size=4))
    def lease(self, keys: list[bytes]) -> None:
        pinned = self._pinned()
        lease = self.host.lease(keys)
        if lease is None:
            missing = {key for key in keys if key not in self.host}
            assert missing & set(self.filling) or len(pinned | set(keys)) > _SLOTS
            return
        assert {*lease.ready, *lease.empty} == set(keys)
        assert not set(lease.ready) & set(lease.empty)
        for key, slot in lease.ready.items():
            assert self.content[slot] == key
        for key, slot in lease.empty.items():
            assert self.content.get(slot) not in pinned, "a pinned block was pushed out"
            self.content[slot] = key
        self.filling.update(lease.empty)
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(good=st.booleans())
    def finish(self, good: bool) -> None:
        lease = self.leases.pop(0)
        for key, slot in lease.empty.items():
            del self.filling[key]
            if not good:
                del self.content[slot]
            self.host.filled(key, good=good)
        self.host.release([*lease.ready, *(lease.empty if good else ())])

    @rule(key=_KEYS)
    def evict(self, key: bytes) -> None:
        before = key in self.host
        assert self.host.evict(key) == (before and key not in self._pinned())
        if before and key not in self.host:
            self.content = {slot: held for slot, held in self.content.items() if held != key}

    @invariant()
    def slots_are_distinct(self) -> None:
        held = {key: item.slot for key, item in self.host._held.items()}
        assert len(set(held.values())) == len(held)
        assert len(held) + len(self.host._free) == _SLOTS
        assert all(self.content[slot] == key for key, slot in held.items())


TestHostBesideAModel = HostBesideAModel.TestCase


def test_a_lease_waits_for_room() -> None:
    """A lease that finds no room is granted as soon as another ends, and refused when none does in time."""
    host = HostTier(1, POLICIES["lru"](1))
    first = host.lease([b"a"])
    assert first is not None
    assert host.lease([b"b"], wait_seconds=0.01) is None
    got: list[SlotLease | None] = []
    waiting = threading.Thread(target=lambda: got.append(host.lease([b"b"], wait_seconds=90)))
    waiting.start()
    time.sleep(0.02)
    host.filled(b"a", good=True)
    host.release([b"a"])
    waiting.join(100)
    assert got == [SlotLease({}, {b"b": 0})]
    assert host.evicted == 1


def test_a_block_being_filled_is_waited_for_not_filled_twice() -> None:
    """Two transfers of one block share one slot."""
    host = HostTier(4, POLICIES["arc"](4))
    assert host.lease([b"a"]) == SlotLease({}, {b"a": 0})
    assert host.lease([b"a"]) is None
    host.filled(b"a", good=True)
    assert host.lease([b"a"]) == SlotLease({b"a": 0}, {})


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_threads_that_lease_at_once_never_share_a_slot(policy: str) -> None:
    """Under contention each slot has one owner at a time and every thread gets through."""
    host = HostTier(6, POLICIES[policy](6))
    owner: list[bytes | None] = [None] * 6
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            keys = [b"%d" % number for number in rng.sample(range(12), 2)]
            lease = host.lease(keys, wait_seconds=90)
            if lease is None:
                wrong.append("starved")
                return
            for key, slot in lease.empty.items():
                owner[slot] = key
            wrong.extend((key, slot) for key, slot in lease.ready.items() if owner[slot] != key)
            for key in lease.empty:
                host.filled(key, good=True)
            wrong.extend((key, slot) for key, slot in lease.empty.items() if owner[slot] != key)
            host.release(keys)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert wrong == []
    assert host.evicted > 0
