"""Sessions: the endpoint that served a conversation last. Pure; bounded, with a time to live."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import xxhash

from kvatlas.scorer.picker import names


class Sessions:
    """Session key -> address, least recently used first.

    Args:
        most: sessions kept.
        ttl_seconds: a session that is quiet for so long is forgotten: its blocks are evicted by then.
    """

    def __init__(self, most: int = 100_000, ttl_seconds: float = 600.0) -> None:
        self._most = most
        self._ttl = ttl_seconds
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, session: str, now: float) -> str:
        """Return the session's address, empty for none."""
        found = self._known.get(session)
        if found is None or now - found[1] > self._ttl:
            return ""
        return found[0]

    def put(self, session: str, address: str, now: float) -> None:
        """Remember where a session went."""
        if not session or not self._most:
            return
        self._known[session] = (address, now)
        self._known.move_to_end(session)
        while len(self._known) > self._most:
            self._known.popitem(last=False)


def session_of(headers: Mapping[str, str], given: str = "") -> str:
    """Return the hash of the session that a request's headers name, or its body's; empty for none.

    Session names are the clients' own and go no further than here.
    """
    found = next((headers[name] for name in names.SESSIONS if headers.get(name)), given)
    return xxhash.xxh3_64_hexdigest(found.encode("utf-8", "surrogateescape")) if found else ""
