"""One pod's engine blocks one by one: what each stands for, who shares it, and who waits for its parent."""

from __future__ import annotations

from typing import Final

from kvatlas.bridge.model.block_key import TOKEN_BYTES
from kvatlas.bridge.model.chain import Tail, extend, split_keys
from kvatlas.bridge.model.events import Stored, Tier
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.engine_blocks import Block, Link, Pending, Waiting
from kvatlas.streams.resolve.updates import BlockUpdates, both

#: Where the children of a block without keys go on: nowhere.
MASKED: Final = Tail(b"")
_LATEST: Final = (1 << 64) - 1


class RefusedError(Exception):
    """Blocks of one event that were not taken; the event goes to the dead letters, the rest of it counts."""


class LinkedBlocks(BlockUpdates):
    """A pod's engine blocks during one message, each looked at on its own."""

    # --- one block ------------------------------------------------------------------------------------------------

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
        if held is None or self._state.suspect(tier, held[1]):
            self._set(engine_key, block, tier, (1, 0 if tier == Tier.SHARED else self._epoch))
        elif self._copies:
            self._set(engine_key, block, tier, (min(held[0] + 1, eb.MAX_ANNOUNCEMENTS), held[1]))

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
            self._emit(keys[:1], tier, both(was, others), both(now, others), engine_key)
            keys = keys[1:]
        self._emit(keys, tier, was, now, engine_key)

    def _shift_final(self, member: bytes, final: bytes, tier: int, was: int | None, now: int | None) -> None:
        """Emit the change of a canonical block that ends in ``final`` when one of its members changes."""
        block = self._load(final)
        if block is None or tier not in block.tiers or not block.link.keys:
            return
        others = both(block.tiers[tier][1], self._oldest(block.link.members, tier, member))
        self._emit(split_keys(block.link.keys)[:1], tier, both(was, others), both(now, others), final)

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
            return MASKED if block.masked else block.link.tail
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
            return MASKED if block.masked else block.link.tail
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
            if tail is MASKED:
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


def _differs(known: Link, told: Link) -> bool:
    """Tell whether two links cannot be of the same tokens."""
    one, other = known.tail, told.tail
    return known.keys != told.keys or one is None or other is None or one.key != other.key or one.tokens != other.tokens
