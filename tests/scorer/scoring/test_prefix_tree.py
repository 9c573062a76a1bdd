"""The prefix tree against a plain table of blocks, over prompts that fork anywhere."""

from __future__ import annotations

from collections import Counter

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.scorer.scoring.prefix_tree import PrefixTree

_PROMPTS = st.lists(st.sampled_from("xy"), max_size=7)


def _keys(prompt: list[str]) -> bytes:
    """Keys that are chained, as those of blocks are."""
    found, key = [], b""
    for block in prompt:
        key = xxhash.xxh3_128_digest(key + block.encode())
        found.append(key)
    return b"".join(found)


def _along(tree: PrefixTree, prompt: list[str]) -> list[bytes]:
    return [span.holders for span in tree.along(_keys(prompt)) for _ in range(span.blocks)]


class _Table:
    """What the tree stands for: key -> holder -> how often."""

    def __init__(self) -> None:
        self.held: dict[bytes, Counter[bytes]] = {}

    def change(self, keys: bytes, holder: bytes, by: int) -> None:
        for at in range(0, len(keys), KEY_BYTES):
            self.held.setdefault(keys[at : at + KEY_BYTES], Counter())[holder] += by

    def along(self, keys: bytes) -> list[bytes]:
        found = []
        for at in range(0, len(keys), KEY_BYTES):
            holders = sorted(+self.held.get(keys[at : at + KEY_BYTES], Counter()))
            if not holders:
                break
            found.append(b"".join(holders))
        return found


@given(
    st.lists(st.tuples(_PROMPTS, st.sampled_from([b"A", b"B"]), st.integers(0, 9)), max_size=40),
    st.lists(_PROMPTS, min_size=1, max_size=5),
)
def test_the_tree_is_what_a_table_of_blocks_would_be(
    steps: list[tuple[list[str], bytes, int]], asked: list[list[str]]
) -> None:
    """After any adding and removing each block has the same holders; forks that are no more leave no nodes."""
    tree, table = PrefixTree(), _Table()
    present: list[tuple[bytes, bytes]] = []
    for prompt, holder, choice in steps:
        if choice > 5 and present:
            keys, taken = present.pop(choice % len(present))
            tree.remove(keys, taken)
            table.change(keys, taken, -1)
        else:
            keys = _keys(prompt)
            present.append((keys, holder))
            tree.add(keys, holder)
            table.change(keys, holder, 1)
        for one in [*asked, prompt]:
            assert _along(tree, one) == table.along(_keys(one))
        assert len(tree) <= 2 * len({keys for keys, _ in present if keys})
        assert bool(tree) == any(keys for keys, _ in present)


def test_a_long_prompt_is_one_stretch() -> None:
    """A prompt decided a thousand times is one node and one span, and goes with its last decision."""
    tree = PrefixTree()
    keys = _keys(["x"] * 20_000)
    for _ in range(1_000):
        tree.add(keys, b"A")
    assert list(tree.along(keys + b"0" * KEY_BYTES)) == [(20_000, b"A")]
    assert list(tree.along(keys[: 777 * KEY_BYTES])) == [(777, b"A")]
    for _ in range(1_000):
        tree.remove(keys, b"A")
    assert (len(tree), list(tree.along(keys))) == (0, [])
