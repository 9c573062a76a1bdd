"""Token-free batches whose events come out of chain order."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from kvatlas.bridge.ingest.strip import KnownBlocks, Stripped, Stripper
from kvatlas.bridge.model.block_key import KEY_BYTES, block_keys, pack_tokens, root_key
from kvatlas.bridge.model.events import Limits
from kvatlas.bridge.model.records import KeyedCleared, KeyedRemoved, KeyedStored
from tests.engine_events import stored

_KEYS = block_keys(root_key("m"), pack_tokens(range(64)), 16)


def _stored(number: int, parent: int | None) -> dict[str, Any]:
    """Return block ``number`` of the run 0..63, with engine key number + 1."""
    return stored([number + 1], range(number * 16, number * 16 + 16), parent=parent)


def _strip(*events: dict[str, Any], stripper: Stripper | None = None) -> Stripped:
    stripper = stripper or Stripper("vllm", "m", 16, Limits(), KnownBlocks(100))
    stripped = stripper.strip(msgspec.msgpack.encode((1.0, events, None)))
    assert not stripped.rejected
    return stripped


def _key(event: object) -> bytes:
    assert isinstance(event, KeyedStored)
    return event.block_keys


def test_a_child_before_its_parent_in_one_message_is_keyed() -> None:
    """Whatever the order of a chain's events in a message, each block gets its key and keeps its place."""
    chain = [_stored(number, number or None) for number in range(4)]
    for order in itertools.permutations(range(4)):
        stripped = _strip(*(chain[number] for number in order))
        assert stripped.keyless == 0
        assert [_key(event) for event in stripped.batch.events] == [_KEYS[number] for number in order]


def test_waiting_moves_nothing_past_a_removal_or_a_clear() -> None:
    """A child that waited stands where it stood among the other events."""
    removed = {"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"}
    stripped = _strip(removed, _stored(1, 1), {"type": "AllBlocksCleared"}, _stored(0, None))
    kinds = [type(event) for event in stripped.batch.events]
    assert kinds == [KeyedRemoved, KeyedStored, KeyedCleared, KeyedStored]
    assert _key(stripped.batch.events[1]) == _KEYS[1]


def test_a_parent_that_never_comes_leaves_its_children_without_keys() -> None:
    """Unknown parents, blocks that name themselves, and circles end without keys, each counted once."""
    stripped = _strip(_stored(1, 99), _stored(2, 3), {**_stored(0, 3), "block_hashes": [9]}, _stored(3, 9))
    assert stripped.keyless == 4
    assert [_key(event) for event in stripped.batch.events] == [b""] * 4
    stripper = Stripper("vllm", "m", 16, Limits(), KnownBlocks(100))
    _strip(_stored(2, 2), stripper=stripper)
    later = _strip(_stored(0, None), _stored(1, 1), stripper=stripper)  # the wait ends with its message
    assert [_key(event) for event in later.batch.events] == _KEYS[:2]


def test_the_blocks_in_front_of_a_known_one_follow_their_parent() -> None:
    """An event whose second block is known already is keyed whole once the parent of its first one comes."""
    stripper = Stripper("vllm", "m", 16, Limits(), KnownBlocks(100))
    known = _strip(_stored(0, None), _stored(1, 1), _stored(2, 2)).batch.events[2]
    assert isinstance(known, KeyedStored)
    stripper.known.put(16, known.engine_keys[0], known.block_keys)
    both = {**_stored(1, 1), "block_hashes": [2, 3], "token_ids": list(range(16, 48))}
    stripped = _strip(both, _stored(0, None), stripper=stripper)
    assert stripped.keyless == 0
    assert len(stripped.batch.events) == 2
    packed = _key(stripped.batch.events[0])
    assert [packed[:KEY_BYTES], packed[KEY_BYTES:]] == _KEYS[1:3]
