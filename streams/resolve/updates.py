"""What the index is told of one pod's engine blocks during one message."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvatlas.bridge.model.block_key import KEY_BYTES, TOKEN_BYTES
from kvatlas.bridge.model.chain import split_keys
from kvatlas.bridge.model.events import Removed, Stored, Tier
from kvatlas.bridge.model.records import GroupSpec
from kvatlas.streams.index.holders import ASSUMED, pack_holder
from kvatlas.streams.index.view import View
from kvatlas.streams.resolve import bounds
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.effects import PodUpdates
from kvatlas.streams.resolve.engine_blocks import Owner, PodState


class BlockLimits(NamedTuple):
    """Sizes of blocks: tokens of a canonical one, and how many of a pod may wait for their parents."""

    canonical_tokens: int
    orphan_blocks: int


class BlockUpdates:
    """A pod during one message, from :meth:`begin` on, and what the index is told of its blocks.

    Args:
        view: the pod's partition of ``engine_blocks``.
        ref: the pod's reference.
        state: the pod's state; counters in it change.
        updates: where block updates go.
        counts: what happened, by name.
        limits: of blocks, for all pods.

    Attributes:
        report: the store that comes next reports what is there already.
    """

    def __init__(
        self,
        view: View,
        ref: int,
        state: PodState,
        updates: PodUpdates,
        counts: Counter[str],
        *,
        limits: BlockLimits,
    ) -> None:
        self._view = view
        self._ref = ref
        self._ref_bytes = ref.to_bytes(8, "big")
        self._state = state
        self._updates = updates
        self._counts = counts
        self._store_ref = 0
        self._copies, self._auto = True, False
        self.report = self._guessed = False
        #: Blocks of this message that were announced again where they were.
        self.again = 0
        self._canonical = limits.canonical_tokens
        self._step = limits.canonical_tokens * TOKEN_BYTES
        self._orphan_blocks = limits.orphan_blocks
        self._epoch = state.epoch
        self._group = 0
        self._prefix = eb.block_prefix(self._ref_bytes, 0)
        self._holders: dict[tuple[int, int, bool], bytes] = {}
        self._keyless: list[tuple[int, bytes]] = []

    def begin(self, updates: PodUpdates, *, store_ref: int, announcements: str) -> None:
        """Take what a message of the pod says of itself.

        Args:
            updates: where block updates go.
            store_ref: reference of the shared store that the pod mounts.
            announcements: ``copies``, ``presence`` or ``auto``, as in
                :class:`~kvatlas.streams.resolve.resolver.ResolveOptions`.
        """
        if store_ref != self._store_ref:
            self._store_ref = store_ref
            self._holders.clear()
        self._copies, self._auto = announcements != "presence", announcements == "auto"
        self.report = self._guessed = False
        self._updates, self._epoch = updates, self._state.epoch
        self._keyless.clear()

    def epoch_rose(self) -> None:
        """Take the state's new epoch for what follows."""
        self._epoch = self._state.epoch

    def table_keys(self, event: Stored | Removed) -> list[bytes]:
        """Return the table keys of an event's blocks, in order."""
        prefix = eb.block_prefix(self._ref_bytes, event.group)
        return [prefix + key for key in event.keys]

    def table_key(self, group: int, engine_key: bytes) -> bytes:
        """Return the table key of one engine block."""
        return eb.block_prefix(self._ref_bytes, group) + engine_key

    def _enter(self, group: int) -> None:
        if group != self._group:
            self._group = group
            self._prefix = eb.block_prefix(self._ref_bytes, group)
            self._holders.clear()

    # --- updates --------------------------------------------------------------------------------------------------

    def _holder(self, tier: int, epoch: int, *, assumed: bool = False) -> bytes:
        """Return a holder's 24 bytes in this group; the last few are kept."""
        holder = self._holders.get((tier, epoch, assumed))
        if holder is None:
            spec = self._state.groups.get(self._group) or GroupSpec()
            ref = self._store_ref if tier == Tier.SHARED else self._ref
            kind = spec.kind | ASSUMED if assumed else spec.kind
            holder = pack_holder(ref, self._group, tier, kind, spec.window_tokens, epoch)
            self._holders[tier, epoch, assumed] = holder
        return holder

    def _place_of(self, tier: int, ownership: str) -> int:
        """Return the place of an owner's copies on a tier; an owner that is new gets the next slot."""
        if not ownership:
            return tier
        owners = self._state.owners
        if ownership not in owners and len(owners) < eb.SLOTS_MAX:
            owners.append(ownership)
        slot = owners.index(ownership) + 1 if ownership in owners else eb.SLOTS_MAX
        return eb.place_of(tier, slot)

    def _add(self, packed: list[bytes], tier: int, epoch: int) -> None:
        self._updates.add(flat(packed), self._holder(tier, epoch))

    def _emit(
        self, keys: list[bytes], tier: int, was: int | None, now: int | None, owner: bytes, *, assumed: bool
    ) -> None:
        """Emit that an engine key stands for block keys on a tier as of ``now`` and no longer as of ``was``."""
        if was == now or not keys:
            return
        if not self._state.aliasing:
            self._change(keys, tier, was, now, assumed=assumed)
            return
        for key in keys:
            others = self._own(key, tier, now, owner)
            self._change([key], tier, newest_of_any(was, others), newest_of_any(now, others), assumed=assumed)

    def _change(self, keys: list[bytes], tier: int, was: int | None, now: int | None, *, assumed: bool) -> None:
        if was == now:
            return
        if was is not None and (now is None or now < was):
            self._updates.remove(keys, self._holder(tier, was))
        if now is not None:
            self._updates.add(keys, self._holder(tier, now, assumed=assumed))

    def _own(self, key: bytes, tier: int, now: int | None, owner: bytes) -> int | None:
        """Note whether an engine key stands for a block key; return the newest epoch of the others that do."""
        table_key = eb.owners_prefix(self._ref_bytes, self._group) + key
        others: int | None = None
        owners = []
        for found in eb.decode_owners(self._view.get(table_key)):
            if not self._state.live(found.tier, found.epoch) or (found.tier == tier and found.engine_key == owner):
                continue
            owners.append(found)
            if found.tier == tier:
                others = newest_of_any(others, found.epoch)
        if now is not None:
            owners.append(Owner(tier, now, owner))
            if len(owners) > bounds.MAX_OWNERS:
                # Once all the others are gone the block counts as gone: a miss, never a block that is not there.
                owners = owners[-bounds.MAX_OWNERS :]
                self._counts["owners_dropped"] += 1
        if owners:
            self._view.put(table_key, eb.encode_record(owners))
        else:
            self._view.delete(table_key)
        return others


def oldest_of_all(one: int | None, other: int | None) -> int | None:
    """Return the older of two epochs, None when one of the two is not there."""
    return None if one is None or other is None else min(one, other)


def newest_of_any(one: int | None, other: int | None) -> int | None:
    """Return the newer of two epochs, the one that is there, or None."""
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


def flat(packed: list[bytes]) -> list[bytes]:
    """Return single block keys; what an engine block covers may be several."""
    if all(len(keys) == KEY_BYTES for keys in packed):
        return packed
    return split_keys(b"".join(packed))
