"""The bridge's metrics: read from plain counters when scraped, so the way of a message pays nothing for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvatlas.bridge.ingest.stream import PodStream, Shared


class BridgeCollector(Collector):
    """Collects from the streams and what they share."""

    def __init__(self, streams: Mapping[str, PodStream], shared: Shared) -> None:
        """Remember what to read."""
        self._streams = streams
        self._shared = shared

    def collect(self) -> Iterable[Metric]:
        """Yield the current values."""
        shared, publisher = self._shared, self._shared.publisher
        yield CounterMetricFamily("kvatlas_bridge_messages", "Messages forwarded", value=shared.messages)
        yield CounterMetricFamily("kvatlas_bridge_bytes", "Bytes forwarded", value=shared.bytes)
        yield CounterMetricFamily("kvatlas_bridge_oversized", "Messages over the size limit", value=shared.oversized)
        yield CounterMetricFamily("kvatlas_bridge_acknowledged", "Records Kafka has", value=publisher.sent)
        yield CounterMetricFamily("kvatlas_bridge_kafka_bytes", "Their size, compressed", value=publisher.sent_bytes)
        yield CounterMetricFamily("kvatlas_bridge_kafka_failures", "Batches sent again", value=publisher.failures)
        yield CounterMetricFamily("kvatlas_bridge_refused", "Too large for their topic", value=publisher.refused)
        yield GaugeMetricFamily("kvatlas_bridge_buffer_bytes", "Waiting for Kafka", value=publisher.pending_bytes)
        yield CounterMetricFamily("kvatlas_bridge_events", "Events in messages forwarded", value=shared.events)
        yield CounterMetricFamily("kvatlas_bridge_keyless_blocks", "Stripped without keys", value=shared.keyless)
        yield CounterMetricFamily(
            "kvatlas_bridge_conflicts", "Endpoints left out because another has their pod", value=shared.conflicts
        )
        waiting = sum(stream.waiting for stream in list(self._streams.values()))
        yield GaugeMetricFamily("kvatlas_bridge_waiting_endpoints", "Heard and held elsewhere", value=waiting)
        latency = publisher.latency
        yield HistogramMetricFamily(
            "kvatlas_bridge_kafka_seconds",
            "From sending a record to its acknowledgement",
            buckets=latency.cumulative(),
            sum_value=latency.total,
        )
        dead = CounterMetricFamily("kvatlas_bridge_dead_letters", "Messages not tracked", labels=["reason"])
        for reason, count in list(shared.dead.items()):
            dead.add_metric([reason], count)
        yield dead
        yield from self.per_pod()

    def per_pod(self) -> Iterable[Metric]:
        """Yield what is known of each stream."""
        names = ("duplicates", "gaps", "implausible", "lost", "repaired", "restarts", "shed")
        counters = {
            name: CounterMetricFamily(f"kvatlas_bridge_{name}", f"Sequence tracking: {name}", labels=["pod"])
            for name in names
        }
        last = GaugeMetricFamily("kvatlas_bridge_last_sequence", "Last sequence taken", labels=["pod"])
        age = GaugeMetricFamily("kvatlas_bridge_silence_seconds", "Since the engine was heard", labels=["pod"])
        held = GaugeMetricFamily("kvatlas_bridge_held_messages", "Held while a hole is repaired", labels=["pod"])
        for stream in list(self._streams.values()):
            if stream.waiting:  # the one that holds the pod shows it
                continue
            age.add_metric([stream.pod], (self._shared.now_ns() - stream.heard_ns) / 1e9)
            tracker = stream.tracker
            if tracker is None:
                continue
            last.add_metric([stream.pod], tracker.expected - 1)
            held.add_metric([stream.pod], tracker.held)
            for name, family in counters.items():
                family.add_metric([stream.pod], getattr(tracker.counts, name))
        yield from (*counters.values(), last, age, held)
