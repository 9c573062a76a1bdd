"""One pod's engine blocks during one message: stores, placeholders and removals.

The common case, engine blocks that are canonical blocks and held by one tier, is a comparison of 13 bytes and one
put or delete a block. Everything else goes through :class:`~kvatlas.streams.resolve.engine_blocks.Block` values, in
``block_links``; what the index is told of it is made in ``block_updates``.
"""

from __future__ import annotations

from typing import Final

from kvatlas.bridge.model.block_key import KEY_BYTES, TOKEN_BYTES, block_keys
from kvatlas.bridge.model.chain import Tail, block_extra, check_extra, extend
from kvatlas.bridge.model.events import Event, Kind, Removed, Stored, Tier
from kvatlas.bridge.model.records import GroupSpec
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.engine_blocks import Block, Link
from kvatlas.streams.resolve.updates import flat
from kvatlas.streams.resolve.waiting import MASKED, ChainedBlocks, assumed_link

__all__ = ["PodBlocks"]

_WINDOW_MAX: Final = (1 << 32) - 1


class PodBlocks(ChainedBlocks):
    """A pod's engine blocks during one message; made with what :class:`BlockUpdates` takes."""

    # --- stores ---------------------------------------------------------------------------------------------------

    def recognise(self, event: Stored, table_keys: list[bytes], follower: Event | None) -> None:
        """Tell whether a store from the start of a prompt reports what is there already, and do not count it then.

        An engine that is asked for a full report announces the cached prefix of a request again, as one event from
        the start of the prompt, and then what the request adds. Nothing marks it; but a request whose prefix is cached
        has no other reason to store more of that prefix than its last block, and what it adds follows in the same
        message.

        Args:
            event: a store without a parent.
            table_keys: from :meth:`table_keys`.
            follower: the next event of the message.
        """
        if not self._auto or event.tier != Tier.GPU or not table_keys or not event.tokens:
            return
        self._enter(event.group)
        block = self._load(event.keys[0])
        if block is None or block.on(Tier.GPU) is None:
            return
        known = self._state.reports > 0
        if not known and len(event.keys) > 1 and isinstance(follower, Stored):
            known = follower.parent == event.keys[-1] and (follower.group, follower.tier) == (event.group, Tier.GPU)
        if known:
            self._state.reports += 1
            self._counts["reports"] += 1
            self.report = True

    def stored(self, event: Stored, table_keys: list[bytes], root: bytes) -> None:
        """Apply a stored event.

        Args:
            event: the event.
            table_keys: from :meth:`table_keys`.
            root: key that the event's first block chains from when it has no parent.

        Raises:
            WireError: its extra keys make no key; nothing was written.
        """
        self._enter(event.group)
        self._note_group(event)
        if self.report:
            copies, self._copies, self.report = self._copies, False, False
            try:
                self._stored(event, table_keys, root)
            finally:
                self._copies = copies
        else:
            self._stored(event, table_keys, root)

    def _stored(self, event: Stored, table_keys: list[bytes], root: bytes) -> None:
        if not event.tokens:
            self._placeholders(event)
        elif event.masked:
            self._masked(event, 0)
        elif event.unnamed:
            self._unnamed(event, root)
        else:
            if event.extra:
                check_extra(event.extra)
            if event.lookahead:
                self._state.aliasing = True
            self._guessed = False
            tail = Tail(root) if event.parent is None else self._tail_of(event.parent)
            if tail is None and event.context is not None and event.parent is not None:
                check_extra(event.context.extra)
                tail = self._beyond(event.context, event.parent, root, event.block_size_tokens)
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
        if (
            tail.tokens
            or size % self._canonical
            or event.ahead
            or self._guessed
            or (event.extra and size != self._canonical)
        ):
            self._linked(event, start, tail)
            return
        tokens = event.tokens[start * size * TOKEN_BYTES :] if start else event.tokens
        extra = block_extra(event.extra[start:], size) if event.extra else None
        keys = block_keys(tail.key, tokens, self._canonical, extra)
        per = size // self._canonical
        if per > 1:
            keys = [b"".join(keys[at : at + per]) for at in range(0, len(keys), per)]
        self._keyed(event, start, table_keys[start:], keys)

    def keyed(self, event: Stored, table_keys: list[bytes], keys: list[bytes], names: list[bytes]) -> None:
        """Store blocks whose block keys came with the event.

        Args:
            event: where they are; its tokens are not looked at.
            table_keys: one for each of ``keys``.
            keys: packed block keys of each engine block.
            names: what the index knows them by, where that is not their keys; else empty.
        """
        self._enter(event.group)
        self._note_group(event)
        if event.lookahead:
            self._state.aliasing = True
        if not names and not event.unnamed:
            self._keyed(event, 0, table_keys, keys)
            return
        place = self._place_of(event.tier, event.ownership)
        for number, engine_key in enumerate(event.keys):
            block = self._load(engine_key) if event.unnamed else None
            if block is not None and block.tiers:
                self._announce(engine_key, block, place)
                continue
            self._store_keyed(event, engine_key, keys[number], names[number] if names else keys[number])
        if self._state.orphans:
            self._release(event.keys)

    def _store_keyed(self, event: Stored, engine_key: bytes, key: bytes, name: bytes) -> None:
        place, tail = self._place_of(event.tier, event.ownership), Tail(key[-KEY_BYTES:])
        if not event.unnamed:
            self._place(engine_key, Link(name, [], tail), place)
        elif self._state.named:
            self._hold(engine_key, self._load(engine_key), place)
        else:
            self._place(engine_key, assumed_link(name, [], tail), place)

    def _keyed(self, event: Stored, start: int, table_keys: list[bytes], keys: list[bytes]) -> None:
        """Store blocks from ``start`` on that end where canonical blocks end."""
        view, state, copies = self._view, self._state, self._copies
        get, put = view.get, view.put
        tier, engine_keys = int(event.tier), event.keys[start:] if start else event.keys
        epoch = 0 if tier == Tier.SHARED else self._epoch
        place = self._place_of(tier, event.ownership) if event.ownership else tier
        once = eb.HEAD.pack(eb.PLAIN, 1, place, 1, epoch)
        twice = eb.HEAD.pack(eb.PLAIN, 1, place, 2, epoch)
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
                    self._counts["blocks_again"] += 1
                    self.again += 1
                    if copies:
                        put(table_key, twice + key)
                    continue
            if fresh:
                self._add(fresh, tier, epoch)
                fresh = []
            self._place(engine_keys[number], Link(key, [], Tail(key[-KEY_BYTES:])), place)
        if fresh:
            self._add(fresh, tier, epoch)
        if state.orphans:
            self._release(engine_keys)

    def _linked(self, event: Stored, start: int, tail: Tail) -> None:
        """Store blocks that share canonical blocks, or whose extra keys must be laid over several."""
        width = event.block_size_tokens * TOKEN_BYTES
        place = self._place_of(event.tier, event.ownership)
        behind, guessed = event.tokens + event.ahead, self._guessed
        for number in range(start, len(event.keys)):
            engine_key = event.keys[number]
            extra = event.extra[number] if event.extra else ()
            end = (number + 1) * width
            ahead = behind[end : end + TOKEN_BYTES] if event.ahead else b""
            tokens = event.tokens[number * width : end]
            keys, members, tail = extend(tail, engine_key, tokens, extra, self._canonical, ahead=ahead)
            self._place(engine_key, Link(keys, members, tail, assumed=guessed), place)
        if self._state.orphans:
            self._release(event.keys[start:])

    def _placeholders(self, event: Stored) -> None:
        """Add a tier to blocks that are known; an offload event without tokens says nothing of others."""
        place = self._place_of(event.tier, event.ownership)
        for engine_key in event.keys:
            block = self._load(engine_key)
            if block is None or not block.tiers:
                self._counts["placeholders_unknown"] += 1
            else:
                self._announce(engine_key, block, place)

    def _masked(self, event: Stored, start: int) -> None:
        """Store blocks whose tokens do not line up: known by another group's block of the same size, or keyless."""
        place = self._place_of(event.tier, event.ownership)
        for engine_key in event.keys[start:]:
            block = self._load(engine_key)
            if block is not None and block.tiers and block.link.tail is not None:
                self._announce(engine_key, block, place)
                continue
            link = self._borrow(engine_key)
            if link is not None:
                self._place(engine_key, link, place)
                continue
            self._counts["masked"] += 1
            self._keyless.append((event.group, engine_key))
            self._announce(engine_key, block or Block({}, Link()), place)
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
        place = self._place_of(tier, event.ownership) if event.ownership else tier
        once = eb.HEAD.pack(eb.PLAIN, 1, place, 1, epoch)
        fast = not self._state.aliasing and not event.remaining
        lost: list[bytes] = []
        for number, table_key in enumerate(table_keys):
            old = get(table_key)
            if old is None:
                self._counts["removals_unknown"] += 1
            elif fast and old[: eb.HEAD_BYTES] == once:
                delete(table_key)
                lost.append(old[eb.HEAD_BYTES :])
            else:
                left = event.remaining[number] if event.remaining else None
                self._remove(event.keys[number], table_key, place, left)
        if lost:
            self._updates.remove(flat(lost), self._holder(tier, epoch))

    def _remove(self, engine_key: bytes, table_key: bytes, place: int, left: int | None) -> None:
        """Remove one copy; ``left`` is how many the engine says are left, None when it does not."""
        block = self._load(engine_key)
        if block is None:
            self._view.delete(table_key)  # dead as a whole
        held = None if block is None else block.tiers.get(place)
        if block is None or held is None:
            self._counts["removals_unknown"] += 1
            return
        count, epoch = held
        if left is None:
            left = count - 1 if self._copies and not self._state.suspect(eb.tier_at(place), epoch) else 0
        elif left != count - 1:
            self._counts["copies_corrected"] += 1
        self._set(engine_key, block, place, (min(left, eb.MAX_ANNOUNCEMENTS), epoch) if left > 0 else None)

    def _note_group(self, event: Stored) -> None:
        """Learn what the group is; what the GPU's own events say wins over offload events, what is said over silence.

        Sizes of offloaded blocks say how the tier cuts, not how the group does.
        """
        state = self._state
        size = event.block_size_tokens if event.tier == Tier.GPU or not event.unnamed else 0
        spec = state.groups.get(event.group)
        kind, window = event.kind, min(event.window_tokens, _WINDOW_MAX)
        if spec is None:
            state.groups[event.group] = GroupSpec(int(kind or Kind.FULL), window, size)
        elif kind is None and size == spec.block_size_tokens:
            return
        elif event.tier == Tier.GPU and event.tokens:
            if size and spec.block_size_tokens not in (0, size):
                state.aliasing = True  # partial blocks: two engine keys may cover the same tokens
            told = (spec.kind, spec.window_tokens) if kind is None else (int(kind), window)
            known = GroupSpec(*told, max(size, spec.block_size_tokens))
            if known == spec:
                return
            state.groups[event.group] = known
        else:
            return
        self._holders.clear()
