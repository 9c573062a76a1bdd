"""Counters of the connector: plain numbers that any exporter can read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

#: Upper bounds of the latency buckets in seconds.
BUCKETS_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

PREFIX: Final = "kvatlas_connector_"


@dataclass
class Direction:
    """Work in one direction of one tier."""

    blocks: int = 0
    bytes: int = 0
    busy_seconds: float = 0.0
    operations: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_SECONDS) + 1))

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes per second of thread time spent, in GB/s; 0 before the first operation."""
        return self.bytes / self.busy_seconds / 1e9 if self.busy_seconds else 0.0


class Metrics:
    """Thread-safe counters.

    ``directions`` is keyed ``(tier, direction)``, for example ``("file", "store")``; ``counts`` by name: hits,
    misses, shed, corrupt, failed, evicted, evicted_bytes, vanished.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.directions: dict[tuple[str, str], Direction] = {}
        self.counts: dict[str, int] = {}
        self.gauges: dict[str, Callable[[], float]] = {}

    def count(self, name: str, step: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + step

    def moved(self, tier: str, direction: str, *, blocks: int, size_bytes: int, seconds: float) -> None:
        """Note one finished operation."""
        with self._lock:
            found = self.directions.setdefault((tier, direction), Direction())
            found.blocks += blocks
            found.bytes += size_bytes
            found.busy_seconds += seconds
            found.operations += 1
            number = next((i for i, bound in enumerate(BUCKETS_SECONDS) if seconds <= bound), -1)
            found.buckets[number] += 1

    @contextmanager
    def timed(self, tier: str, direction: str, blocks: int, size_bytes: int) -> Iterator[None]:
        """Note the operation inside the block, when it ends without an exception."""
        begin = self._clock()
        yield
        self.moved(tier, direction, blocks=blocks, size_bytes=size_bytes, seconds=self._clock() - begin)

    def snapshot(self) -> dict[str, float]:
        """Return every number under a flat name, for logs and engine statistics."""
        with self._lock:
            found: dict[str, float] = {name: float(value) for name, value in self.counts.items()}
            for (tier, direction), work in self.directions.items():
                found[f"{tier}_{direction}_blocks"] = work.blocks
                found[f"{tier}_{direction}_bytes"] = work.bytes
                found[f"{tier}_{direction}_seconds"] = work.busy_seconds
                found[f"{tier}_{direction}_gbps"] = work.gigabytes_per_second
        for name, read in self.gauges.items():
            found[name] = read()
        return found


class PrometheusCollector:
    """Shows :class:`Metrics` to a ``prometheus_client`` registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the families; called by the registry at each scrape."""
        from prometheus_client.core import (  # noqa: PLC0415 - an engine without Prometheus needs none
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        metrics = self._metrics
        with metrics._lock:
            counts = dict(metrics.counts)
            work = {
                name: (item.blocks, item.bytes, item.busy_seconds, list(item.buckets))
                for name, item in metrics.directions.items()
            }
        blocks = CounterMetricFamily(
            f"{PREFIX}blocks", "Blocks moved, per tier and direction.", labels=["tier", "direction"]
        )
        sizes = CounterMetricFamily(
            f"{PREFIX}bytes", "Bytes moved, per tier and direction.", labels=["tier", "direction"]
        )
        seconds = HistogramMetricFamily(
            f"{PREFIX}operation_seconds", "Time of one operation.", labels=["tier", "direction"]
        )
        for labels, (count, size, busy, buckets) in work.items():
            blocks.add_metric(list(labels), count)
            sizes.add_metric(list(labels), size)
            total = 0
            cumulative = []
            for bound, number in zip([*map(str, BUCKETS_SECONDS), "+Inf"], buckets, strict=True):
                total += number
                cumulative.append((bound, total))
            seconds.add_metric(list(labels), cumulative, busy)
        yield blocks
        yield sizes
        yield seconds
        events = CounterMetricFamily(f"{PREFIX}outcomes", "What became of blocks.", labels=["outcome"])
        for name, number in counts.items():
            events.add_metric([name], number)
        yield events
        for name, read in metrics.gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}{name}", f"Current {name.replace('_', ' ')}.", read())
