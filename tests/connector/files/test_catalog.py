"""The catalog beside a plain model, and the budget's arithmetic."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvatlas.connector.files.catalog import Catalog, DiskBudget, Found

_KEYS = st.integers(0, 9).map(lambda number: b"%d" % number)
_INODES = st.integers(1, 5)


def _size(inode: int) -> int:
    return inode * 1000


class CatalogBesideAModel(RuleBasedStateMachine):
    """Names lead to files, as in a dict; files cost once; pins protect files."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()
        self.file_of: dict[bytes, int] = {}
        self.used: dict[int, int] = {}
        self.pinned: list[list[int]] = []
        self.now = 0

    def _forget_unnamed(self) -> None:
        for inode in set(self.used) - set(self.file_of.values()):
            del self.used[inode]
            self.pinned = [[one for one in pins if one != inode] for pins in self.pinned]

    @rule(key=_KEYS, inode=_INODES)
    def add(self, key: bytes, inode: int) -> None:
        self.now += 1
        self.catalog.add(Found(key, inode, _size(inode), self.now))
        old = self.file_of.pop(key, None)
        if old != inode:
            self._forget_unnamed()
        self.file_of[key] = inode
        self.used[inode] = self.now

    @rule(key=_KEYS)
    def remove(self, key: bytes) -> None:
        assert self.catalog.remove(key) == (self.file_of.pop(key, None) is not None)
        self._forget_unnamed()

    @rule(key=_KEYS)
    def touch(self, key: bytes) -> None:
        self.now += 1
        self.catalog.touch([key], self.now)
        if key in self.file_of:
            self.used[self.file_of[key]] = self.now

    @rule(keys=st.lists(_KEYS, max_size=3))
    def pin(self, keys: list[bytes]) -> None:
        pinned = self.catalog.pin(keys)
        assert Counter(pinned) == Counter(self.file_of[key] for key in keys if key in self.file_of)
        self.pinned.append(pinned)

    @rule()
    def unpin(self) -> None:
        if self.pinned:
            self.catalog.unpin(self.pinned.pop())

    @rule(free=st.integers(0, 12_000))
    def choose(self, free: int) -> None:
        victims = self.catalog.victims(free)
        held = {inode for pins in self.pinned for inode in pins}
        order = sorted((inode for inode in self.used if inode not in held), key=lambda inode: self.used[inode])
        wanted: list[int] = []
        for inode in order:
            if sum(map(_size, wanted)) >= free:
                break
            wanted.append(inode)
        assert [victim.inode for victim in victims] == wanted
        for victim in victims:
            assert set(victim.keys) == {key for key, inode in self.file_of.items() if inode == victim.inode}

    @invariant()
    def same(self) -> None:
        found = self.catalog.keys()
        assert {key: self.catalog.inode_of(key) for key in found} == self.file_of
        assert len(self.catalog) == len(self.file_of)
        assert self.catalog.used_bytes == sum(_size(inode) for inode in set(self.file_of.values()))


TestCatalogBesideAModel = CatalogBesideAModel.TestCase


@given(
    used=st.integers(0, 10**6),
    incoming=st.integers(0, 10**5),
    limit=st.integers(0, 10**6),
    marks=st.tuples(st.floats(0.1, 1.0), st.floats(0.1, 1.0)),
)
def test_eviction_begins_at_the_high_mark_and_ends_at_the_low(
    used: int, incoming: int, limit: int, marks: tuple[float, float]
) -> None:
    """Below the high watermark nothing goes; above it, so much that the low one holds."""
    low, high = sorted(marks)
    excess = DiskBudget(high_watermark=high, low_watermark=low).excess_bytes(used, limit, incoming)
    if used + incoming <= limit * high:
        assert excess == 0
    else:
        assert used + incoming - excess <= limit * low + 1
        assert excess >= 0


def test_the_smallest_limit_counts() -> None:
    """Bytes and percent both bind, and neither may exceed the file system."""
    assert DiskBudget(max_bytes=500, max_percent=80).limit_bytes(1000) == 500
    assert DiskBudget(max_bytes=900, max_percent=80).limit_bytes(1000) == 800
    assert DiskBudget(max_bytes=5000, max_percent=None).limit_bytes(1000) == 1000
