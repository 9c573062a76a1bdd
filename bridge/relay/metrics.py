"""The bridge's metrics: read from plain counters when scraped, so the way of a message pays nothing for them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvatlas.bridge.ingest.loads import EngineLoads
from kvatlas.bridge.ingest.metrics import per_pod
from kvatlas.bridge.ingest.streams import EngineStreams
from kvatlas.bridge.kafka.producer import RecordProducer


class BridgeCollector(Collector):
    """Collects from the streams and the producer."""

    def __init__(self, streams: EngineStreams, loads: EngineLoads, publisher: RecordProducer) -> None:
        """Remember what to read."""
        self._streams = streams
        self._loads = loads
        self._publisher = publisher

    def collect(self) -> Iterable[Metric]:
        """Yield the current values."""
        shared, publisher = self._streams.shared, self._publisher
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
        waiting = sum(endpoint.waiting for endpoint in list(self._streams.endpoints.values()))
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
        reads = CounterMetricFamily("kvatlas_bridge_load_reads", "Reads of engines' load", labels=["result"])
        for result, count in list(self._loads.reads.items()):
            reads.add_metric([result], count)
        yield reads
        yield from per_pod(self._streams.endpoints.values())
