"""Metrics of cache servers and pools: read from plain counters when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

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


class PoolCollector(Collector):
    """Collects what is known of Mooncake's pools."""

    def __init__(self, pools: Sequence[tuple[str, Callable[[], PoolFigures]]], rejected: Callable[[], int]) -> None:
        """Remember what to read: each pool's pod id and figures, and messages that could not be read."""
        self._pools = pools
        self._rejected = rejected

    def collect(self) -> Iterable[Metric]:
        """Yield the current values."""
        blocks = GaugeMetricFamily("kvatlas_bridge_mooncake_blocks", "Blocks held, whole or not", labels=["holder"])
        lost = CounterMetricFamily(
            "kvatlas_bridge_mooncake_lost", "Messages of masters that are lost", labels=["holder"]
        )
        left = CounterMetricFamily(
            "kvatlas_bridge_mooncake_left_out", "Objects that moved nothing", labels=["holder", "reason"]
        )
        for pod, figures in self._pools:
            now = figures()
            blocks.add_metric([pod], now.blocks)
            lost.add_metric([pod], now.lost)
            left.add_metric([pod, "nameless"], now.nameless)
            left.add_metric([pod, "over"], now.over)
        yield from (blocks, lost, left)
        yield CounterMetricFamily(
            "kvatlas_bridge_mooncake_unreadable", "Messages of masters that are none", value=self._rejected()
        )


class PoolFigures(NamedTuple):
    """Figures of one pool."""

    blocks: int
    lost: int
    nameless: int
    over: int
