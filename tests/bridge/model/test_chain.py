"""Engine blocks laid over canonical blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.block_key import block_keys, encode_extra, multimodal_extra, pack_tokens, root_key
from kvatlas.bridge.model.chain import Tail, block_extra, check_extra, extend, split_keys

ROOT = root_key("demo")


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 24))
def test_any_sizes_give_the_same_keys(sizes, canonical):
    """However a prompt is cut into engine blocks, its canonical keys are those of the whole; so is the tail."""
    tokens = list(range(sum(sizes)))
    tail, keys, start = Tail(ROOT), [], 0
    ends: list[int] = []
    for number, size in enumerate(sizes):
        packed = pack_tokens(tokens[start : start + size])
        own, members, tail = extend(tail, bytes([number]), packed, (), canonical)
        first = len(keys) * canonical
        keys += split_keys(own)
        expected = [bytes([n]) for n, end in enumerate(ends) if end > first] if own else []
        assert members == expected
        start += size
        ends.append(start)
    assert keys == block_keys(ROOT, pack_tokens(tokens), canonical)
    assert tail.tokens == pack_tokens(tokens[len(keys) * canonical :])


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), max_size=4),
    st.sampled_from([(8, 16), (16, 16), (4, 32)]),
)
def test_items_of_small_blocks_reach_the_canonical_blocks_they_touch(blocks, placed, sizes):
    """Offsets move from the engine block to the canonical block, and an item named twice counts once."""
    engine, canonical = sizes
    tokens = list(range(blocks * canonical))
    items = [(f"item {n}", offset, length) for n, (offset, length) in enumerate(placed)]
    tail, keys = Tail(ROOT), []
    for number in range(len(tokens) // engine):
        at = number * engine
        extra = [("mm", name, offset - at) for name, offset, n in items if offset < at + engine and offset + n > at]
        packed = pack_tokens(tokens[at : at + engine])
        own, _, tail = extend(tail, bytes([number]), packed, extra + extra, canonical)
        keys += split_keys(own)
    assert keys == block_keys(ROOT, pack_tokens(tokens), canonical, multimodal_extra(items, canonical, blocks))


def test_an_item_of_a_large_block_counts_from_where_it_begins():
    """Lengths are not on the wire: behind its first canonical block an item counts to the end of the engine block."""
    own, _, _ = extend(Tail(ROOT), b"e", pack_tokens(range(64)), [("mm", "x", 20)], 16)
    extra = {n: encode_extra([("mm", "x", 20 - 16 * n)]) for n in (1, 2, 3)}
    assert split_keys(own) == block_keys(ROOT, pack_tokens(range(64)), 16, extra)


@given(st.binary(max_size=400))
def test_keys_are_split_as_slices_are(packed: bytes) -> None:
    """Few keys and many, and a rest that is no whole key."""
    assert split_keys(packed) == [packed[at : at + 16] for at in range(0, len(packed), 16)]


def test_extra_keys_of_equal_blocks_are_named_by_number():
    """Items that begin behind the block are left out, blocks without items are not named."""
    found = block_extra([[("mm", "a", 3)], [], [("mm", "b", 16), ("raw", 1)]], 16)
    assert found == {0: encode_extra([("mm", "a", 3)]), 2: encode_extra([("raw", 1)])}


@pytest.mark.parametrize("item", [("mm", "a", 1 << 50), ("raw", object())])
def test_what_makes_no_key_is_refused_before_anything_is_written(item):
    """Offsets far out and values without canonical bytes are wire errors."""
    with pytest.raises(WireError):
        check_extra([[], [item]])
