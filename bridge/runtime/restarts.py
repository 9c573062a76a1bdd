"""How often the process of a service was started again: told by its supervisor, shown on /metrics and /readyz.

The process that died takes its own counters along, so the supervisor counts and hands the numbers to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

_REASON_CHARACTERS = 500


class Restarts(msgspec.Struct, frozen=True):
    """Restarts of one process since its supervisor began.

    Attributes:
        by_code: how it had ended -> how often: an exit code, or a signal's number below 0.
        reason: why it ended last.
    """

    by_code: dict[str, int] = {}
    reason: str = ""

    @property
    def total(self) -> int:
        """All restarts."""
        return sum(self.by_code.values())

    def after(self, code: int, reason: str) -> Restarts:
        """Return the restarts with one more, of a process that ended with ``code``."""
        name = str(code)
        return Restarts({**self.by_code, name: self.by_code.get(name, 0) + 1}, reason[:_REASON_CHARACTERS])

    def note(self) -> str | None:
        """Return a line for people, None where there was no restart."""
        if not self.total:
            return None
        how = ", ".join(f"{code}: {count}" for code, count in sorted(self.by_code.items()))
        return f"{self.total} (by exit code {how}); the last one because: {self.reason}"


class RestartsCollector(Collector):
    """Restarts as a metric, by exit code."""

    def __init__(self, restarts: Restarts) -> None:
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        """Return ``kvatlas_process_restarts_total``."""
        family = CounterMetricFamily(
            "kvatlas_process_restarts", "Times this process was started again by its supervisor", labels=["code"]
        )
        for code, count in self._restarts.by_code.items():
            family.add_metric([code], count)
        yield family
