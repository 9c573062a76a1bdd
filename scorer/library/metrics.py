"""Metrics of an indexer, read from plain counters when scraped: the bridge's per pod, what was applied, the queues."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvatlas.bridge.ingest.metrics import per_pod
from kvatlas.scorer.errors import NotReadyError
from kvatlas.scorer.library.indexer import Indexer


class IndexerCollector(Collector):
    """Collects from an indexer: ``registry.register(IndexerCollector(indexer))``."""

    def __init__(self, indexer: Indexer) -> None:
        """Remember what to read."""
        self._indexer = indexer

    def collect(self) -> Iterable[Metric]:
        """Yield the current values; nothing while the indexer is not running."""
        try:
            counts = dict(self._indexer.counts)
        except NotReadyError:
            return
        applied = CounterMetricFamily("kvatlas_indexer_applied", "What was applied, by name", labels=["what"])
        for what, count in counts.items():
            applied.add_metric([what], count)
        yield applied
        yield GaugeMetricFamily("kvatlas_indexer_pods", "Pods known", value=len(self._indexer.pods()))
        engines = list(self._indexer.engines.values())
        waiting = GaugeMetricFamily("kvatlas_indexer_queue_bytes", "Messages that wait to be applied", labels=["pod"])
        for engine in engines:
            waiting.add_metric([engine.pod], self._indexer.pending_bytes(engine.pod))
        yield waiting
        if engines:
            yield from per_pod(engines)
