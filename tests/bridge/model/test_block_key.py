"""Block keys: golden values, chaining, and what makes two requests differ."""

from __future__ import annotations

import struct

import msgspec
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.block_key import (
    block_keys,
    chain,
    encode_extra,
    multimodal_extra,
    pack_tokens,
    partition_of,
    root_key,
)

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=100)


def test_golden_keys_never_change():
    """The keys of a known prompt: a change here is a new key version and a rebuilt index."""
    root = root_key("model", None, None)
    assert root == xxhash.xxh3_128_digest(msgspec.msgpack.encode([1, "model", None, None]))
    keys = block_keys(root, pack_tokens(list(range(1, 33))), 16)
    first = xxhash.xxh3_128_digest(root + struct.pack("<16I", *range(1, 17)))
    assert keys == [first, xxhash.xxh3_128_digest(first + struct.pack("<16I", *range(17, 33)))]
    assert root.hex() == "5307d77d0bfa6d96aa824963a792033a"
    assert keys[1].hex() == "65eb034c53e8292d4d12ded6704a0851"


@pytest.mark.parametrize(
    ("count", "size", "blocks"), [(300, 256, 1), (512, 256, 2), (0, 16, 0), (15, 16, 0), (16, 16, 1)]
)
def test_a_trailing_partial_block_has_no_key(count: int, size: int, blocks: int):
    """300 tokens are one block of 256; 512 are two."""
    assert len(block_keys(root_key("m"), pack_tokens(list(range(count))), size)) == blocks


def test_roots_differ_by_model_lora_and_salt():
    """No two of these share a key; empty and absent are the same."""
    roots = [root_key("m"), root_key("n"), root_key("m", "a"), root_key("m", None, "a"), root_key("m", "a", "a")]
    assert len(set(roots)) == len(roots)
    assert root_key("m", "", "") == root_key("m")


@given(tokens, st.integers(1, 20))
def test_keys_chain_from_where_others_ended(ids: list[int], size: int):
    """Keys of a prompt in two pieces are the keys of the whole."""
    packed, root = pack_tokens(ids), root_key("m")
    whole = block_keys(root, packed, size)
    cut = len(whole) // 2
    head = block_keys(root, packed[: cut * size * 4], size)
    tail = block_keys(head[-1] if head else root, packed[cut * size * 4 :], size)
    assert head + tail == whole
    for number, key in enumerate(whole):
        parent = whole[number - 1] if number else root
        assert key == chain(parent, packed[number * size * 4 : (number + 1) * size * 4])


@given(tokens)
def test_tokens_pack_as_little_endian(ids: list[int]):
    """Four bytes each, whatever the machine."""
    assert pack_tokens(ids) == struct.pack(f"<{len(ids)}I", *ids)


@pytest.mark.parametrize("bad", [[-1], [2**32], ["x"], [1.5]])
def test_what_is_no_token_id_is_refused(bad: list[object]):
    """Never wrapped, never rounded."""
    with pytest.raises((OverflowError, TypeError)):
        pack_tokens(bad)  # type: ignore[arg-type]


def test_extra_keys_are_a_set_with_types():
    """Order does not matter; a raw value and an item of the same text differ."""
    one, two = ("mm", "a", 0), ("raw", "a")
    assert encode_extra([one, two]) == encode_extra([two, one])
    assert encode_extra([one]) != encode_extra([two])
    assert encode_extra([]) == b""


def test_images_touch_the_blocks_of_their_placeholders():
    """Images at [0, 32) and [48, 80), 80 tokens in blocks of 16: A, A, nothing, B, B."""
    found = multimodal_extra([("A", 0, 32), ("B", 48, 32)], 16, 5)
    assert sorted(found) == [0, 1, 3, 4]
    assert found[0] == encode_extra([("mm", "A", 0)])
    assert found[1] == encode_extra([("mm", "A", -16)])
    assert found[4] == encode_extra([("mm", "B", -16)])


def test_an_image_changes_its_block_and_what_follows():
    """An image only in block 2 of 4: keys 0 and 1 as without it, 2 and 3 differ."""
    packed, root = pack_tokens(list(range(64))), root_key("m")
    plain = block_keys(root, packed, 16)
    with_image = block_keys(root, packed, 16, multimodal_extra([("A", 36, 8)], 16, 4))
    assert [a == b for a, b in zip(plain, with_image, strict=True)] == [True, True, False, False]


def test_partitions_spread_and_stay_in_range():
    """Every partition gets its share of random keys."""
    keys = block_keys(root_key("m"), pack_tokens(list(range(16_000))), 16)
    counts = [0] * 7
    for key in keys:
        counts[partition_of(key, 7)] += 1
    assert min(counts) > 80
