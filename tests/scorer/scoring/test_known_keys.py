"""Keys of stretches seen before are those that hashing gives."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model.block_key import block_keys, root_key
from kvatlas.scorer.scoring import known_keys
from kvatlas.scorer.scoring.known_keys import STRETCH_BLOCKS, KnownKeys

SIZE = 2
STRETCH = STRETCH_BLOCKS * SIZE

#: A prompt: runs of one token each, which prompts share or not.
PROMPTS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from((1, STRETCH - 1, STRETCH, STRETCH + 3))), max_size=5)


@given(prompts=st.lists(st.tuples(st.sampled_from(("a", "b")), PROMPTS), max_size=6))
def test_keys_are_those_of_block_keys(prompts: list[tuple[str, list[tuple[int, int]]]]) -> None:
    known = KnownKeys()
    for model, runs in prompts:
        packed = array("I", [token for token, length in runs for _ in range(length)]).tobytes()
        assert known.of(root_key(model), packed, SIZE) == block_keys(root_key(model), packed, SIZE)


def test_blocks_of_another_size_or_with_extra_keys_are_not_mistaken() -> None:
    known = KnownKeys()
    packed = array("I", range(4 * STRETCH)).tobytes()
    root = root_key("m")
    plain = known.of(root, packed, SIZE)
    assert known.of(root, packed, 2 * SIZE) == block_keys(root, packed, 2 * SIZE)
    extra = {1: b"x"}
    assert known.of(root, packed, SIZE, extra) == block_keys(root, packed, SIZE, extra) != plain
    assert known.of(root, packed, SIZE) == plain


def test_the_least_recently_used_stretch_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "_MOST_STRETCHES", 2)
    known = KnownKeys()
    for token in (1, 2, 1, 3, 1):
        packed = array("I", [token] * STRETCH).tobytes()
        assert known.of(root_key("m"), packed, SIZE) == block_keys(root_key("m"), packed, SIZE)
        assert len(known) <= 2
