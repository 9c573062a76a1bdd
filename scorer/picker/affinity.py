"""Sessions: the endpoint that served a conversation last, by pickers' decisions and by the pods' own events.

Pure; bounded, with a time to live.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from kvatlas.bridge.model.sessions import MOST_SESSIONS, SESSION_SECONDS, session_hash
from kvatlas.scorer.picker import names


class Sessions:
    """Hash of a session -> address, least recently used first.

    Args:
        most: sessions kept.
        ttl_seconds: a session that is quiet for so long is forgotten.
    """

    def __init__(self, most: int = MOST_SESSIONS, ttl_seconds: float = SESSION_SECONDS) -> None:
        self._most = most
        self._ttl = ttl_seconds
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, sessions: Iterable[str], now: float) -> str:
        """Return the address where one of a request's sessions was last, empty for none."""
        known = [found for one in sessions if (found := self._known.get(one)) is not None]
        address, at = max(known, key=lambda found: found[1], default=("", now))
        return address if now - at <= self._ttl else ""

    def put(self, session: str, address: str, at: float) -> None:
        """Remember where a session was at a time, unless a later place is known."""
        known = self._known.get(session)
        if not session or not self._most or (known is not None and known[1] > at):
            return
        self._known[session] = (address, at)
        self._known.move_to_end(session)
        while len(self._known) > self._most:
            self._known.popitem(last=False)


def sessions_of(headers: Mapping[str, str], given: str = "") -> tuple[str, ...]:
    """Return the hashes of the sessions that a request names: its headers' first, then its body's, each once.

    The first is the one to remember. Engines may know a request by another: they say the body's on their events, or
    the header's that they read themselves.
    """
    header = next((headers[name] for name in names.SESSIONS if headers.get(name)), "")
    return tuple(dict.fromkeys(session_hash(name) for name in (header, given) if name))
