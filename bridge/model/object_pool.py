"""Objects that a pool of several engines holds, named by what the engines' own events say of their blocks. Pure.

The pool's events name objects and no tokens. An object is a part of the block whose engine key is in its name; what
tokens that block has is learnt from the events of the engines that put it there.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Final, Literal, NamedTuple

from kvatlas.bridge.model.adapters.mooncake import ObjectEvent
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.chunk_cache import ChunkHolder, Name, Part
from kvatlas.bridge.model.records import KeyedStored

#: Engines publish 8 bytes of a block's hash: SGLang its first, vLLM its last.
_PUBLISHED: Final = 8
_PLACE: Final = ("pool", "")


class ObjectNames(NamedTuple):
    """How objects are named.

    Attributes:
        pattern: whose first group is a block's hash in hexadecimal; None where only bare numbers are.
        end: which end of a longer hash engines publish.
        parts: objects that make one block.
    """

    pattern: re.Pattern[str] | None = None
    end: Literal["first", "last"] = "first"
    parts: int = 1

    def engine_key(self, event: ObjectEvent) -> bytes | None:
        """Return the engine key of an object's block; None where its name says none."""
        if (key := event.engine_key) is not None:
            return key
        found = self.pattern.search(event.object_key) if self.pattern is not None else None
        try:
            whole = bytes.fromhex(found[1]) if found is not None and found[1] else b""
        except ValueError:
            return None
        if not whole:
            return None
        return whole.rjust(_PUBLISHED, b"\0")[:_PUBLISHED] if self.end == "first" else whole[-_PUBLISHED:]


class NamedBlocks:
    """Engine keys and the canonical keys of their tokens, the newest up to a limit."""

    def __init__(self, limit: int) -> None:
        """Start empty."""
        self._limit = limit
        self._blocks: OrderedDict[bytes, tuple[bytes, int]] = OrderedDict()

    def learn(self, event: KeyedStored) -> list[bytes]:
        """Take what an engine announced; returns the engine keys that have a name now.

        Blocks that count only with the token behind them have none.
        """
        width = event.keys_per_block * KEY_BYTES
        if not width or event.unnamed or event.names or len(event.block_keys) != width * len(event.engine_keys):
            return []
        for number, key in enumerate(event.engine_keys):
            self._blocks[key] = event.block_keys[number * width : (number + 1) * width], event.block_size_tokens
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._limit:
            self._blocks.popitem(last=False)
        return event.engine_keys

    def keys(self, chunk: bytes, _root: bytes, _canonical_tokens: int) -> bytes | None:
        """Return the packed canonical keys of a block, which say model, adapter and salt themselves."""
        found = self._blocks.get(chunk)
        return found[0] if found is not None else None

    def tokens_of(self, chunk: bytes) -> int:
        """Return a block's tokens; 0 for one that has no name."""
        found = self._blocks.get(chunk)
        return found[1] if found is not None else 0


class ObjectPool:
    """What one pool holds.

    Attributes:
        holder: by block, as the index is to be told.
        nameless: objects put whose name says no block.
    """

    def __init__(self, names: ObjectNames, canonical_tokens: int, limit: int) -> None:
        """Start empty; ``limit`` bounds blocks held and blocks whose tokens are remembered."""
        self.nameless = 0
        self._names = names
        self._blocks = NamedBlocks(limit)
        self._canonical, self._limit = canonical_tokens, limit
        self._parts: dict[bytes, dict[str, int]] = {}
        self.holder = ChunkHolder(self._blocks, canonical_tokens, limit)

    def learn(self, event: KeyedStored) -> None:
        """Take what an engine announced on its own tiers."""
        for key in self._blocks.learn(event):
            self.holder.resolved(key)

    def apply(self, event: ObjectEvent) -> None:
        """Take one event of the pool."""
        key = self._names.engine_key(event)
        if key is None:
            self.nameless += event.stored
            return
        parts = self._parts.get(key, {})
        if event.stored:
            if event.object_key not in parts and len(parts) < self._names.parts:
                free = next(number for number in range(self._names.parts) if number not in parts.values())
                if not self.holder.store(_name(key), self._part(free), _PLACE):
                    return
                self._parts.setdefault(key, {})[event.object_key] = free
            elif event.object_key in parts:
                self.holder.store(_name(key), self._part(parts[event.object_key]), _PLACE)
        elif event.object_key in parts:
            self.holder.delete(_name(key), self._part(parts.pop(event.object_key)), _PLACE)
            if not parts:
                del self._parts[key]

    def clear(self) -> None:
        """Forget all objects: the pool has begun anew. What blocks are called stays true."""
        self._parts.clear()
        self.holder = ChunkHolder(self._blocks, self._canonical, self._limit)

    def _part(self, number: int) -> Part:
        return self._names.parts, number, 0


def _name(key: bytes) -> Name:
    return Name("", "", key)
