"""Block keys of stretches of prompts seen before: a conversation that goes on hashes what is new, not all of it again.

A stretch is named by the hash of the key before it and its tokens, so its name says all that its keys depend on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from kvatlas.bridge.model.block_key import TOKEN_BYTES, block_keys, chain

#: Blocks of a stretch: short prompts have none, and cost less to hash than to look up.
STRETCH_BLOCKS: Final = 256
#: Stretches kept, 15 KB each; the least recently used go first.
_MOST_STRETCHES: Final = 2_048


class KnownKeys:
    """The stretches known."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, list[bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def of(
        self, parent: bytes, packed: bytes, block_size_tokens: int, extra: Mapping[int, bytes] | None = None
    ) -> list[bytes]:
        """Return what ``block_keys`` returns; where blocks have extra keys nothing is looked up or kept."""
        step = STRETCH_BLOCKS * block_size_tokens * TOKEN_BYTES
        if extra or len(packed) < step:
            return block_keys(parent, packed, block_size_tokens, extra)
        keys: list[bytes] = []
        end = len(packed) // step * step
        for at in range(0, end, step):
            part = packed[at : at + step]
            name = chain(parent, part)
            found = self._known.get(name)
            if found is None:
                found = self._known[name] = block_keys(parent, part, block_size_tokens)
                if len(self._known) > _MOST_STRETCHES:
                    self._known.popitem(last=False)
            else:
                self._known.move_to_end(name)
            keys += found
            parent = found[-1]
        return keys + block_keys(parent, packed[end:], block_size_tokens)
