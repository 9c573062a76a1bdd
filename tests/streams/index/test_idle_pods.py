"""What an update costs does not grow with pods that once stored and are idle: the same calls, one by one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.streams.index.apply import apply_blocks, is_entry, table_keys_of
from kvatlas.streams.index.blocks_record import OP_ADD, Run, decode_blocks, encode_blocks
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.options import MIB
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState

_BLOCKS = 300


def _stored(pod: int, first: int, blocks: int) -> bytes:
    keys = b"".join((first + number).to_bytes(KEY_BYTES, "big") for number in range(blocks))
    holder = pack_holder(pod, 0, 1, 0, 0, 1)
    return encode_blocks([Run(pod, 1, 1, 1, blocks)], keys, bytes([OP_ADD]) * blocks, holder * blocks, 1)


def _commit(state: PartitionState, offset: int) -> None:
    state.overlay.advance(offset, 1)
    changes = state.overlay.cut()
    state.write(changes.writes, offset, Meta(offset, 1, 1))
    state.overlay.committed(changes)


def _apply(state: PartitionState, value: bytes) -> None:
    record = decode_blocks(value)
    keys = table_keys_of(record)
    state.overlay.prefetch(keys)
    apply_blocks(state.overlay, record, Counter(), table_keys=keys)


def _calls(folder: Path, idle: int) -> Counter[str]:
    """Count the calls that an active pod's updates, their commit and a lookup make beside so many idle pods."""
    state = PartitionState(0, folder, RocksBudget(MIB, 4 * MIB), 16 * MIB, valid=is_entry)
    for pod in range(idle):
        _apply(state, _stored(1_000 + pod, 1_000_000 + pod * 4, 4))
    _commit(state, 1)
    value, asked = _stored(7, 5, _BLOCKS), [number.to_bytes(KEY_BYTES, "big") for number in range(_BLOCKS)]
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_call"):
            counts[frame.f_code.co_qualname if event == "call" else arg.__qualname__] += 1

    sys.setprofile(count)
    try:
        _apply(state, value)
        _commit(state, 2)
        found = state.answer(asked)
    finally:
        sys.setprofile(None)
        state.close()
    assert len(found) - found.count(None) == _BLOCKS - 5
    return counts


def test_idle_pods_cost_an_active_one_nothing(tmp_path: Path) -> None:
    """With 500 idle pods every function is called as often as with 5."""
    few = _calls(tmp_path / "few.db", 5)
    assert few == _calls(tmp_path / "many.db", 500)
    assert (few["Overlay.put"], few["Overlay.write_all"]) == (1, 1), "of the position, and of all blocks"
