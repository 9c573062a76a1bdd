"""Tests of what is applied and not committed yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from kvatlas.streams.errors import ChangelogError
from kvatlas.streams.faust_app.table import BulkTable, PartitionView
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState, Reflected
from kvatlas.streams.state.pending import Pending


class Table:
    """A table of one partition without a changelog; commits fail as often as told."""

    def __init__(self, state: PartitionState) -> None:
        self.state = state
        self.failures = 0
        self.store = self

    def local(self, _: int) -> PartitionState:
        return self.state

    def view(self, _: int, *, above: PartitionView | None = None) -> PartitionView:
        return PartitionView(self.state, above)

    async def commit(self, _: int, view: PartitionView, source_offset: int, receive_ns: int) -> None:
        if self.failures:
            self.failures -= 1
            raise ChangelogError("away")
        self.state.write(view.writes, 100 + source_offset, Meta(source_offset, receive_ns))


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    state = PartitionState(0, tmp_path / "t-0.db", RocksBudget(1 << 20, 8 << 20), 1 << 20)
    state.write({b"old": b"1", b"doomed": b"1"}, 0, Meta(4, 50))
    yield Table(state)
    state.close()


def pending_of(table: Table, **bounds: int) -> Pending:
    return Pending(cast("BulkTable", table), 0, **{"most_records": 10, "most_updates": 100, **bounds})


def apply(pending: Pending, offset: int, writes: dict[bytes, bytes | None]) -> None:
    for key, value in writes.items():
        if value is None:
            pending.view.delete(key)
        else:
            pending.view.put(key, value)
    pending.advance(offset, 1000 + offset, records=1, updates=len(writes))


KEYS = [b"old", b"doomed", b"a", b"b"]


async def test_answers_show_what_was_applied_from_apply_to_commit(table: Table) -> None:
    """A value is seen from when it was applied on: while it gathers, while it is committed, and afterwards."""
    pending, state = pending_of(table), table.state
    assert (state.answer(KEYS), state.reflected) == ([b"1", b"1", None, None], Reflected(4, 50))
    apply(pending, 5, {b"a": b"2", b"doomed": None})
    assert (state.answer(KEYS), state.reflected) == ([b"1", None, b"2", None], Reflected(5, 1005))
    cut = pending.cut()
    assert state.answer(KEYS) == [b"1", None, b"2", None]
    apply(pending, 6, {b"a": None, b"b": b"3"})
    assert (state.answer(KEYS), state.reflected) == ([b"1", None, None, b"3"], Reflected(6, 1006))
    await pending.commit(cut)
    assert (state.answer(KEYS), state.reflected) == ([b"1", None, None, b"3"], Reflected(6, 1006))
    assert (state.get_many(KEYS), state.meta.source_offset) == ([b"1", None, b"2", None], 5)
    await pending.commit(pending.cut())
    assert (state.answer(KEYS), state.ahead) == ([b"1", None, None, b"3"], None)
    assert (state.get_many(KEYS), state.meta.source_offset) == ([b"1", None, None, b"3"], 6)


async def test_what_is_applied_during_a_commit_builds_on_it(table: Table) -> None:
    """Reads of the next view see the writes on their way, removals too, also when they were looked for ahead."""
    pending = pending_of(table)
    apply(pending, 5, {b"a": b"2", b"doomed": None})
    cut = pending.cut()
    pending.view.prefetch(KEYS)
    assert [pending.view.get(key) for key in KEYS] == [b"1", None, b"2", None]
    await pending.commit(cut)
    assert [pending.view.get(key) for key in KEYS] == [b"1", None, b"2", None]
    assert pending.view.writes == {}


async def test_a_commit_that_failed_is_repeated_whole(table: Table) -> None:
    """Nothing of it is lost, and nothing that was applied meanwhile gets into it."""
    pending, state = pending_of(table), table.state
    apply(pending, 5, {b"a": b"2"})
    cut = pending.cut()
    table.failures = 1
    with pytest.raises(ChangelogError):
        await pending.commit(cut)
    apply(pending, 6, {b"b": b"3"})
    assert state.answer(KEYS) == [b"1", b"1", b"2", b"3"]
    await pending.commit(cut)
    assert (state.get_many(KEYS), state.meta.source_offset) == ([b"1", b"1", b"2", None], 5)


async def test_what_is_dropped_is_not_seen_any_more(table: Table) -> None:
    """A partition that goes elsewhere answers what its database says."""
    pending, state = pending_of(table), table.state
    apply(pending, 5, {b"a": b"2"})
    pending.cut()
    apply(pending, 6, {b"b": b"3"})
    pending.drop()
    assert (state.answer(KEYS), state.reflected) == ([b"1", b"1", None, None], Reflected(4, 50))
    assert pending.view.get(b"b") is None


async def test_it_is_full_by_records_or_updates_since_the_last_cut(table: Table) -> None:
    """The bounds count what gathers; what is on its way counts no more."""
    for bounds in ({"most_records": 2}, {"most_updates": 3}):
        pending = pending_of(table, **bounds)
        apply(pending, 5, {b"a": b"2"})
        assert not pending.full
        apply(pending, 6, {b"a": b"3", b"b": b"3"})
        assert pending.full
        cut: Any = pending.cut()
        assert not pending.full
        await pending.commit(cut)
