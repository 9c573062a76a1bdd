"""One pod's engine blocks during one message: stores, placeholders and removals.

The common case, engine blocks that are canonical blocks and held by one tier, is a comparison of 13 bytes and one
put or delete a block. Everything else goes through :class:`~kvatlas.streams.engine_blocks.Block` values.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from kvatlas.bridge.block_key import KEY_BYTES, TOKEN_BYTES, block_keys
from kvatlas.bridge.chain import Tail, block_extra, check_extra, extend, split_keys
from kvatlas.bridge.events import Removed, Stored, Tier
from kvatlas.bridge.records import GroupSpec
from kvatlas.streams import engine_blocks as eb
from kvatlas.streams.codec import pack_holder
from kvatlas.streams.effects import PodUpdates
from kvatlas.streams.engine_blocks import Block, Link, Owner, Pending, PodState, Waiting
from kvatlas.streams.view import View

_MASKED: Final = Tail(b"")
_WINDOW_MAX: Final = (1 << 32) - 1


class RefusedError(Exception):
    """Blocks of one event that were not taken; the event goes to the dead letters, the rest of it counts."""


class PodBlocks:
    """A pod's engine blocks during one message.

    Args:
        view: the pod's partition of ``engine_blocks``.
        ref: the pod's reference.
        state: the pod's state; counters in it change.
        updates: where block updates go.
        counts: what happened, by name.
        store_ref: reference of the shared store that the pod mounts.
        copies: whether announcements are counted.
        canonical_tokens: canonical block size.
        orphan_blocks: blocks that may wait for their parents.
    """

    def __init__(
        self,
        view: View,
        ref: int,
        state: PodState,
        updates: PodUpdates,
        counts: Counter[str],
        *,
        store_ref: int,
        copies: bool,
        canonical_tokens: int,
        orphan_blocks: int,
    ) -> None:
        self._view = view
        self._ref = ref
        self._ref_bytes = ref.to_bytes(8, "big")
        self._state = state
        self._updates = updates
        self._counts = counts
        self._store_ref = store_ref
        self._copies = copies
        self._canonical = canonical_tokens
        self._step = canonical_tokens * TOKEN_BYTES
        self._orphan_blocks = orphan_blocks
        self._epoch = state.epoch
        self._group = 0
        self._prefix = eb.block_prefix(self._ref_bytes, 0)
        self._holders: dict[tuple[int, int], bytes] = {}
        self._keyless: list[tuple[int, bytes]] = []

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

    # --- stores ---------------------------------------------------------------------------------------------------

    def stored(self, event: Stored, table_keys: list[bytes], root: bytes) -> None:
        """Apply a stored event.

        Args:
            event: the event.
            table_keys: from :meth:`table_keys`.
            root: key that the event's first block chains from when it has no parent.

        Raises:
            RefusedError: some of its blocks were not taken.
            WireError: its extra keys make no key; nothing was written.
        """
        self._enter(event.group)
        self._note_group(event)
        if not event.tokens:
            self._placeholders(event)
        elif event.masked:
            self._masked(event, 0)
        else:
            if event.extra:
                check_extra(event.extra)
            if event.lookahead:
                self._state.aliasing = True
            tail = Tail(root) if event.parent is None else self._tail_of(event.parent)
            start = 0
            while tail is None and start < len(table_keys):
                tail = self._known_or_parked(event, start)
                start += 1
            if tail is not None and start < len(table_keys):
                self._chained(event, table_keys, start, tail)

    def _chained(self, event: Stored, table_keys: list[bytes], start: int, tail: Tail) -> None:
        """Store the blocks from ``start`` on; their place in the chain is known."""
        size = event.block_size_tokens
        if tail is _MASKED:
            self._masked(event, start)
            return
        if tail.tokens or size % self._canonical or (event.extra and size != self._canonical):
            self._linked(event, start, tail)
            return
        tokens = event.tokens[start * size * TOKEN_BYTES :] if start else event.tokens
        extra = block_extra(event.extra[start:], size) if event.extra else None
        keys = block_keys(tail.key, tokens, self._canonical, extra)
        per = size // self._canonical
        if per > 1:
            keys = [b"".join(keys[at : at + per]) for at in range(0, len(keys), per)]
        self._keyed(event.keys[start:], table_keys[start:], keys, event.tier)

    def keyed(self, event: Stored, table_keys: list[bytes], keys: list[bytes]) -> None:
        """Store blocks whose block keys came with the event.

        Args:
            event: where they are; its tokens are not looked at.
            table_keys: one for each of ``keys``.
            keys: packed block keys of each engine block.
        """
        self._enter(event.group)
        self._note_group(event)
        if event.lookahead:
            self._state.aliasing = True
        self._keyed(event.keys, table_keys, keys, event.tier)

    def _keyed(self, engine_keys: list[bytes], table_keys: list[bytes], keys: list[bytes], tier: int) -> None:
        view, state, copies = self._view, self._state, self._copies
        get, put = view.get, view.put
        epoch = 0 if tier == Tier.SHARED else self._epoch
        once = eb.HEAD.pack(eb.PLAIN, 1, tier, 1, epoch)
        twice = eb.HEAD.pack(eb.PLAIN, 1, tier, 2, epoch)
        fresh: list[bytes] = []
        for number, table_key in enumerate(table_keys):
            key = keys[number]
            if not state.aliasing:
                value = once + key
                old = get(table_key)
                if old is None:
                    put(table_key, value)
                    fresh.append(key)
                    continue
                if old == value:
                    if copies:
                        put(table_key, twice + key)
                    continue
            if fresh:
                self._add(fresh, tier, epoch)
                fresh = []
            self._place(engine_keys[number], Link(key, [], Tail(key[-KEY_BYTES:])), tier)
        if fresh:
            self._add(fresh, tier, epoch)
        if state.orphans:
            self._release(engine_keys)

    def _linked(self, event: Stored, start: int, tail: Tail) -> None:
        """Store blocks that share canonical blocks, or whose extra keys must be laid over several."""
        width = event.block_size_tokens * TOKEN_BYTES
        for number in range(start, len(event.keys)):
            engine_key = event.keys[number]
            extra = event.extra[number] if event.extra else ()
            tokens = event.tokens[number * width : (number + 1) * width]
            keys, members, tail = extend(tail, engine_key, tokens, extra, self._canonical)
            self._place(engine_key, Link(keys, members, tail), event.tier)
        if self._state.orphans:
            self._release(event.keys[start:])

    def _placeholders(self, event: Stored) -> None:
        """Add a tier to blocks that are known; an offload event without tokens says nothing of others."""
        for engine_key in event.keys:
            block = self._load(engine_key)
            if block is None or not block.tiers:
                self._counts["placeholders_unknown"] += 1
            else:
                self._announce(engine_key, block, event.tier)

    def _masked(self, event: Stored, start: int) -> None:
        """Store blocks whose tokens do not line up: known by another group's block of the same size, or keyless."""
        for engine_key in event.keys[start:]:
            block = self._load(engine_key)
            if block is not None and block.tiers and block.link.tail is not None:
                self._announce(engine_key, block, event.tier)
                continue
            link = self._borrow(engine_key)
            if link is not None:
                self._place(engine_key, link, event.tier)
                continue
            self._counts["masked"] += 1
            self._keyless.append((event.group, engine_key))
            self._announce(engine_key, block or Block({}, Link()), event.tier)
        if self._state.orphans:
            self._release(event.keys[start:])

    def finish(self) -> None:
        """Look once more, at the end of a message, for what its keyless blocks stand for in other groups."""
        for group, engine_key in self._keyless:
            self._enter(group)
            block = self._load(engine_key)
            if block is not None and block.tiers and block.masked:
                link = self._borrow(engine_key)
                if link is not None:
                    self._adopt(engine_key, block, link)
                    self._counts["masked"] -= 1
                    if self._state.orphans:
                        self._release([engine_key])
        self._keyless.clear()

    # --- removals -------------------------------------------------------------------------------------------------

    def removed(self, event: Removed, table_keys: list[bytes]) -> None:
        """Apply a removal."""
        self._enter(event.group)
        view, tier = self._view, int(event.tier)
        get, delete = view.get, view.delete
        epoch = 0 if tier == Tier.SHARED else self._epoch
        once = eb.HEAD.pack(eb.PLAIN, 1, tier, 1, epoch)
        fast = not self._state.aliasing
        lost: list[bytes] = []
        for number, table_key in enumerate(table_keys):
            old = get(table_key)
            if old is None:
                self._counts["removals_unknown"] += 1
            elif fast and old[: eb.HEAD_BYTES] == once:
                delete(table_key)
                lost.append(old[eb.HEAD_BYTES :])
            else:
                self._remove(event.keys[number], table_key, tier)
        if lost:
            self._updates.remove(_flat(lost), self._holder(tier, epoch))

    def _remove(self, engine_key: bytes, table_key: bytes, tier: int) -> None:
        block = self._load(engine_key)
        if block is None:
            self._view.delete(table_key)  # dead as a whole
        held = None if block is None else block.tiers.get(tier)
        if block is None or held is None:
            self._counts["removals_unknown"] += 1
            return
        count, epoch = held
        if self._copies and count > 1 and not self._suspect(tier, epoch):
            self._set(engine_key, block, tier, (count - 1, epoch))
        else:
            self._set(engine_key, block, tier, None)

    # --- one block ------------------------------------------------------------------------------------------------

    def _enter(self, group: int) -> None:
        if group != self._group:
            self._group = group
            self._prefix = eb.block_prefix(self._ref_bytes, group)
            self._holders.clear()

    def _note_group(self, event: Stored) -> None:
        """Learn what the group is; what the GPU's own events say wins over offload events."""
        state, size = self._state, event.block_size_tokens
        spec = state.groups.get(event.group)
        told = GroupSpec(int(event.kind), min(max(event.window_tokens, 0), _WINDOW_MAX), size)
        if spec == told:
            return
        if spec is None:
            state.groups[event.group] = told
        elif event.tier == Tier.GPU and event.tokens:
            if size and spec.block_size_tokens not in (0, size):
                state.aliasing = True  # partial blocks: two engine keys may cover the same tokens
            largest = max(size, spec.block_size_tokens)
            state.groups[event.group] = GroupSpec(told.kind, told.window_tokens, largest)
        self._holders.clear()

    def _load(self, engine_key: bytes, group: int | None = None) -> Block | None:
        """Return a block with its live tiers alone; None when nothing of it counts any more."""
        prefix = self._prefix if group is None else eb.block_prefix(self._ref_bytes, group)
        value = self._view.get(prefix + engine_key)
        if value is None:
            return None
        block = eb.decode_block(value)
        state = self._state
        block.tiers = {tier: held for tier, held in block.tiers.items() if state.live(tier, held[1])}
        pending = block.link.pending
        if pending is not None and pending.epoch < state.orphans_since:
            return None
        return block if block.tiers or block.link.finals else None

    def _save(self, engine_key: bytes, block: Block) -> None:
        table_key = self._prefix + engine_key
        if block.tiers or block.link.finals:
            block.link.epoch = self._epoch
            self._view.put(table_key, eb.encode_block(block))
        else:
            self._view.delete(table_key)

    def _place(self, engine_key: bytes, link: Link, tier: int) -> None:
        """Announce a block that stands for ``link``."""
        block = self._load(engine_key)
        if block is None:
            block = Block({}, link)
            self._join(engine_key, link)
        elif block.link.tail is None:
            self._adopt(engine_key, block, link)
        elif _differs(block.link, link):
            self._contradicted(engine_key, block, link)
        elif not block.tiers:
            self._join(engine_key, link)
        self._announce(engine_key, block, tier)

    def _adopt(self, engine_key: bytes, block: Block, link: Link) -> None:
        """Give a meaning to a block that had none; it appears on every tier that holds it."""
        if block.link.pending is not None:
            self._unwait(engine_key, block.link.pending.parent)
        block.link = Link(link.keys, link.members, link.tail, block.link.finals)
        self._save(engine_key, block)
        self._join(engine_key, link)
        for tier, (_, epoch) in block.tiers.items():
            self._shift_own(engine_key, block, tier, None, epoch)

    def _contradicted(self, engine_key: bytes, block: Block, link: Link) -> None:
        """The engine uses a key again for other tokens: believe the newer word, and hold neither too long."""
        self._counts["contradictions"] += 1
        for tier, (_, epoch) in block.tiers.items():
            self._shift_own(engine_key, block, tier, epoch, None)
        self._leave(engine_key, block.link)
        block.tiers = {}
        block.link = Link(link.keys, link.members, link.tail, block.link.finals)
        self._join(engine_key, link)

    def _announce(self, engine_key: bytes, block: Block, tier: int) -> None:
        held = block.tiers.get(tier)
        if held is None or self._suspect(tier, held[1]):
            self._set(engine_key, block, tier, (1, 0 if tier == Tier.SHARED else self._epoch))
        elif self._copies:
            self._set(engine_key, block, tier, (min(held[0] + 1, eb.MAX_ANNOUNCEMENTS), held[1]))

    def _suspect(self, tier: int, epoch: int) -> bool:
        return tier != Tier.SHARED and epoch < self._state.suspect_before

    def _set(self, engine_key: bytes, block: Block, tier: int, after: tuple[int, int] | None) -> None:
        """Write a tier of a block, and what the index must learn of it."""
        before = block.tiers.pop(tier, None)
        if after is not None:
            block.tiers[tier] = after
        self._save(engine_key, block)
        was, now = before and before[1], after and after[1]
        if was == now:
            return
        self._shift_own(engine_key, block, tier, was, now)
        for final in tuple(block.link.finals):
            self._shift_final(engine_key, final, tier, was, now)
        if not block.tiers:
            if block.link.pending is not None:
                self._unwait(engine_key, block.link.pending.parent)
            self._leave(engine_key, block.link)

    def _shift_own(self, engine_key: bytes, block: Block, tier: int, was: int | None, now: int | None) -> None:
        """Emit the change of the canonical blocks that end in a block when its own epoch on a tier changes."""
        if not block.link.keys:
            return
        keys = split_keys(block.link.keys)
        if block.link.members:
            others = self._oldest(block.link.members, tier, engine_key)
            self._emit(keys[:1], tier, _both(was, others), _both(now, others), engine_key)
            keys = keys[1:]
        self._emit(keys, tier, was, now, engine_key)

    def _shift_final(self, member: bytes, final: bytes, tier: int, was: int | None, now: int | None) -> None:
        """Emit the change of a canonical block that ends in ``final`` when one of its members changes."""
        block = self._load(final)
        if block is None or tier not in block.tiers or not block.link.keys:
            return
        others = _both(block.tiers[tier][1], self._oldest(block.link.members, tier, member))
        self._emit(split_keys(block.link.keys)[:1], tier, _both(was, others), _both(now, others), final)

    def _oldest(self, members: list[bytes], tier: int, without: bytes) -> int | None:
        """Return the oldest epoch among members on a tier, None when one of them is not there."""
        oldest = _LATEST
        for member in members:
            if member == without:
                continue
            block = self._load(member)
            if block is None or tier not in block.tiers:
                return None
            oldest = min(oldest, block.tiers[tier][1])
        return oldest

    def _join(self, engine_key: bytes, link: Link) -> None:
        """Note with a block's members that its first key is theirs too."""
        for member in link.members if link.keys else ():
            block = self._load(member) or Block({}, Link())
            known = engine_key in block.link.finals
            if not known:
                block.link.finals.append(engine_key)
            if not known or block.link.epoch != self._epoch:
                self._save(member, block)

    def _leave(self, engine_key: bytes, link: Link) -> None:
        for member in link.members if link.keys else ():
            block = self._load(member)
            if block is not None and engine_key in block.link.finals:
                block.link.finals.remove(engine_key)
                self._save(member, block)

    # --- parents --------------------------------------------------------------------------------------------------

    def _tail_of(self, engine_key: bytes) -> Tail | None:
        """Return where a parent's children go on; None when it is not known (yet)."""
        block = self._load(engine_key)
        if block is not None and block.tiers and block.link.pending is None:
            return _MASKED if block.masked else block.link.tail
        link = self._borrow(engine_key)
        return None if link is None else link.tail

    def _borrow(self, engine_key: bytes) -> Link | None:
        """Return what an engine key stands for in another group.

        Engines hash tokens, not groups: in groups of one block size an engine key names the same tokens.
        """
        for group in self._siblings():
            block = self._load(engine_key, group)
            if block is not None and block.tiers and block.link.tail is not None:
                return Link(block.link.keys, block.link.members, block.link.tail)
        return None

    def _siblings(self) -> list[int]:
        """Return the other groups with the block size of this one."""
        groups = self._state.groups
        own = groups.get(self._group)
        if own is None or not own.block_size_tokens or len(groups) == 1:
            return []
        size = own.block_size_tokens
        return [group for group, spec in groups.items() if group != self._group and spec.block_size_tokens == size]

    def _known_or_parked(self, event: Stored, number: int) -> Tail | None:
        """Announce a block whose parent is unknown: it may be known itself, else it waits.

        Raises:
            RefusedError: too many blocks of the pod wait already.
        """
        engine_key = event.keys[number]
        block = self._load(engine_key)
        if block is not None and (block.tiers or block.link.tail is not None):
            if not block.tiers:
                self._join(engine_key, block.link)
            self._announce(engine_key, block, event.tier)
            return _MASKED if block.masked else block.link.tail
        if self._state.orphans >= self._orphan_blocks:
            refused = len(event.keys) - number
            self._counts["orphans_refused"] += refused
            raise RefusedError(
                f"parent unknown and {self._state.orphans} blocks of the pod wait already: {refused} blocks not taken"
            )
        width = event.block_size_tokens * TOKEN_BYTES
        parent = event.keys[number - 1] if number else event.parent
        assert parent is not None
        extra = event.extra[number] if event.extra else []
        tokens = event.tokens[number * width : (number + 1) * width]
        finals = [] if block is None else block.link.finals
        self._wait(engine_key, parent)
        link = Link(finals=finals, pending=Pending(parent, tokens, list(extra), self._epoch))
        self._announce(engine_key, Block({}, link), event.tier)
        return None

    def _wait(self, engine_key: bytes, parent: bytes) -> None:
        self._state.orphans += 1
        self._counts["orphans_parked"] += 1
        table_key = eb.waiting_prefix(self._ref_bytes, self._group) + parent
        old = self._view.get(table_key)
        children: list[bytes] = []
        if old is not None:
            waiting = eb.decode_waiting(old)
            if waiting.epoch >= self._state.orphans_since:
                children = waiting.children
        if engine_key not in children:
            children.append(engine_key)
        self._view.put(table_key, eb.encode_record(Waiting(self._epoch, children)))

    def _unwait(self, engine_key: bytes, parent: bytes) -> None:
        self._state.orphans -= 1
        table_key = eb.waiting_prefix(self._ref_bytes, self._group) + parent
        old = self._view.get(table_key)
        if old is None:
            return
        waiting = eb.decode_waiting(old)
        if engine_key not in waiting.children:
            return
        waiting.children.remove(engine_key)
        if waiting.children:
            self._view.put(table_key, eb.encode_record(waiting))
        else:
            self._view.delete(table_key)

    def _release(self, engine_keys: list[bytes]) -> None:
        """Resolve what waits for blocks that are known now, in this group and in its siblings."""
        home = self._group
        for group in (home, *self._siblings()):
            self._enter(group)
            stack = list(engine_keys)
            while stack and self._state.orphans:
                stack += self._release_children(stack.pop())
        self._enter(home)

    def _release_children(self, parent: bytes) -> list[bytes]:
        """Resolve what waits for one block; return the engine keys that became known."""
        table_key = eb.waiting_prefix(self._ref_bytes, self._group) + parent
        value = self._view.get(table_key)
        if value is None:
            return []
        tail = self._tail_of(parent)
        if tail is None:
            return []
        self._view.delete(table_key)
        known = []
        for child in eb.decode_waiting(value).children:
            block = self._load(child)
            if block is None or block.link.pending is None or block.link.pending.parent != parent:
                continue
            pending = block.link.pending
            if tail is _MASKED:
                self._state.orphans -= 1
                self._counts["masked"] += 1
                block.link = Link(finals=block.link.finals)
                self._save(child, block)
            else:
                self._counts["orphans_resolved"] += 1
                link = Link(*extend(tail, child, pending.tokens, pending.extra, self._canonical))
                self._adopt(child, block, link)
            known.append(child)
        return known

    # --- updates --------------------------------------------------------------------------------------------------

    def _holder(self, tier: int, epoch: int) -> bytes:
        """Return a holder's 24 bytes in this group; the last few are kept."""
        holder = self._holders.get((tier, epoch))
        if holder is None:
            spec = self._state.groups.get(self._group) or GroupSpec()
            ref = self._store_ref if tier == Tier.SHARED else self._ref
            holder = pack_holder(ref, self._group, tier, spec.kind, spec.window_tokens, epoch)
            self._holders[tier, epoch] = holder
        return holder

    def _add(self, packed: list[bytes], tier: int, epoch: int) -> None:
        self._updates.add(_flat(packed), self._holder(tier, epoch))

    def _emit(self, keys: list[bytes], tier: int, was: int | None, now: int | None, owner: bytes) -> None:
        """Emit that an engine key stands for block keys on a tier as of ``now`` and no longer as of ``was``."""
        if was == now or not keys:
            return
        if not self._state.aliasing:
            self._change(keys, tier, was, now)
            return
        for key in keys:
            others = self._own(key, tier, now, owner)
            self._change([key], tier, _either(was, others), _either(now, others))

    def _change(self, keys: list[bytes], tier: int, was: int | None, now: int | None) -> None:
        if was == now:
            return
        if was is not None and (now is None or now < was):
            self._updates.remove(keys, self._holder(tier, was))
        if now is not None:
            self._updates.add(keys, self._holder(tier, now))

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
                others = _either(others, found.epoch)
        if now is not None:
            owners.append(Owner(tier, now, owner))
        if owners:
            self._view.put(table_key, eb.encode_record(owners))
        else:
            self._view.delete(table_key)
        return others


_LATEST: Final = (1 << 64) - 1


def _differs(known: Link, told: Link) -> bool:
    """Tell whether two links cannot be of the same tokens."""
    one, other = known.tail, told.tail
    return known.keys != told.keys or one is None or other is None or one.key != other.key or one.tokens != other.tokens


def _both(one: int | None, other: int | None) -> int | None:
    """Return the older of two epochs, None when one of the two is not there."""
    return None if one is None or other is None else min(one, other)


def _either(one: int | None, other: int | None) -> int | None:
    """Return the newer of two epochs, the one that is there, or None."""
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


def _flat(packed: list[bytes]) -> list[bytes]:
    """Return single block keys; what an engine block covers may be several."""
    if all(len(keys) == KEY_BYTES for keys in packed):
        return packed
    return split_keys(b"".join(packed))
