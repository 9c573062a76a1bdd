"""Columns of lookup answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.streams.index.columns import NOT_ANSWERED, answer_columns, read_index


def test_equal_values_share_one_entry():
    """Little-endian u32 per key: 0 for none, n for the n-th distinct value, all ones for not answered."""
    values, index = answer_columns([b"x", None, b"y", b"x", b""], unanswered=[1], at_least=6)
    assert values == [b"x", b"y"]
    assert index.hex(" ", 4) == "01000000 ffffffff 02000000 01000000 00000000 ffffffff"


@given(st.lists(st.one_of(st.none(), st.binary(max_size=2)), max_size=50), st.data())
def test_every_key_finds_its_value(values, data):
    """The columns say of each key exactly what was given."""
    unanswered = data.draw(st.sets(st.integers(0, max(len(values) - 1, 0)), max_size=len(values)))
    distinct, index = answer_columns(values, sorted(unanswered))
    assert len(set(distinct)) == len(distinct)
    for number, (value, entry) in enumerate(zip(values, read_index(index), strict=True)):
        if number in unanswered:
            assert entry == NOT_ANSWERED
        else:
            assert (distinct[entry - 1] if entry else None) == (value or None)
