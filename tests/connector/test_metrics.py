"""What is counted, and how an exporter sees it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvatlas.connector.metrics import BUCKETS_SECONDS, Metrics, PrometheusCollector
from tests.connector.conftest import Fleet, block, key, target


def test_bytes_time_and_rate_are_kept_per_tier_and_direction() -> None:
    """Each direction of each tier has its own blocks, bytes, seconds and rate."""
    metrics = Metrics()
    metrics.moved("file", "store", blocks=2, size_bytes=4_000_000_000, seconds=2.0)
    metrics.moved("file", "load", blocks=1, size_bytes=1000, seconds=0.5)
    found = metrics.snapshot()
    assert (found["file_store_blocks"], found["file_store_bytes"], found["file_store_gbps"]) == (2, 4e9, 2.0)
    assert (found["file_load_bytes"], found["file_load_seconds"]) == (1000, 0.5)
    assert Metrics().snapshot() == {}


def test_only_what_ended_well_is_timed() -> None:
    """An operation that raises is no bytes moved."""
    ticks = iter([1.0, 4.0, 5.0])
    metrics = Metrics(clock=lambda: next(ticks))
    with metrics.timed("host", "load", 3, 30):
        pass
    with pytest.raises(OSError, match="no"), metrics.timed("host", "load", 3, 30):
        raise OSError("no")
    work = metrics.directions["host", "load"]
    assert (work.operations, work.bytes, work.busy_seconds) == (1, 30, 3.0)


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (0.0005, 0), (0.00051, 1), (10.0, -2), (11.0, -1)])
def test_latencies_fall_into_their_bucket(seconds: float, bucket: int) -> None:
    """A bound belongs to its bucket, and what is slower than all has one of its own."""
    metrics = Metrics()
    metrics.moved("file", "load", blocks=1, size_bytes=1, seconds=seconds)
    buckets = metrics.directions["file", "load"].buckets
    assert buckets[bucket] == 1
    assert sum(buckets) == 1
    assert len(buckets) == len(BUCKETS_SECONDS) + 1


def test_a_registry_shows_what_a_tier_did(fleet: Fleet) -> None:
    """Bytes, latencies, hits, misses, corrupt, evicted, queue depths and bytes used are on the metrics page."""
    tier = fleet.tier()
    tier.store([block(1), block(2)]).result(10)
    tier.load([target(1)[0], target(9)[0]]).result(10)
    path = tier.directory.rglob(f"{key(2).hex()}.kv")
    data = bytearray((found := next(path)).read_bytes())
    data[5000] ^= 1
    found.write_bytes(data)
    tier.load([target(2)[0]]).result(10)
    tier.evict([key(1)])
    tier.drain(10)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(tier.metrics))
    lines = set(generate_latest(registry).decode().splitlines())
    for line in (
        'kvatlas_connector_blocks_total{direction="store",tier="file"} 2.0',
        'kvatlas_connector_bytes_total{direction="load",tier="file"} 8192.0',
        'kvatlas_connector_operation_seconds_count{direction="load",tier="file"} 1.0',
        'kvatlas_connector_outcomes_total{outcome="hits"} 1.0',
        'kvatlas_connector_outcomes_total{outcome="misses"} 2.0',
        'kvatlas_connector_outcomes_total{outcome="corrupt"} 1.0',
        'kvatlas_connector_outcomes_total{outcome="evicted"} 1.0',
        "kvatlas_connector_queued_reads 0.0",
        "kvatlas_connector_queued_writes 0.0",
        "kvatlas_connector_file_used_bytes 0.0",
    ):
        assert line in lines, (line, sorted(lines))


def test_buckets_are_cumulative_for_prometheus() -> None:
    """Each bucket counts what was at most as slow, as Prometheus wants it."""
    metrics = Metrics()
    for seconds in (0.0004, 0.004, 100.0):
        metrics.moved("file", "load", blocks=1, size_bytes=1, seconds=seconds)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(metrics))
    labels = {"tier": "file", "direction": "load"}

    def bucket(bound: str) -> float | None:
        return registry.get_sample_value("kvatlas_connector_operation_seconds_bucket", {**labels, "le": bound})

    assert [bucket("0.0005"), bucket("0.0025"), bucket("0.005"), bucket("10.0"), bucket("+Inf")] == [1, 1, 2, 2, 3]
