"""What a tracker remembers of a stream: live messages that wait behind a hole, and digests of the newest. Pure."""

from __future__ import annotations

from array import array
from typing import Final

from xxhash import xxh3_64_intdigest

from kvatlas.bridge.ingest.messages import EngineMessage

#: Messages whose digest is remembered, a power of two; 32 KiB per pod.
DIGESTS: Final = 4096


class HeldBytes:
    """Bytes held by all trackers that share it, and the bound on them."""

    __slots__ = ("held_bytes", "limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.held_bytes, self.limit_bytes = 0, limit_bytes


class HeldMessages(dict[int, EngineMessage]):
    """Live messages of one stream by sequence, within bounds.

    Attributes:
        held_bytes: what they take.
    """

    def __init__(
        self, shared: HeldBytes | None = None, *, most: int = 20_000, most_bytes: int = 64 * 1024 * 1024
    ) -> None:
        """Hold nothing yet, and at most that many messages and bytes; ``shared`` is the bound over all pods."""
        super().__init__()
        self.held_bytes = 0
        self._shared = shared or HeldBytes(most_bytes)
        self._most, self._most_bytes = most, most_bytes

    def add(self, message: EngineMessage) -> bool:
        """Hold a message; False when there is no room."""
        size = len(message.payload or b"")
        if (
            len(self) >= self._most
            or self.held_bytes + size > self._most_bytes
            or self._shared.held_bytes + size > self._shared.limit_bytes
        ):
            return False
        self[message.sequence] = message
        self._count(size)
        return True

    def drop(self, sequence: int) -> None:
        """Hold a message no longer; no effect when it is not held."""
        if (message := self.pop(sequence, None)) is not None:
            self._count(-len(message.payload or b""))

    def clear(self) -> None:
        """Hold nothing any more."""
        super().clear()
        self._count(-self.held_bytes)

    def _count(self, size: int) -> None:
        self.held_bytes += size
        self._shared.held_bytes += size


class Digests:
    """64-bit digests of the newest messages on the log, by sequence."""

    def __init__(self, expected: int, known: tuple[tuple[int, int], ...] = ()) -> None:
        """Go on before sequence ``expected`` with what is known of earlier ones."""
        self._digests = array("Q", bytes(8 * DIGESTS))
        self._floor = expected  # sequences below it were never remembered
        for sequence, digest in known:
            if expected - DIGESTS <= sequence < expected:
                self._digests[sequence & (DIGESTS - 1)] = digest
                self._floor = min(self._floor, sequence)

    def put(self, sequence: int, payload: bytes) -> None:
        """Remember a message."""
        self._digests[sequence & (DIGESTS - 1)] = xxh3_64_intdigest(payload)

    def forget(self, first: int, last: int) -> None:
        """Nothing is known of these."""
        for sequence in range(max(first, last - DIGESTS + 1), last + 1):
            self._digests[sequence & (DIGESTS - 1)] = 0

    def same(self, sequence: int, payload: bytes, expected: int) -> bool | None:
        """Whether a message below ``expected`` has the bytes of before; None when nothing is known of it."""
        if sequence < self._floor or sequence <= expected - 1 - DIGESTS:
            return None
        known = self._digests[sequence & (DIGESTS - 1)]
        return known == xxh3_64_intdigest(payload) if known else None

    def known(self, expected: int) -> tuple[tuple[int, int], ...]:
        """Return (sequence, digest) of what is known below ``expected``, in order."""
        first = max(self._floor, expected - DIGESTS, 0)
        found = ((sequence, self._digests[sequence & (DIGESTS - 1)]) for sequence in range(first, expected))
        return tuple(item for item in found if item[1])
