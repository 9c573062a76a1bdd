"""How often a key was asked for, roughly, in fixed memory: a count-min sketch that ages.

Four rows of saturating counters, indexed by bytes of the key itself (block keys are hashes already). All counters are
halved once as many keys were counted as there are counters, so old fame fades (TinyLFU; Einziger, Friedman, Manes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_ROWS: Final = 4
_LIMIT: Final = 255
_HALVES: Final = bytes(value >> 1 for value in range(256))


class FrequencySketch:
    """Counts keys of 16 or more random bytes.

    Args:
        width_bits: counters per row are 2 to this power; a row takes as many bytes.
    """

    def __init__(self, width_bits: int = 20) -> None:
        self._mask = (1 << width_bits) - 1
        self._rows = [bytearray(1 << width_bits) for _ in range(_ROWS)]
        self._counted = 0

    def add_all(self, keys: Sequence[bytes]) -> None:
        """Count each key once."""
        mask = self._mask
        one, two, three, four = self._rows
        for key in keys:
            number = int.from_bytes(key[:16], "little")
            for row, at in (
                (one, number & mask),
                (two, number >> 32 & mask),
                (three, number >> 64 & mask),
                (four, number >> 96 & mask),
            ):
                if row[at] < _LIMIT:
                    row[at] += 1
        self._counted += len(keys)
        if self._counted > mask:
            self._rows = [row.translate(_HALVES) for row in self._rows]
            self._counted >>= 1

    def estimate(self, key: bytes) -> int:
        """Return how often a key was counted lately; never less than it was since the last halving."""
        number = int.from_bytes(key[:16], "little")
        return min(row[number >> (32 * shift) & self._mask] for shift, row in enumerate(self._rows))
