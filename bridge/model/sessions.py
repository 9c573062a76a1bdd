"""Sessions: what names a client's conversation over many requests, on its way from engines' events to pickers. Pure.

A session's name is the client's own, and may say who that is: whoever reads one makes its hash of it, and nothing else
is kept or written anywhere.
"""

from __future__ import annotations

from typing import Any, Final

import xxhash

#: Kind of the records on ``kv-decisions`` that say where sessions were seen.
SESSIONS: Final = "sessions"
#: A session that is quiet for so long is forgotten: its blocks are evicted by then.
SESSION_SECONDS: Final = 600.0
#: Sessions that one process remembers; the least recent go first.
MOST_SESSIONS: Final = 100_000
#: Longest name.
NAME_BYTES: Final = 1_024
_HASH_CHARACTERS: Final = 16


def session_hash(name: str) -> str:
    """Return the hash of a session's name: 16 hexadecimal digits, empty for no name."""
    return xxhash.xxh3_64_hexdigest(name.encode("utf-8", "surrogateescape")) if name else ""


def session_in(value: Any) -> str:
    """Return the hash of the session that an event names; empty for none, and for what is no name."""
    if not isinstance(value, str) or len(value.encode()) > NAME_BYTES:
        return ""
    return session_hash(value)


def is_hash(text: str) -> bool:
    """Tell whether a record's text can be a session's hash."""
    return len(text) == _HASH_CHARACTERS
