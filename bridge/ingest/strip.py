"""Token-free batches: block keys are computed here, token ids go no further.

What a batch says is kept, but for tokens. A block whose keys cannot be computed is forwarded without keys
(``keys_per_block`` 0), which readers take as an event without tokens: a missing hit, never a wrong one. That is a
block whose parent was never seen, whose tokens do not line up with its keys, whose size is no multiple of the
canonical block size, or that an offload event names by its tokens alone while salts or pictures are in use. A parent
may come after its child in one message.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import groupby
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.block_key import KEY_BYTES, TOKEN_BYTES, ahead_keys, block_keys, root_key
from kvatlas.bridge.model.chain import Tail, block_extra, check_extra, extend, split_keys
from kvatlas.bridge.model.events import Batch, Cleared, Limits, Removed, Stored
from kvatlas.bridge.model.records import KeyedBatch, KeyedCleared, KeyedRemoved, KeyedStored

_ROOTS_MAX: Final = 10_000
#: Engine blocks of a pod whose keys are remembered for children that follow: about 10 MB.
KNOWN_BLOCKS: Final = 65_536

#: Events of one message by the parent (its size, its engine key) that it has not named yet, with their place in it.
_Waiting = dict[tuple[int, bytes], list[tuple[int, Stored]]]


class KnownBlocks:
    """Engine blocks of one pod whose block keys are known; the oldest and the removed go first.

    Engines hash tokens, not groups: blocks of one size and one engine key hold the same tokens, so size and key name
    a block here.
    """

    def __init__(self, limit: int = KNOWN_BLOCKS) -> None:
        """Hold at most ``limit`` engine blocks.

        ``extra_named`` says that salts, pictures or embeddings have named blocks, ``adapted`` that adapters have.
        """
        self.limit = limit
        self._keys: OrderedDict[tuple[int, bytes], bytes] = OrderedDict()
        self._sizes: set[int] = set()
        self.extra_named = False
        self.adapted = False

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, size_tokens: int, engine_key: bytes) -> bytes | None:
        """Return the packed block keys of an engine block."""
        return self._keys.get((size_tokens, engine_key))

    def put(self, size_tokens: int, engine_key: bytes, packed: bytes) -> None:
        """Remember an engine block."""
        place = (size_tokens, engine_key)
        self._keys[place] = packed
        self._keys.move_to_end(place)
        self._sizes.add(size_tokens)
        if len(self._keys) > self.limit:
            self._keys.popitem(last=False)

    def removed(self, engine_key: bytes) -> None:
        """Forget this one before others: it may still be on another tier, so not at once."""
        for size in self._sizes:
            if (size, engine_key) in self._keys:
                self._keys.move_to_end((size, engine_key), last=False)

    def clear(self) -> None:
        """Forget all: another engine process may hash otherwise."""
        self._keys.clear()

    def learn(self, batch: KeyedBatch) -> None:
        """Remember what a stripped batch on the log says."""
        for event in batch.events:
            if isinstance(event, KeyedStored):
                self.extra_named = self.extra_named or event.salted or event.pictured
                self.adapted = self.adapted or event.adapted
            if isinstance(event, KeyedStored) and event.keys_per_block > 0 and not event.unnamed:
                width = event.keys_per_block * KEY_BYTES
                if len(event.block_keys) == width * len(event.engine_keys):
                    for number, engine_key in enumerate(event.engine_keys):
                        packed = event.block_keys[number * width : (number + 1) * width]
                        self.put(event.block_size_tokens, engine_key, packed)
            elif isinstance(event, KeyedRemoved):
                for engine_key in event.engine_keys:
                    self.removed(engine_key)


class Stripped(NamedTuple):
    """A batch without tokens, and why parts of it are not in it."""

    batch: KeyedBatch
    rejected: list[str]
    keyless: int


class Stripper:
    """Strips one pod's messages."""

    def __init__(self, engine: str, model: str, block_size_tokens: int, limits: Limits, known: KnownBlocks) -> None:
        """Go on from the blocks that are known.

        Args:
            engine: adapter name.
            model: model name, part of every block key.
            block_size_tokens: canonical block size.
            limits: bounds on one message.
            known: engine blocks seen before; grows.
        """
        self._decode = adapter(engine)
        self._model = model
        self._canonical = block_size_tokens
        self._limits = limits
        self.known = known
        #: Blocks that their tokens alone name, for their children on the same tiers.
        self._assumed = KnownBlocks(known.limit)
        self._roots: dict[tuple[str | None, str | None], bytes] = {}

    def strip(self, payload: bytes) -> Stripped:
        """Return a message without tokens.

        A message that is no batch at all comes back empty, so that its sequence still counts.
        """
        try:
            batch: Batch = self._decode(payload, self._limits)
        except WireError as error:
            return Stripped(KeyedBatch(timestamp=0.0), [str(error)], 0)
        rejected = [item.reason for item in batch.rejected]
        places: list[list[KeyedStored | KeyedRemoved | KeyedCleared]] = []
        waiting: _Waiting = {}
        for event in batch.events:
            if isinstance(event, Stored):
                try:
                    check_extra(event.extra)
                except WireError as error:
                    rejected.append(str(error))
                    continue
                places.append([])
                self._place(event, places, waiting)
            elif isinstance(event, Removed):
                for engine_key in event.keys:
                    self.known.removed(engine_key)
                places.append([_removed(event)])
            elif isinstance(event, Cleared):
                places.append([KeyedCleared()])
        events = [part for parts in places for part in parts]
        keyless = sum(len(p.engine_keys) for p in events if isinstance(p, KeyedStored) and not p.keys_per_block)
        return Stripped(KeyedBatch(timestamp=batch.timestamp, dp_rank=batch.dp_rank, events=events), rejected, keyless)

    def _place(
        self, event: Stored, places: list[list[KeyedStored | KeyedRemoved | KeyedCleared]], waiting: _Waiting
    ) -> None:
        """Put an event in the last place, and fill the places of earlier ones that waited for its blocks.

        An event keeps its place among removals and clears: a child that came before its parent is keyed late, not
        moved.
        """
        ready = [(len(places) - 1, event)]
        while ready:
            number, event = ready.pop()
            parts = list(self._stored(event))
            places[number] = list(parts)
            parent, size = event.parent, event.block_size_tokens
            if parent is not None and self._chains(event) and self.known.get(size, parent) is None:
                waiting.setdefault((size, parent), []).append((number, event))
            if waiting:
                for part in parts:
                    for engine_key in part.engine_keys if part.keys_per_block else ():
                        ready += waiting.pop((size, engine_key), ())

    def _chains(self, event: Stored) -> bool:
        """Tell whether block keys can be computed at all, given the parent's."""
        size = event.block_size_tokens
        return bool(event.tokens) and not event.masked and size > 0 and size % self._canonical == 0

    def _stored(self, event: Stored) -> Iterator[KeyedStored]:
        size, known = event.block_size_tokens, self.known
        if not event.unnamed:
            known.extra_named = known.extra_named or bool(event.cache_salt or event.extra)
            known.adapted = known.adapted or bool(event.lora)
        if not self._chains(event):
            yield _part(event, 0, len(event.keys), b"", 0)
            return
        per = size // self._canonical
        if event.unnamed:
            yield from self._unnamed(event, per)
            return
        start, packed = 0, b""
        before = self._before(event)
        if before is not None:
            packed = self._keys(event, 0, before[-KEY_BYTES:])
        else:
            # A block may be known though its parent is not; the chain goes on behind it.
            found = (number for number, key in enumerate(event.keys) if known.get(size, key) is not None)
            start = next(found, len(event.keys))
            if start:
                yield _part(event, 0, start, b"", 0)
            if start == len(event.keys):
                return
            own = known.get(size, event.keys[start]) or b""
            packed = own + self._keys(event, start + 1, own[-KEY_BYTES:])
        width = per * KEY_BYTES
        for number, engine_key in enumerate(event.keys[start:]):
            known.put(size, engine_key, packed[number * width : (number + 1) * width])
        part = _part(event, start, len(event.keys), packed, per)
        yield msgspec.structs.replace(part, names=self._names(event, start, packed)) if event.ahead else part

    def _unnamed(self, event: Stored, per: int) -> Iterator[KeyedStored]:
        """Name an offload event's blocks as they are known, else by their tokens while nothing else names blocks."""
        size, known = event.block_size_tokens, self.known
        guess = not (known.extra_named or (event.bare and known.adapted))
        before = self._before(event, guess=guess)
        packed: list[bytes] = []
        told: list[bool] = []
        for number, engine_key in enumerate(event.keys):
            own = known.get(size, engine_key)
            told.append(own is not None)
            if own is None and guess:
                own = self._assumed.get(size, engine_key)
                if own is None and before:
                    own = self._keys(_only(event, number), 0, before[-KEY_BYTES:])
                    self._assumed.put(size, engine_key, own)
            before = own or b""
            packed.append(before)
        start = 0
        for (named, keyed), run in groupby(zip(told, map(bool, packed), strict=True)):
            end = start + len(list(run))
            part = _part(event, start, end, b"".join(packed[start:end]), per if keyed else 0)
            yield msgspec.structs.replace(part, unnamed=not named)
            start = end

    def _before(self, event: Stored, *, guess: bool = False) -> bytes | None:
        """Return the packed keys of what an event's first block goes on from, None when that is not known.

        With ``guess`` a parent that its tokens alone name is known.
        """
        size = event.block_size_tokens
        if event.parent is None:
            return self._root(event.lora, event.cache_salt)
        found = self.known.get(size, event.parent)
        if found is None and guess:
            found = self._assumed.get(size, event.parent)
        context = event.context
        if found is not None or context is None:
            return found
        salt = context.cache_salt
        key = self._root(event.lora, salt) if context.parent is None else self.known.get(size, context.parent)
        if key is None:
            return None
        blocks = len(context.tokens) // (size * TOKEN_BYTES)
        keys = [event.parent] * blocks
        between = Stored(keys=keys, tokens=context.tokens, block_size_tokens=size, extra=context.extra)
        return self._keys(between, 0, key[-KEY_BYTES:])

    def _names(self, event: Stored, start: int, packed: bytes) -> bytes:
        """Return what the index knows blocks by where the token behind a block counts."""
        tokens = event.tokens[start * event.block_size_tokens * TOKEN_BYTES :] + event.ahead
        return b"".join(ahead_keys(split_keys(packed), tokens, self._canonical))

    def _keys(self, event: Stored, start: int, key: bytes) -> bytes:
        """Return the packed keys of the blocks from ``start`` on, behind ``key``."""
        size = event.block_size_tokens
        if not event.extra or size == self._canonical:
            tokens = event.tokens[start * size * TOKEN_BYTES :] if start else event.tokens
            extra = block_extra(event.extra[start:], size) if event.extra else None
            return b"".join(block_keys(key, tokens, self._canonical, extra))
        tail, found = Tail(key), []
        width = size * TOKEN_BYTES
        for number in range(start, len(event.keys)):
            tokens = event.tokens[number * width : (number + 1) * width]
            keys, _, tail = extend(tail, event.keys[number], tokens, event.extra[number], self._canonical)
            found.append(keys)
        return b"".join(found)

    def _root(self, lora: str | None, salt: str | None) -> bytes:
        name = (lora, salt)
        root = self._roots.get(name)
        if root is None:
            if len(self._roots) >= _ROOTS_MAX:
                self._roots.clear()  # salts come and go; a root is cheap to make again
            root = self._roots[name] = root_key(self._model, *name)
        return root


def _removed(event: Removed) -> KeyedRemoved:
    return KeyedRemoved(
        engine_keys=event.keys,
        tier=int(event.tier),
        group=event.group,
        ownership=event.ownership,
        remaining=event.remaining,
    )


def _only(event: Stored, number: int) -> Stored:
    """Return one block of an event, without its extra keys."""
    width = event.block_size_tokens * TOKEN_BYTES
    tokens = event.tokens[number * width : (number + 1) * width]
    return Stored(keys=[event.keys[number]], tokens=tokens, block_size_tokens=event.block_size_tokens)


def _part(event: Stored, start: int, end: int, packed: bytes, per: int) -> KeyedStored:
    return KeyedStored(
        engine_keys=event.keys[start:end],
        parent=event.keys[start - 1] if start else event.parent,
        block_keys=packed,
        keys_per_block=per,
        tier=int(event.tier),
        group=event.group,
        kind=-1 if event.kind is None else int(event.kind),
        window_tokens=event.window_tokens,
        block_size_tokens=event.block_size_tokens,
        lookahead=event.lookahead,
        ownership=event.ownership,
        unnamed=event.unnamed,
        bare=event.bare,
        salted=event.cache_salt is not None,
        pictured=bool(event.extra),
        adapted=event.lora is not None,
        chunk_tokens=len(event.tokens) // TOKEN_BYTES if event.unnamed and not event.masked else 0,
        lora=event.lora or "",
        session=event.session,
    )
