"""Tokens of text parts seen before, and of long texts' beginnings, bounded in bytes and shared by all models.

A conversation of a million characters is a thousand parts; compared as one beginning it costs a twentieth of that.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

#: Key tuple, dict entry and the two object heads that every part costs beside its text and tokens.
_OVERHEAD_BYTES: Final = 250

#: Texts from here on have their beginnings kept.
LONG_CHARS: Final = 32_768
#: Beginnings kept; each is compared with every long text, which a difference ends early.
_MOST_BEGINNINGS: Final = 64


class Beginning(NamedTuple):
    """How a long text began.

    Attributes:
        text: what another text must begin with; it goes past ``chars``, since what follows decides where a part ends.
        chars: characters that ``tokens`` stand for.
        tokens: packed.
    """

    text: str
    chars: int
    tokens: bytes


class TextCache:
    """Part of a text -> its tokens; the least recently used part goes first. Safe to use from many threads.

    Keys hold the text itself, not a hash of it: a clash would silently give wrong tokens.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._parts: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._bytes = 0
        self._beginnings: OrderedDict[tuple[int, str], Beginning] = OrderedDict()
        self._beginnings_bytes = 0

    @property
    def enabled(self) -> bool:
        """Whether anything can be kept."""
        return self._limit_bytes > 0

    @property
    def used_bytes(self) -> int:
        """Memory in use, an estimate."""
        return self._bytes + self._beginnings_bytes

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
            self._make_room()

    def beginning(self, owner: int, text: str) -> Beginning | None:
        """Return the longest beginning of a long text that is known, None without one."""
        found: Beginning | None = None
        with self._lock:
            for (whose, start), kept in self._beginnings.items():
                if whose == owner and (found is None or kept.chars > found.chars) and text.startswith(start):
                    found = kept
            if found is not None:
                self._beginnings.move_to_end((owner, found.text))
        return found

    def put_beginning(self, owner: int, beginning: Beginning) -> None:
        """Keep how a long text began, in the place of what it goes on from; an eighth of the limit is the most."""
        cost = _cost(beginning.text, beginning.tokens)
        if cost > self._limit_bytes // 8:
            return
        with self._lock:
            for key in [key for key in self._beginnings if key[0] == owner and beginning.text.startswith(key[1])]:
                self._drop_beginning(key)
            self._beginnings[owner, beginning.text] = beginning
            self._beginnings_bytes += cost
            while len(self._beginnings) > _MOST_BEGINNINGS or self._beginnings_bytes > self._limit_bytes // 4:
                self._drop_beginning(next(iter(self._beginnings)))
            self._make_room()

    def _drop_beginning(self, key: tuple[int, str]) -> None:
        gone = self._beginnings.pop(key)
        self._beginnings_bytes -= _cost(gone.text, gone.tokens)

    def _make_room(self) -> None:
        while self._parts and self.used_bytes > self._limit_bytes:
            (_, part), tokens = self._parts.popitem(last=False)
            self._bytes -= _cost(part, tokens)

    def drop(self, owner: int) -> None:
        """Forget everything of one owner, whose tokenizer was unloaded."""
        with self._lock:
            for key in [key for key in self._parts if key[0] == owner]:
                self._bytes -= _cost(key[1], self._parts.pop(key))
            for key in [key for key in self._beginnings if key[0] == owner]:
                self._drop_beginning(key)


def _cost(part: str, tokens: bytes) -> int:
    return sys.getsizeof(part) + len(tokens) + _OVERHEAD_BYTES
