"""Tokens of text parts seen before, bounded in bytes and shared by all models."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

#: Key tuple, dict entry and the two object heads that every part costs beside its text and tokens.
_OVERHEAD_BYTES: Final = 250


class TextCache:
    """Part of a text -> its tokens; the least recently used part goes first. Safe to use from many threads.

    Keys hold the text itself, not a hash of it: a clash would silently give wrong tokens.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._parts: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._bytes = 0

    @property
    def enabled(self) -> bool:
        """Whether anything can be kept."""
        return self._limit_bytes > 0

    @property
    def used_bytes(self) -> int:
        """Memory in use, an estimate."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._parts)

    def get(self, owner: int, parts: Sequence[str]) -> list[bytes | None]:
        """Return the packed tokens of each part, or None where they are not known."""
        found: list[bytes | None] = []
        kept = self._parts
        with self._lock:
            for part in parts:
                key = (owner, part)
                tokens = kept.get(key)
                if tokens is not None:
                    kept.move_to_end(key)
                found.append(tokens)
        return found

    def put(self, owner: int, entries: Iterable[tuple[str, bytes]]) -> None:
        """Keep parts with their packed tokens; a part larger than an eighth of the limit is not kept."""
        with self._lock:
            for part, tokens in entries:
                cost = _cost(part, tokens)
                key = (owner, part)
                if cost > self._limit_bytes // 8 or key in self._parts:
                    continue
                self._parts[key] = tokens
                self._bytes += cost
            while self._bytes > self._limit_bytes:
                (_, part), tokens = self._parts.popitem(last=False)
                self._bytes -= _cost(part, tokens)

    def drop(self, owner: int) -> None:
        """Forget everything of one owner, whose tokenizer was unloaded."""
        with self._lock:
            for key in [key for key in self._parts if key[0] == owner]:
                self._bytes -= _cost(key[1], self._parts.pop(key))


def _cost(part: str, tokens: bytes) -> int:
    return sys.getsizeof(part) + len(tokens) + _OVERHEAD_BYTES
