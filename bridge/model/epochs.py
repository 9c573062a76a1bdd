"""Epochs of a pod: 64 bits, ``incarnation << 32 | clears``.

The bridge owns the incarnation (raised by an engine restart, a gap that could not be repaired, a removal; it starts
from the clock, so it grows even when every topic is lost). The resolve agent owns the clears inside an incarnation.
Both parts only grow, so the whole does.
"""

from __future__ import annotations

from typing import Final

_CLEARS_BITS: Final = 32
#: Half of a 64-bit epoch; unix seconds reach it in the year 2106.
INCARNATION_MAX: Final = (1 << 32) - 1


def epoch_of(incarnation: int, clears: int = 0) -> int:
    """Return the epoch of an incarnation after so many clears."""
    return incarnation << _CLEARS_BITS | clears


def incarnation_of(epoch: int) -> int:
    """Return the high half of an epoch."""
    return epoch >> _CLEARS_BITS
