"""What became of one block: the vocabulary of every transfer."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class OffloadTier(Enum):
    """Where a block's bytes are, from near to far."""

    HOST = "host"
    FILE = "file"
    OBJECT = "object"


class Outcome(Enum):
    """The end of one block's transfer. Only the first three are success."""

    STORED = "stored"
    """Written completely; a lookup finds it from now on."""
    EXISTS = "exists"
    """A store found the block already there."""
    LOADED = "loaded"
    """Every byte was read and its checksum was right."""
    MISS = "miss"
    """Not there, or there and not usable (corrupt, foreign); the destination is undefined."""
    FAILED = "failed"
    """The operating system refused or failed; ``detail`` names the error."""
    SHED = "shed"
    """A store was dropped under pressure before anything was written."""
    CANCELLED = "cancelled"
    """The connector closed before the transfer began."""

    @property
    def ok(self) -> bool:
        """Whether the caller may rely on the transfer."""
        return self in _GOOD


_GOOD = frozenset({Outcome.STORED, Outcome.EXISTS, Outcome.LOADED})


class Result(NamedTuple):
    """One block's outcome.

    Attributes:
        outcome: what happened.
        detail: why, for people; empty on success.
        tier: the tier that served a load, or the farthest tier that a store reached; None for none.
    """

    outcome: Outcome
    detail: str = ""
    tier: OffloadTier | None = None

    @property
    def ok(self) -> bool:
        """Whether the caller may rely on the transfer."""
        return self.outcome in _GOOD


Results = dict[bytes, Result]
"""One result per block key."""
