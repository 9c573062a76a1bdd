"""Everything that a pod holds, once more: for an index that has lost it. Pure, from the pod's ``engine_blocks``."""

from __future__ import annotations

from collections import Counter
from typing import Final

from kvatlas.bridge.model import pod_ids
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.chain import split_keys
from kvatlas.streams.index.blocks_record import OP_ADD, BlocksRecord, Run
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.effects import PodUpdates
from kvatlas.streams.resolve.engine_blocks import PodState
from kvatlas.streams.resolve.links import LinkedBlocks
from kvatlas.streams.resolve.resolver import ResolveOptions
from kvatlas.streams.resolve.updates import BlockLimits, oldest_of_all

_RECORD_UPDATES: Final = 8_192


class _Held(LinkedBlocks):
    """A pod's engine blocks, of which nothing changes."""

    def restate(self, table_keys: list[bytes]) -> None:
        """Emit every block key that an engine block stands for, on every tier that holds it."""
        for table_key in table_keys:
            self._enter(int.from_bytes(table_key[eb.POD_BYTES + 1 : eb.PREFIX_BYTES], "big"))
            engine_key = table_key[eb.PREFIX_BYTES :]
            block = self._load(engine_key)
            if block is None or not block.link.keys:
                continue
            keys, members = split_keys(block.link.keys), block.link.members
            assumed = block.link.assumed
            for tier, epoch in block.levels().items():
                # The first of its keys may begin in blocks before it, which have to be there as well.
                first = oldest_of_all(epoch, self._oldest(members, tier, engine_key)) if members else epoch
                self._change(keys[:1], tier, None, first, assumed=assumed)
                self._change(keys[1:], tier, None, epoch, assumed=assumed)


def restated(pod: str, view: DictView, options: ResolveOptions) -> list[BlocksRecord]:
    """Return what brings an empty index to what a pod holds.

    The records stand at the pod's last message, and apply also where that position has been written already.

    Args:
        pod: pod id.
        view: its ``engine_blocks``.
        options: as its events were resolved with.
    """
    ref = pod_ids.pod_ref(pod)
    prefix = ref.to_bytes(8, "big")
    value = view.get(eb.state_key(prefix))
    if value is None:
        return []
    state = eb.decode_state(value)
    updates = _updates(ref, view, state, options)
    keys, holders = updates.keys, updates.holders
    return [
        _record(state, ref, keys[at : at + _RECORD_UPDATES], holders[at : at + _RECORD_UPDATES])
        for at in range(0, len(keys), _RECORD_UPDATES)
    ]


def _updates(ref: int, view: DictView, state: PodState, options: ResolveOptions) -> PodUpdates:
    updates = PodUpdates(ref, state.epoch, max(state.last_sequence, 0))
    held = _Held(view, ref, state, updates, Counter(), limits=BlockLimits(options.block_size_tokens, 0))
    held.begin(updates, store_ref=pod_ids.store_ref(state.store or options.store), announcements=options.announcements)
    blocks = ref.to_bytes(8, "big") + eb.KIND_BLOCK
    held.restate([key for key in view.values if key.startswith(blocks)])
    return updates


def _record(state: PodState, ref: int, keys: list[bytes], holders: list[bytes]) -> BlocksRecord:
    assert all(len(key) == KEY_BYTES for key in keys)
    last = max(state.last_sequence, 0)
    return BlocksRecord(
        runs=(Run(ref, state.epoch, last + 1, last, len(keys)),),
        keys=b"".join(keys),
        ops=bytes([OP_ADD]) * len(keys),
        holders=b"".join(holders),
        receive_ns=state.receive_ns,
    )
