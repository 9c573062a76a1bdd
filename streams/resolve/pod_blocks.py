"""One pod's engine blocks during one message: stores, placeholders and removals.

The common case, engine blocks that are canonical blocks and held by one tier, is a comparison of 13 bytes and one
put or delete a block. Everything else goes through :class:`~kvatlas.streams.resolve.engine_blocks.Block` values, in
``block_links``; what the index is told of it is made in ``block_updates``.
"""

from __future__ import annotations

from typing import Final

from kvatlas.bridge.model.block_key import KEY_BYTES, TOKEN_BYTES, block_keys
from kvatlas.bridge.model.chain import Tail, block_extra, check_extra, extend
from kvatlas.bridge.model.events import Removed, Stored, Tier
from kvatlas.bridge.model.records import GroupSpec
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.engine_blocks import Block, Link
from kvatlas.streams.resolve.links import MASKED, LinkedBlocks, RefusedError
from kvatlas.streams.resolve.updates import flat

__all__ = ["PodBlocks", "RefusedError"]

_WINDOW_MAX: Final = (1 << 32) - 1


class PodBlocks(LinkedBlocks):
    """A pod's engine blocks during one message; made with what :class:`BlockUpdates` takes."""

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
        if tail is MASKED:
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
            self._updates.remove(flat(lost), self._holder(tier, epoch))

    def _remove(self, engine_key: bytes, table_key: bytes, tier: int) -> None:
        block = self._load(engine_key)
        if block is None:
            self._view.delete(table_key)  # dead as a whole
        held = None if block is None else block.tiers.get(tier)
        if block is None or held is None:
            self._counts["removals_unknown"] += 1
            return
        count, epoch = held
        if self._copies and count > 1 and not self._state.suspect(tier, epoch):
            self._set(engine_key, block, tier, (count - 1, epoch))
        else:
            self._set(engine_key, block, tier, None)

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
