"""Metrics of each pod's stream, read from plain counters when scraped, so that a message pays nothing for them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.messages import Counts


def per_pod(endpoints: Iterable[EngineEndpoint]) -> Iterable[Metric]:
    """Yield what is known of each pod's stream."""
    counters = {
        name: CounterMetricFamily(f"kvatlas_bridge_{name}", f"Sequence tracking: {name}", labels=["pod"])
        for name in Counts.__slots__
    }
    last = GaugeMetricFamily("kvatlas_bridge_last_sequence", "Last sequence taken", labels=["pod"])
    age = GaugeMetricFamily("kvatlas_bridge_silence_seconds", "Since the engine was heard", labels=["pod"])
    held = GaugeMetricFamily("kvatlas_bridge_held_messages", "Held while a hole is repaired", labels=["pod"])
    for endpoint in list(endpoints):
        if endpoint.waiting:  # the one that holds the pod shows it
            continue
        age.add_metric([endpoint.pod], endpoint.silence_seconds)
        if endpoint.session is None:
            continue
        tracker = endpoint.session.tracker
        last.add_metric([endpoint.pod], tracker.expected - 1)
        held.add_metric([endpoint.pod], len(tracker.held))
        for name, family in counters.items():
            family.add_metric([endpoint.pod], getattr(tracker.counts, name))
    yield from (*counters.values(), last, age, held)
