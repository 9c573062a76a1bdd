"""A table outside the workers: it agrees with a dict whatever is in memory and whatever is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.streams.state import local_table
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.local_table import LocalTable

BUDGET = RocksBudget(1 << 20, 1 << 20)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 7), st.binary(max_size=4)),
        st.tuples(st.just("delete"), st.integers(0, 7)),
        st.tuples(st.just("settle"), st.booleans()),
        st.tuples(st.just("reopen")),
    ),
    max_size=40,
)


@given(steps=STEPS)
@settings(max_examples=40, deadline=None)
def test_agrees_with_a_dict(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """Puts, deletes, flushes and reopening in any order leave what a dict would hold, also past the memory's limit."""
    path = tmp_path_factory.mktemp("table") / "db"
    limits = local_table._FLUSH_ENTRIES, local_table._CACHE_ENTRIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_table, "_FLUSH_ENTRIES", 2)
        patch.setattr(local_table, "_CACHE_ENTRIES", 4)
        table, model = LocalTable(path, BUDGET), dict[bytes, bytes]()
        for step in steps:
            if step[0] == "put":
                table.put(bytes([step[1]]), step[2])
                model[bytes([step[1]])] = step[2]
            elif step[0] == "delete":
                table.delete(bytes([step[1]]))
                model.pop(bytes([step[1]]), None)
            elif step[0] == "settle":
                table.settle(force=step[1])
            else:
                table.close()
                table = LocalTable(path, BUDGET)
            keys = [bytes([number]) for number in range(8)]
            table.prefetch(keys[:4])
            assert {key: value for key in keys if (value := table.get(key)) is not None} == model
        assert dict(table.items()) == model
        table.close()
    assert limits == (local_table._FLUSH_ENTRIES, local_table._CACHE_ENTRIES)


def test_what_is_not_kept_is_not_written(tmp_path: Path) -> None:
    """A scratch table that is closed without keeping it leaves nothing in its folder's database."""
    table = LocalTable(tmp_path / "db", BUDGET)
    table.put(b"a", b"1")
    table.close(keep=False)
    again = LocalTable(tmp_path / "db", BUDGET)
    assert again.get(b"a") is None
    again.close()
