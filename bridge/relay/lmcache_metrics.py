"""Metrics of LMCache's event topic: read from plain counters when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvatlas.bridge.model.chunk_cache import CacheFleet


class CacheCollector(Collector):
    """Collects what is known of the servers."""

    def __init__(self, state: Callable[[], CacheFleet], rejected: Callable[[], int]) -> None:
        """Remember what to read."""
        self._state = state
        self._rejected = rejected

    def collect(self) -> Iterable[Metric]:
        """Yield the current values."""
        state = self._state()
        events = CounterMetricFamily(
            "kvatlas_bridge_lmcache_left_out", "LMCache events that moved nothing", labels=["reason"]
        )
        over = sum(holder.over for holder in state.holders.values())
        reasons = {"again": state.duplicates, "late": state.late, "unlisted": state.unlisted, "over": over}
        for reason, count in (reasons | {"unreadable": self._rejected()}).items():
            events.add_metric([reason], count)
        yield events
        yield CounterMetricFamily("kvatlas_bridge_lmcache_gaps", "Holes in servers' streams", value=state.gaps)
        chunks = GaugeMetricFamily("kvatlas_bridge_lmcache_chunks", "Chunks held, whole or not", labels=["holder"])
        for name, holder in list(state.holders.items()):
            chunks.add_metric([f"pool:{name[1:]}" if name.startswith("\n") else name], len(holder))
        yield chunks
