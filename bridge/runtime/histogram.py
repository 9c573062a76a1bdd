"""A histogram of plain counters, read when metrics are scraped."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Final


class Buckets:
    """A histogram of plain counters; no lock, for one event loop.

    Attributes:
        bounds: upper bounds, seconds.
        counts: observations in each bucket, the last one beyond all bounds.
        total: sum of all observations, seconds.
    """

    bounds: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

    def __init__(self) -> None:
        """Start empty."""
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        """Count ``times`` observations of one value."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.total += seconds * times

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (upper bound, observations up to it), as Prometheus wants them."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))
