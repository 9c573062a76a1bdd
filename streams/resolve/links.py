"""One pod's engine blocks one by one: what each stands for, who shares it, and how many wait for a parent."""

from __future__ import annotations

from typing import Final

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.chain import split_keys
from kvatlas.bridge.model.events import Tier
from kvatlas.streams.resolve import bounds
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.engine_blocks import Block, Link, Pending, Ticket, WaitingChildren
from kvatlas.streams.resolve.updates import BlockUpdates, oldest_of_all

_LATEST: Final = (1 << 64) - 1


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
        block.tiers = {at: held for at, held in block.tiers.items() if state.live(eb.tier_at(at), held[1])}
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

    def _place(self, engine_key: bytes, link: Link, place: int) -> None:
        """Announce a block that stands for ``link``."""
        block = self._load(engine_key)
        if block is None:
            block = Block({}, link)
            self._join(engine_key, link)
        elif block.link.tail is None:
            self._adopt(engine_key, block, link)
        elif block.link.assumed and not link.assumed:
            self._corrected(engine_key, block, link)
        elif link.assumed and not block.link.assumed:
            pass  # what an event says in full stands
        elif _differs(block.link, link):
            self._contradicted(engine_key, block, link)
        elif not block.tiers:
            self._join(engine_key, link)
        self._announce(engine_key, block, place)

    def _adopt(self, engine_key: bytes, block: Block, link: Link) -> None:
        """Give a meaning to a block that had none; it appears on every tier that holds it."""
        if block.link.pending is not None:
            self._unwait(engine_key, block.link.pending)
        self._mean(engine_key, block, link)

    def _mean(self, engine_key: bytes, block: Block, link: Link) -> None:
        """Let a block stand for ``link`` from now on, on every tier that holds it."""
        block.link = Link(link.keys, link.members, link.tail, block.link.finals, assumed=link.assumed)
        self._save(engine_key, block)
        self._join(engine_key, link)
        for tier, epoch in block.levels().items():
            self._shift_own(engine_key, block, tier, None, epoch)

    def _corrected(self, engine_key: bytes, block: Block, link: Link) -> None:
        """Give a block its full name, where its tokens alone had named it so far; it stays on its tiers."""
        if _differs(block.link, link):
            self._counts["names_corrected"] += 1
            for tier, epoch in block.levels().items():
                self._shift_own(engine_key, block, tier, epoch, None)
            self._leave(engine_key, block.link)
        self._mean(engine_key, block, link)

    def _contradicted(self, engine_key: bytes, block: Block, link: Link) -> None:
        """Engine key reused for other tokens: the newer event wins; the older block is removed at once."""
        self._counts["contradictions"] += 1
        for tier, epoch in block.levels().items():
            self._shift_own(engine_key, block, tier, epoch, None)
        self._leave(engine_key, block.link)
        block.tiers = {}
        block.link = Link(link.keys, link.members, link.tail, block.link.finals, assumed=link.assumed)
        self._join(engine_key, link)

    def _announce(self, engine_key: bytes, block: Block, place: int) -> None:
        held = block.tiers.get(place)
        if held is None or self._state.suspect(eb.tier_at(place), held[1]):
            self._set(engine_key, block, place, (1, 0 if eb.tier_at(place) == Tier.SHARED else self._epoch))
            return
        self._counts["blocks_again"] += 1
        self.again += 1
        if self._copies:
            self._set(engine_key, block, place, (min(held[0] + 1, eb.MAX_ANNOUNCEMENTS), held[1]))

    def _set(self, engine_key: bytes, block: Block, place: int, after: tuple[int, int] | None) -> None:
        """Write a tier of a block (one owner's copies on it), and what the index must learn of it."""
        tier = eb.tier_at(place)
        was = block.on(tier)
        block.tiers.pop(place, None)
        if after is not None:
            block.tiers[place] = after
        self._save(engine_key, block)
        now = block.on(tier)
        if was == now:
            return
        self._shift_own(engine_key, block, tier, was, now)
        for final in tuple(block.link.finals):
            self._shift_final(engine_key, final, tier, was, now)
        if not block.tiers:
            if block.link.pending is not None:
                self._unwait(engine_key, block.link.pending)
            self._leave(engine_key, block.link)

    def _shift_own(self, engine_key: bytes, block: Block, tier: int, was: int | None, now: int | None) -> None:
        """Emit the change of the canonical blocks that end in a block when its own epoch on a tier changes."""
        if not block.link.keys:
            return
        keys, assumed = split_keys(block.link.keys), block.link.assumed
        if block.link.members:
            others = self._oldest(block.link.members, tier, engine_key)
            self._emit(
                keys[:1], tier, oldest_of_all(was, others), oldest_of_all(now, others), engine_key, assumed=assumed
            )
            keys = keys[1:]
        self._emit(keys, tier, was, now, engine_key, assumed=assumed)

    def _shift_final(self, member: bytes, final: bytes, tier: int, was: int | None, now: int | None) -> None:
        """Emit the change of a canonical block that ends in ``final`` when one of its members changes."""
        block = self._load(final)
        own = None if block is None else block.on(tier)
        if block is None or own is None or not block.link.keys:
            return
        others = oldest_of_all(own, self._oldest(block.link.members, tier, member))
        keys = split_keys(block.link.keys)[:1]
        self._emit(
            keys, tier, oldest_of_all(was, others), oldest_of_all(now, others), final, assumed=block.link.assumed
        )

    def _oldest(self, members: list[bytes], tier: int, without: bytes) -> int | None:
        """Return the oldest epoch among members on a tier, None when one of them is not there."""
        oldest = _LATEST
        for member in members:
            if member == without:
                continue
            block = self._load(member)
            epoch = None if block is None else block.on(tier)
            if epoch is None:
                return None
            oldest = min(oldest, epoch)
        return oldest

    def _join(self, engine_key: bytes, link: Link) -> None:
        """Note with a block's members that its first key is theirs too."""
        for member in link.members if link.keys else ():
            block = self._load(member) or Block({}, Link())
            known = engine_key in block.link.finals
            if not known:
                if len(block.link.finals) >= bounds.MAX_FINALS:
                    raise WireError(f"{bounds.MAX_FINALS} engine blocks share a canonical block with one before them")
                block.link.finals.append(engine_key)
            if not known or block.link.epoch != self._epoch:
                self._save(member, block)

    def _leave(self, engine_key: bytes, link: Link) -> None:
        for member in link.members if link.keys else ():
            block = self._load(member)
            if block is not None and engine_key in block.link.finals:
                block.link.finals.remove(engine_key)
                self._save(member, block)

    # --- the waiting room -----------------------------------------------------------------------------------------

    def _wait(self, engine_key: bytes, parent: bytes) -> int:
        """Let a block wait for its parent; returns its ticket. Whoever has waited longest makes room."""
        state = self._state
        self._make_room()
        ticket = state.next_ticket
        state.next_ticket += 1
        state.orphans += 1
        self._counts["orphans_parked"] += 1
        self._view.put(
            eb.ticket_key(self._ref_bytes, ticket), eb.encode_record(Ticket(self._epoch, self._group, engine_key))
        )
        children = self._children(parent)
        if engine_key not in children:
            while len(children) >= bounds.MAX_WAITING:
                children = self._give_up(parent, children)
            children.append(engine_key)
        table_key = eb.waiting_prefix(self._ref_bytes, self._group) + parent
        self._view.put(table_key, eb.encode_record(WaitingChildren(self._epoch, children)))
        return ticket

    def _children(self, parent: bytes) -> list[bytes]:
        """Return the engine keys that wait for a parent."""
        value = self._view.get(eb.waiting_prefix(self._ref_bytes, self._group) + parent)
        if value is None:
            return []
        waiting = eb.decode_waiting(value)
        return waiting.children if waiting.epoch >= self._state.orphans_since else []

    def _give_up(self, parent: bytes, children: list[bytes]) -> list[bytes]:
        """Forget the block that has waited longest for one parent; returns those that still do."""
        oldest, *others = children
        block = self._load(oldest)
        if block is not None and block.link.pending is not None and block.link.pending.parent == parent:
            self._forget(oldest, block, block.link.pending)
        return others

    def _forget(self, engine_key: bytes, block: Block, pending: Pending) -> None:
        self._counts["orphans_evicted"] += 1
        self._unwait(engine_key, pending)
        block.tiers = {}
        block.link = Link(finals=block.link.finals)
        self._save(engine_key, block)

    def _unwait(self, engine_key: bytes, pending: Pending) -> None:
        self._seated(pending)
        table_key = eb.waiting_prefix(self._ref_bytes, self._group) + pending.parent
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

    def _seated(self, pending: Pending) -> None:
        """Give back the ticket of a block that waits no longer."""
        self._state.orphans = max(self._state.orphans - 1, 0)
        if pending.ticket:
            self._view.delete(eb.ticket_key(self._ref_bytes, pending.ticket))

    def _make_room(self) -> None:
        """Forget the blocks that have waited longest until one more may wait."""
        state, home = self._state, self._group
        while state.orphans >= self._orphan_blocks and state.first_ticket < state.next_ticket:
            ticket = state.first_ticket
            state.first_ticket += 1
            value = self._view.get(eb.ticket_key(self._ref_bytes, ticket))
            if value is None:
                continue  # found its parent, or left, long ago
            self._view.delete(eb.ticket_key(self._ref_bytes, ticket))
            oldest = eb.decode_ticket(value)
            if oldest.epoch < state.orphans_since:
                continue
            self._enter(oldest.group)
            block = self._load(oldest.engine_key)
            if block is not None and block.link.pending is not None and block.link.pending.ticket == ticket:
                self._forget(oldest.engine_key, block, block.link.pending)
            self._enter(home)
        if state.orphans >= self._orphan_blocks:
            state.orphans = 0  # they wait without tickets, from an older build: their room is given to others


def _differs(known: Link, told: Link) -> bool:
    """Tell whether two links cannot be of the same tokens."""
    one, other = known.tail, told.tail
    return known.keys != told.keys or one is None or other is None or one.key != other.key or one.tokens != other.tokens
