"""Tests of the bounded cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.streams.state.cache import ENTRY_BYTES, BytesCache

KEYS = st.binary(min_size=1, max_size=3)


def test_a_written_value_is_read_back_and_a_removed_one_is_not() -> None:
    """apply() takes over writes and removals."""
    cache = BytesCache(1 << 20)
    cache.apply({b"a": b"1", b"b": b"2"})
    cache.apply({b"a": None, b"b": b"3"})
    assert (cache.get(b"a"), cache.get(b"b")) == (None, b"3")


def test_an_entry_that_is_read_stays_and_one_that_is_not_leaves() -> None:
    """Two generations approximate least-recently-used."""
    cache = BytesCache(20 * (ENTRY_BYTES + 4))
    cache.put(b"hot!", b"")
    cache.put(b"cold", b"")
    for number in range(100):
        cache.put(b"%04d" % number, b"")
        cache.get(b"hot!")
    assert cache.get(b"hot!") == b""
    assert cache.get(b"cold") is None


@given(st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=50)), max_size=200), st.integers(0, 3000))
def test_the_cache_never_lies_and_never_outgrows_its_bound(
    writes: list[tuple[bytes, bytes | None]], bound: int
) -> None:
    """Whatever is written, a hit is the last write, and the estimate stays under the bound plus one entry."""
    cache, model = BytesCache(bound), {}
    for key, value in writes:
        cache.apply({key: value})
        model[key] = value
        assert cache.size_bytes <= bound + ENTRY_BYTES + 60
    for key, value in model.items():
        assert cache.get(key) in (value, None)


def test_a_size_of_zero_keeps_nothing_for_long() -> None:
    """Without a budget the cache holds one entry at most in each generation."""
    cache = BytesCache(0)
    for number in range(10):
        cache.put(b"%d" % number, b"x" * 100)
    assert len(cache) <= 2


def test_a_smaller_bound_holds_at_once() -> None:
    """More partitions share the budget from now on, also where nothing is written any more."""
    cache = BytesCache(1_000_000)
    for number in range(3_500):
        cache.put(b"%d" % number, b"x" * 100)
    assert cache.size_bytes > 500_000
    cache.resize(100_000)
    assert cache.size_bytes <= 1_000_000 // 2
    cache.resize(10_000)
    assert cache.size_bytes <= 10_000
