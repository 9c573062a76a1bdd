"""Tests of what is applied to a partition and not committed yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvatlas.streams.state.cache import BytesCache
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.overlay import ChangeSet, Overlay
from kvatlas.streams.state.partition import PartitionState, Reflected

KEYS = [b"old", b"doomed", b"a", b"b"]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[PartitionState]:
    made = PartitionState(0, tmp_path / "t-0.db", RocksBudget(1 << 20, 8 << 20), 1 << 20)
    made.write({b"old": b"1", b"doomed": b"1"}, 0, Meta(4, 50))
    yield made
    made.close()


def commit(state: PartitionState, changes: ChangeSet) -> None:
    state.write(changes.writes, 100 + changes.source_offset, Meta(changes.source_offset, changes.receive_ns))
    state.overlay.committed(changes)


def apply(state: PartitionState, offset: int, writes: dict[bytes, bytes | None]) -> None:
    for key, value in writes.items():
        if value is None:
            state.overlay.delete(key)
        else:
            state.overlay.put(key, value)
    state.overlay.advance(offset, 1000 + offset)


def test_answers_show_what_was_applied_from_apply_to_commit(state: PartitionState) -> None:
    """A value is seen from when it was applied on: while it gathers, while it is committed, and afterwards."""
    assert (state.answer(KEYS), state.reflected) == ([b"1", b"1", None, None], Reflected(4, 50))
    apply(state, 5, {b"a": b"2", b"doomed": None})
    assert (state.answer(KEYS), state.reflected) == ([b"1", None, b"2", None], Reflected(5, 1005))
    cut = state.overlay.cut()
    assert state.answer(KEYS) == [b"1", None, b"2", None]
    apply(state, 6, {b"a": None, b"b": b"3"})
    assert (state.answer(KEYS), state.reflected) == ([b"1", None, None, b"3"], Reflected(6, 1006))
    commit(state, cut)
    assert (state.answer(KEYS), state.reflected) == ([b"1", None, None, b"3"], Reflected(6, 1006))
    assert (state.get_many(KEYS), state.meta.source_offset) == ([b"1", None, b"2", None], 5)
    commit(state, state.overlay.cut())
    assert (state.answer(KEYS), state.overlay.reflected, state.overlay.values) == ([b"1", None, None, b"3"], None, {})
    assert (state.get_many(KEYS), state.meta.source_offset) == ([b"1", None, None, b"3"], 6)


def test_what_is_applied_during_a_commit_builds_on_it(state: PartitionState) -> None:
    """Reads of the writer see the writes on their way, removals too, also when they were looked for ahead."""
    apply(state, 5, {b"a": b"2", b"doomed": None})
    cut = state.overlay.cut()
    state.overlay.prefetch(KEYS)
    assert [state.overlay.get(key) for key in KEYS] == [b"1", None, b"2", None]
    commit(state, cut)
    assert [state.overlay.get(key) for key in KEYS] == [b"1", None, b"2", None]
    assert not state.overlay.cut().writes


def test_a_cut_does_not_change_while_more_is_applied(state: PartitionState) -> None:
    """What a failed commit repeats is what it tried to commit."""
    apply(state, 5, {b"a": b"2"})
    cut = state.overlay.cut()
    apply(state, 6, {b"b": b"3", b"a": b"4"})
    assert cut == ChangeSet({b"a": b"2"}, 5, 1005)
    assert state.answer(KEYS) == [b"1", b"1", b"4", b"3"]
    commit(state, cut)
    assert (state.get_many(KEYS), state.meta.source_offset) == ([b"1", b"1", b"2", None], 5)
    assert state.answer(KEYS) == [b"1", b"1", b"4", b"3"]


def test_what_is_dropped_is_not_seen_any_more(state: PartitionState) -> None:
    """A partition that goes elsewhere answers what its database says."""
    apply(state, 5, {b"a": b"2"})
    state.overlay.cut()
    apply(state, 6, {b"b": b"3"})
    state.overlay.drop()
    assert (state.answer(KEYS), state.reflected) == ([b"1", b"1", None, None], Reflected(4, 50))
    assert state.overlay.get(b"b") is None


def test_what_a_sweep_removes_is_not_seen_where_it_was_fetched_ahead(state: PartitionState) -> None:
    """A write beside the writer's own takes effect for readers, and does not undo what was applied."""
    apply(state, 5, {b"a": b"2"})
    state.overlay.prefetch(KEYS)
    commit(state, ChangeSet({b"doomed": None, b"a": b"swept"}, 4, 50))
    assert state.answer(KEYS) == [b"1", None, b"2", None]
    assert state.overlay.get(b"doomed") is None


def test_a_cut_says_its_offset_also_when_that_is_the_last_one_s(state: PartitionState) -> None:
    """While a record is put off, later ones are applied, cut and committed under the offset before it."""
    apply(state, 5, {b"a": b"2"})
    first = state.overlay.cut()
    apply(state, 5, {b"b": b"3"})
    commit(state, first)
    assert state.reflected == Reflected(5, 1005)
    assert state.overlay.cut() == ChangeSet({b"b": b"3"}, 5, 1005)


class Below:
    """A partition over a dict, with a cache that holds some of it."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.cache = BytesCache(1 << 20)

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def fetch(self, keys: list[bytes]) -> list[bytes | None]:
        return [self.values.get(key) for key in keys]

    async def fetch_apart(self, keys: list[bytes]) -> list[bytes | None]:
        return self.fetch(keys)


class OverlayModel(RuleBasedStateMachine):
    """An overlay over a partition beside two plain dicts: what was applied, and what is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.below = Below()
        self.overlay = Overlay(self.below)  # type: ignore[arg-type]
        self.applied: dict[bytes, bytes] = {}
        self.cut: ChangeSet | None = None
        self.cut_is: dict[bytes, bytes] = {}
        self.offset = 0

    keys = st.sampled_from([bytes([number]) for number in range(6)])

    @rule(key=keys, value=st.sampled_from([b"x", b"y", b"z"]))
    def put(self, key: bytes, value: bytes) -> None:
        self.offset += 1
        self.overlay.put(key, value)
        self.overlay.advance(self.offset, self.offset)
        self.applied[key] = value

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        self.offset += 1
        self.overlay.delete(key)
        self.overlay.advance(self.offset, self.offset)
        self.applied.pop(key, None)

    @rule(keys=st.lists(keys))
    def prefetch(self, keys: list[bytes]) -> None:
        self.overlay.prefetch(keys)

    @precondition(lambda self: self.cut is None and self.offset > 0)
    @rule()
    def begin(self) -> None:
        self.cut, self.cut_is = self.overlay.cut(), dict(self.applied)

    @precondition(lambda self: self.cut is not None)
    @rule()
    def commit(self) -> None:
        assert self.cut is not None
        for key, value in self.cut.writes.items():
            if value is None:
                self.below.values.pop(key, None)
            else:
                self.below.values[key] = value
        self.below.cache.apply(dict(self.cut.writes))
        self.overlay.committed(self.cut)
        assert self.below.values == self.cut_is
        self.cut = None

    @invariant()
    def reads_what_was_applied(self) -> None:
        for number in range(6):
            key = bytes([number])
            assert self.overlay.get(key) == self.applied.get(key)
            seen = self.overlay.values.get(key, self.below.values.get(key))
            assert seen == self.applied.get(key)

    @invariant()
    def tells_until_all_is_committed(self) -> None:
        if self.overlay.reflected is not None:
            assert self.overlay.reflected[0] == self.offset


TestOverlayModel = OverlayModel.TestCase
