"""One pod's engine blocks in their chains: where a block's children go on, and what is done while that is unknown.

A block's name needs its parent's. A parent may come later, from another tier, or never; and the event of an offloaded
block may not say all that names it. Such blocks wait or are held: they are on their tiers, but stand for nothing that
a prompt could match.
"""

from __future__ import annotations

import math
from typing import Final

from kvatlas.bridge.model.block_key import KEY_BYTES, TOKEN_BYTES
from kvatlas.bridge.model.chain import Tail, extend
from kvatlas.bridge.model.events import Context, Stored
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.engine_blocks import Block, Link, Pending
from kvatlas.streams.resolve.links import LinkedBlocks

#: Where the children of a block without keys go on: nowhere.
MASKED: Final = Tail(b"")


class ChainedBlocks(LinkedBlocks):
    """A pod's engine blocks during one message, each behind its parent."""

    def _tail_of(self, engine_key: bytes) -> Tail | None:
        """Return where a parent's children go on; None when it is not known (yet).

        A parent that its tokens alone name is known as long as nothing else names blocks; ``_guessed`` then says that
        its children are named no better.
        """
        block = self._load(engine_key)
        link: Link | None
        if block is not None and block.tiers and block.link.pending is None and not block.link.held:
            if block.masked:
                return MASKED
            link = block.link
        else:
            link = self._borrow(engine_key)
        if link is None or (link.assumed and self._state.named):
            return None
        self._guessed = self._guessed or link.assumed
        return link.tail

    def _borrow(self, engine_key: bytes) -> Link | None:
        """Return what an engine key stands for in another group.

        Engines hash tokens, not groups: in groups of one block size an engine key names the same tokens.
        """
        for group in self._siblings():
            block = self._load(engine_key, group)
            if block is not None and block.tiers and block.link.tail is not None:
                return Link(block.link.keys, block.link.members, block.link.tail, assumed=block.link.assumed)
        return None

    def _siblings(self) -> list[int]:
        """Return the other groups with the block size of this one."""
        groups = self._state.groups
        own = groups.get(self._group)
        if own is None or not own.block_size_tokens or len(groups) == 1:
            return []
        size = own.block_size_tokens
        return [group for group, spec in groups.items() if group != self._group and spec.block_size_tokens == size]

    def _beyond(self, context: Context, parent: bytes, root: bytes, size_tokens: int) -> Tail | None:
        """Return where the children of ``parent`` go on, given the tokens since the last announced block.

        None of the blocks between counts as held: a canonical block that they have a part in does not either.
        """
        tail = Tail(root) if context.parent is None else self._tail_of(context.parent)
        if tail is None or tail is MASKED:
            return tail
        width = size_tokens * TOKEN_BYTES
        for number, at in enumerate(range(0, len(context.tokens), width)):
            extra = context.extra[number] if context.extra else ()
            _, _, tail = extend(tail, parent, context.tokens[at : at + width], extra, self._canonical)
        self._counts["chains_rebuilt"] += 1
        return tail

    # --- blocks whose names are not known yet -----------------------------------------------------------------------

    def _known_or_parked(self, event: Stored, number: int) -> Tail | None:
        """Announce a block whose parent is unknown: it may be known itself, else it waits.

        Returns:
            Where its children go on; None while that is not known.
        """
        engine_key = event.keys[number]
        place = self._place_of(event.tier, event.ownership)
        block = self._load(engine_key)
        if block is not None:
            link = block.link
            if link.tail is not None and (event.unnamed or not link.assumed):
                if not block.tiers:
                    self._join(engine_key, link)
                self._announce(engine_key, block, place)
                return link.tail
            told = event.unnamed or (link.pending is not None and not link.pending.unnamed)
            if block.tiers and (block.masked or (told and link.tail is None)):
                self._announce(engine_key, block, place)
                return MASKED if block.masked else None
        self._park(event, number, block, place)
        return None

    def _park(self, event: Stored, number: int, block: Block | None, place: int) -> None:
        """Let a block wait for its parent with all that its event says; it stays on the tiers that hold it."""
        engine_key = event.keys[number]
        parent = event.keys[number - 1] if number else event.parent
        assert parent is not None
        if block is not None:
            self._unname(engine_key, block)
        if not self._orphan_blocks:
            self._counts["orphans_evicted"] += 1
            return
        width = event.block_size_tokens * TOKEN_BYTES
        end = (number + 1) * width
        pending = Pending(
            parent,
            event.tokens[number * width : end],
            list(event.extra[number]) if event.extra else [],
            self._epoch,
            self._wait(engine_key, parent),
            event.unnamed,
            (event.tokens + event.ahead)[end : end + TOKEN_BYTES] if event.ahead else b"",
        )
        block = block or Block({}, Link())
        block.link = Link(finals=block.link.finals, pending=pending)
        self._save(engine_key, block)
        self._announce(engine_key, block, place)

    def _unname(self, engine_key: bytes, block: Block) -> None:
        """Take back what a block was said to stand for, or to wait for."""
        if block.link.pending is not None:
            self._unwait(engine_key, block.link.pending)
        elif block.link.tail is not None:
            for tier, epoch in block.levels().items():
                self._shift_own(engine_key, block, tier, epoch, None)
            self._leave(engine_key, block.link)

    def _unnamed(self, event: Stored, root: bytes) -> None:
        """Store blocks whose event cannot say salts, pictures and embeddings.

        What is known of an engine key stands: such an event only adds a tier. A key that is not known is named by its
        tokens only as long as the pod has shown nothing else that names blocks; then it is held until an event names
        it in full.
        """
        place = self._place_of(event.tier, event.ownership)
        self._note_chunk(event)
        tail: Tail | None = None
        for number, engine_key in enumerate(event.keys):
            block = self._load(engine_key)
            if block is not None and block.tiers:
                self._announce(engine_key, block, place)
            elif (borrowed := self._borrow(engine_key)) is not None:
                self._place(engine_key, borrowed, place)
            elif self._state.named:
                self._hold(engine_key, block, place)
            else:
                if not number:
                    tail = Tail(root) if event.parent is None else self._tail_of(event.parent)
                elif tail is None:
                    tail = self._tail_of(event.keys[number - 1])
                tail = self._assume(event, number, tail, place)
                continue
            tail = None
        if self._state.orphans:
            self._release(event.keys)

    def _assume(self, event: Stored, number: int, tail: Tail | None, place: int) -> Tail | None:
        """Store a block under the name that its tokens alone give it."""
        if tail is None:
            return self._known_or_parked(event, number)
        engine_key = event.keys[number]
        if tail is MASKED:
            self._counts["masked"] += 1
            self._announce(engine_key, self._load(engine_key) or Block({}, Link()), place)
            return MASKED
        width = event.block_size_tokens * TOKEN_BYTES
        tokens = event.tokens[number * width : (number + 1) * width]
        keys, members, behind = extend(tail, engine_key, tokens, (), self._canonical)
        self._place(engine_key, assumed_link(keys, members, behind), place)
        return behind

    def _hold(self, engine_key: bytes, block: Block | None, place: int) -> None:
        self._counts["blocks_held"] += 1
        finals = [] if block is None else block.link.finals
        self._announce(engine_key, Block({}, Link(finals=finals, held=True)), place)

    def _note_chunk(self, event: Stored) -> None:
        """Learn how many tokens the offload tier loads as one: what all its events are a multiple of."""
        self._state.chunk_tokens = math.gcd(self._state.chunk_tokens, len(event.tokens) // TOKEN_BYTES)

    # --- parents that came ------------------------------------------------------------------------------------------

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
        self._guessed = False
        tail = self._tail_of(parent)
        if tail is None:
            return []
        self._view.delete(table_key)
        known = []
        for child in eb.decode_waiting(value).children:
            block = self._load(child)
            if block is None or block.link.pending is None or block.link.pending.parent != parent:
                continue
            self._resolve(child, block, block.link.pending, tail)
            known.append(child)
        return known

    def _resolve(self, engine_key: bytes, block: Block, pending: Pending, tail: Tail) -> None:
        """Name a block whose parent has come."""
        self._seated(pending)
        guessed = pending.unnamed or self._guessed
        if tail is MASKED or (guessed and self._state.named):
            held = tail is not MASKED
            self._counts["blocks_held" if held else "masked"] += 1
            block.link = Link(finals=block.link.finals, held=held)
            self._save(engine_key, block)
            return
        self._counts["orphans_resolved"] += 1
        keys, members, behind = extend(
            tail, engine_key, pending.tokens, pending.extra, self._canonical, ahead=pending.ahead
        )
        link = assumed_link(keys, members, behind) if guessed else Link(keys, members, behind)
        self._mean(engine_key, block, link)


def assumed_link(keys: bytes, members: list[bytes], tail: Tail) -> Link:
    """Return the link of an offloaded block named by its tokens alone.

    Of several canonical blocks the last stands for all: the tier loads them as one or not at all.
    """
    if not members and not tail.tokens:
        keys = keys[-KEY_BYTES:]
    return Link(keys, members, tail, assumed=True)
