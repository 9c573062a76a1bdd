"""Chains of LMCache's chunks: from a chunk's hash to the canonical block keys of its tokens. Pure.

A chunk names its tokens and where in a prompt they begin, and not what comes before them::

    h_0 = BLAKE3( 12 zero bytes )         h_i = BLAKE3( h_(i-1) | tokens as big-endian u32 )

So the chunk before it is found by hashing: of those that end where it begins, the one that gives its hash.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice
from typing import Final

from blake3 import blake3

from kvatlas.bridge.model.block_key import KEY_BYTES, TOKEN_BYTES, block_keys

#: What the first chunk of every prompt goes on from.
FIRST: Final = blake3(bytes(12)).digest()
#: Chunks that are tried as the one before, the newest first: each costs a hash of a chunk.
_TRIES: Final = 1024


def chunk_hash(before: bytes, tokens: bytes) -> bytes:
    """Return the hash of a chunk behind another; ``tokens`` as little-endian u32."""
    return blake3(before + _swapped(tokens)).digest()


class _Chunk:
    """A chunk whose tokens are known; ``before`` is None while the chunk before it is not."""

    __slots__ = ("before", "children", "end", "start", "tokens", "whole")

    def __init__(self, tokens: bytes, start: int, before: bytes | None) -> None:
        self.tokens, self.start, self.before = tokens, start, before
        self.end = start + len(tokens) // TOKEN_BYTES
        self.children: list[bytes] = []
        self.whole = False  # its chain leads to the start of a prompt


class ChunkChains:
    """All chunks whose tokens are known, the newest up to a limit."""

    def __init__(self, limit: int) -> None:
        """Start empty."""
        self._limit = limit
        self._chunks: dict[bytes, _Chunk] = {}
        self._ending: dict[int, dict[bytes, None]] = {}
        self._waiting: dict[int, dict[bytes, None]] = {}  # without the chunk before, by where they begin
        self._last_keys: dict[tuple[bytes, bytes], bytes] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def learn(self, chunk: bytes, tokens: bytes, start: int, hint: bytes = b"") -> list[bytes]:
        """Take a chunk's tokens.

        Args:
            chunk: its hash.
            tokens: little-endian u32.
            start: where in the prompt they begin.
            hint: a chunk that is likely the one before.

        Returns:
            The chunks whose chains are whole from now on. None, of a chunk that is hashed in another way.
        """
        if chunk in self._chunks or not tokens:
            return []
        before = self._before(chunk, tokens, start, hint)
        if before is None and not start:
            return []
        self._make_room()
        known = self._chunks[chunk] = _Chunk(tokens, start, before)
        self._ending.setdefault(known.end, {})[chunk] = None
        if before is None:
            self._waiting.setdefault(start, {})[chunk] = None
        elif before in self._chunks:
            self._chunks[before].children.append(chunk)
        for child in list(islice(self._waiting.get(known.end, ()), _TRIES)):
            if chunk_hash(chunk, self._chunks[child].tokens) == child:
                self._chunks[child].before = chunk
                _drop(self._waiting, known.end, child)
                known.children.append(child)
        above = self._chunks.get(before) if before is not None else None
        return list(self._complete(chunk)) if before == FIRST or (above is not None and above.whole) else []

    def keys(self, chunk: bytes, root: bytes, canonical_tokens: int) -> bytes | None:
        """Return the packed block keys of a chunk; None where its chain is not known or fits no blocks.

        Args:
            chunk: its hash.
            root: the key that the prompt's first block goes on from.
            canonical_tokens: tokens in a block.
        """
        path: list[bytes] = []
        at: bytes | None = chunk
        key = root
        while at != FIRST:
            known = self._chunks.get(at) if at is not None else None
            if at is None or known is None or len(known.tokens) % (canonical_tokens * TOKEN_BYTES):
                return None
            if path and (found := self._last_keys.get((at, root))) is not None:
                key = found
                break
            path.append(at)
            at = known.before
        if len(self._last_keys) > 2 * self._limit:
            self._last_keys.clear()
        packed = b""
        for each in reversed(path):
            packed = b"".join(block_keys(key, self._chunks[each].tokens, canonical_tokens))
            key = self._last_keys[each, root] = packed[-KEY_BYTES:]
        return packed or None

    def tokens_of(self, chunk: bytes) -> int:
        """Return how many tokens a chunk has; 0 where that is not known."""
        known = self._chunks.get(chunk)
        return len(known.tokens) // TOKEN_BYTES if known is not None else 0

    def _before(self, chunk: bytes, tokens: bytes, start: int, hint: bytes) -> bytes | None:
        if not start:
            return FIRST if chunk_hash(FIRST, tokens) == chunk else None
        ending = self._ending.get(start, {})
        swapped = _swapped(tokens)
        for other in ((hint,) if hint in ending else ()), islice(reversed(ending), _TRIES):
            for each in other:
                if blake3(each + swapped).digest() == chunk:
                    return each
        return None

    def _complete(self, chunk: bytes) -> Iterator[bytes]:
        stack = [chunk]
        while stack:
            each = stack.pop()
            known = self._chunks.get(each)
            if known is not None and not known.whole:
                known.whole = True
                yield each
                stack += known.children

    def _make_room(self) -> None:
        while len(self._chunks) >= self._limit:
            oldest = next(iter(self._chunks))
            known = self._chunks.pop(oldest)
            _drop(self._ending, known.end, oldest)
            _drop(self._waiting, known.start, oldest)


def _drop(places: dict[int, dict[bytes, None]], place: int, chunk: bytes) -> None:
    found = places.get(place)
    if found is not None:
        found.pop(chunk, None)
        if not found:
            del places[place]


def _swapped(tokens: bytes) -> bytes:
    words = array("I", tokens)
    words.byteswap()
    return words.tobytes()
