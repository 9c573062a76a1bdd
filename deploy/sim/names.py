"""Canonical names of what a cache holds: engine key -> block keys, for the truth endpoint only.

Scores are never computed from these; they compare the contents of the caches.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from kvatlas.bridge.model import block_key
from kvatlas.deploy.sim.cache import StoredBlocks


class Name(msgspec.Struct, frozen=True, gc=False):
    """What one engine block is called canonically.

    Attributes:
        keys: block keys that end inside this engine block.
        last: block key to chain the next one from.
        rest: tokens after it, packed, that do not fill a canonical block yet.
        members: engine keys of this and earlier blocks that the first of ``keys`` (or ``rest``) is made of.
    """

    keys: tuple[bytes, ...]
    last: bytes
    rest: bytes
    members: tuple[int, ...]


class Names:
    """Keeps the names of one pod's blocks.

    Args:
        model: model that the pod serves.
        canonical_tokens: tokens in one canonical block.
    """

    def __init__(self, model: str, canonical_tokens: int) -> None:
        self._model = model
        self._step = canonical_tokens * block_key.TOKEN_BYTES
        self._tokens = canonical_tokens
        self._names: dict[int, Name] = {}

    def add(self, stored: StoredBlocks) -> None:
        """Name the blocks of an event that has tokens; its parent must be known."""
        size = len(stored.tokens) // len(stored.keys)
        if stored.parent is None:
            salt = stored.extra[0][-1] if stored.extra and stored.extra[0] and stored.extra[0][-1] else None
            salt = None if salt == stored.lora else salt
            parent = Name((), block_key.root_key(self._model, stored.lora, salt), b"", ())
        else:
            parent = self._names[stored.parent]
        for number, key in enumerate(stored.keys):
            packed = parent.rest + block_key.pack_tokens(stored.tokens[number * size : (number + 1) * size])
            keys = block_key.block_keys(parent.last, packed, self._tokens)
            parent = Name(
                keys=tuple(keys),
                last=keys[-1] if keys else parent.last,
                rest=packed[len(keys) * self._step :],
                members=(*(parent.members if parent.rest else ()), key),
            )
            self._names[key] = parent

    def drop(self, key: int) -> None:
        """Forget one name."""
        self._names.pop(key, None)

    def clear(self) -> None:
        """Forget all names."""
        self._names.clear()

    def of(self, held: Collection[int]) -> set[bytes]:
        """Return the block keys whose every engine block is in ``held``."""
        return {
            key
            for engine_key in held
            if (name := self._names[engine_key]).keys and all(member in held for member in name.members)
            for key in name.keys
        }
