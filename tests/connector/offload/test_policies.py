"""Order of eviction: LRU beside a list, ARC beside the paper's algorithm written plainly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.connector.offload.policies import POLICIES, Arc, Lru, Policy

_ACCESSES = st.lists(st.integers(0, 11), max_size=200)
_CAPACITY = st.integers(1, 6)


def name(number: int) -> bytes:
    return b"%d" % number


def use(policy: Policy, resident: set[int], capacity: int, number: int) -> None:
    """Access a block as the host tier does: a hit, or a victim when full and then the newcomer."""
    if number in resident:
        policy.hit(name(number))
        return
    if len(resident) == capacity:
        victim = policy.victim(lambda _: True)
        assert victim is not None
        resident.remove(int(victim))
    policy.insert(name(number))
    resident.add(number)


@given(capacity=_CAPACITY, accesses=_ACCESSES)
def test_lru_keeps_what_was_used_last(capacity: int, accesses: list[int]) -> None:
    """The residents are always the last different blocks accessed."""
    policy, resident = Lru(capacity), set[int]()
    for at, number in enumerate(accesses):
        use(policy, resident, capacity, number)
        latest = list(dict.fromkeys(reversed(accesses[: at + 1])))[:capacity]
        assert resident == set(latest)


class PlainArc:
    """Figure 4 of the paper on lists, most recent last, where room is made before a ghost is looked at."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.target = capacity, 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def access(self, number: int) -> None:
        for resident in (self.t1, self.t2):
            if number in resident:
                resident.remove(number)
                self.t2.append(number)
                return
        if len(self.t1) + len(self.t2) == self.capacity:
            first = bool(self.t1) and (len(self.t1) > self.target or not self.t2)
            source, ghosts = (self.t1, self.b1) if first else (self.t2, self.b2)
            ghosts.append(source.pop(0))
            del ghosts[: -self.capacity]
        if number in self.b1:
            self.target = min(self.capacity, self.target + max(1.0, len(self.b2) / len(self.b1)))
            self.b1.remove(number)
            self.t2.append(number)
        elif number in self.b2:
            self.target = max(0.0, self.target - max(1.0, len(self.b1) / len(self.b2)))
            self.b2.remove(number)
            self.t2.append(number)
        else:
            self.t1.append(number)


@given(capacity=_CAPACITY, accesses=_ACCESSES)
@settings(max_examples=200)
def test_arc_is_the_plain_algorithm(capacity: int, accesses: list[int]) -> None:
    """After every access ARC holds what the plain algorithm holds."""
    policy, resident, plain = Arc(capacity), set[int](), PlainArc(capacity)
    for number in accesses:
        use(policy, resident, capacity, number)
        plain.access(number)
        assert resident == {*plain.t1, *plain.t2}


def test_arc_outlives_a_scan() -> None:
    """Blocks used twice stay through a scan of blocks used once; under LRU they would not."""

    def survivors(make: Callable[[int], Policy]) -> set[int]:
        policy, resident = make(8), set[int]()
        for number in [0, 1, 2, 3, 0, 1, 2, 3, *range(100, 140)]:
            use(policy, resident, 8, number)
        return resident & {0, 1, 2, 3}

    assert survivors(Arc) == {0, 1, 2, 3}
    assert survivors(Lru) == set()


@pytest.mark.parametrize("kind", sorted(POLICIES))
def test_what_may_not_go_is_passed_over(kind: str) -> None:
    """A victim is always evictable, and there is none when nothing is."""
    policy = POLICIES[kind](3)
    for number in range(3):
        policy.insert(name(number))
    assert policy.victim(lambda key: key == name(1)) == name(1)
    assert policy.victim(lambda _: False) is None
    policy.remove(name(0))
    assert policy.victim(lambda _: True) == name(2)
    assert policy.victim(lambda _: True) is None


@given(capacity=_CAPACITY, accesses=_ACCESSES, pinned=st.sets(st.integers(0, 11), max_size=4))
def test_ghosts_are_bounded_whatever_is_pinned(capacity: int, accesses: list[int], pinned: set[int]) -> None:
    """ARC remembers at most twice its capacity of blocks that left, and no resident is a ghost."""
    policy, resident = Arc(capacity), set[int]()
    for number in accesses:
        if number in resident:
            policy.hit(name(number))
            continue
        if len(resident) >= capacity:
            victim = policy.victim(lambda key: int(key) not in pinned)
            if victim is None:
                continue
            resident.remove(int(victim))
        policy.insert(name(number))
        resident.add(number)
        ghosts = {*policy._recent_ghosts, *policy._frequent_ghosts}
        assert len(ghosts) <= 2 * capacity
        assert not ghosts & {name(number) for number in resident}
