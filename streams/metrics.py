"""Metrics of a stream worker; every name is defined here and listed in docs/streams.md."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

SOURCE_RECORDS: Final = Counter(
    "kvatlas_worker_source_records_total",
    "Source records applied (kv-events by resolve, kv-blocks by index)",
    ["agent"],
)
UPDATES: Final = Counter("kvatlas_worker_updates_total", "Block updates produced or applied", ["agent"])
BATCHES: Final = Counter("kvatlas_worker_batches_total", "Flushes committed", ["agent"])
COUNTS: Final = Counter("kvatlas_worker_events_total", "What applying met, by kind", ["agent", "kind"])
COMMIT_SECONDS: Final = Histogram(
    "kvatlas_worker_commit_seconds",
    "From applied to committed, of the oldest record in each flush",
    ["agent"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
VISIBLE_SECONDS: Final = Histogram(
    "kvatlas_worker_visible_seconds",
    "From the bridge's receive time to resolved, or to what lookups see, of the newest message each time",
    ["agent"],
    buckets=(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1, 2, 5, 10, 60),
)
LAG_RECORDS: Final = Gauge("kvatlas_worker_lag_records", "Source records not applied yet", ["agent", "partition"])
LAG_MS: Final = Gauge(
    "kvatlas_worker_lag_ms",
    "Age of the newest applied message while records wait, 0 when none do",
    ["agent", "partition"],
)
QUEUED_RECORDS: Final = Gauge("kvatlas_worker_queued_records", "Source records read and not committed", ["agent"])
REWINDS: Final = Counter(
    "kvatlas_worker_rewinds_total",
    "Times source records were lost on their way in the worker and read again",
    ["agent"],
)
MISSED: Final = Counter(
    "kvatlas_worker_missed_records_total", "Source records that retention took before they were applied", ["agent"]
)
APPLIED_OFFSET: Final = Gauge("kvatlas_worker_applied_offset", "Source offset in the table", ["table", "partition"])
ROLE: Final = Gauge("kvatlas_worker_partitions", "Partitions by role", ["table", "role"])
CACHE_HITS: Final = Gauge(
    "kvatlas_worker_cache_hits", "Cache reads answered since the partitions were opened", ["table"]
)
CACHE_MISSES: Final = Gauge(
    "kvatlas_worker_cache_misses", "Cache reads not answered since the partitions were opened", ["table"]
)
CACHE_ENTRIES: Final = Gauge("kvatlas_worker_cache_entries", "Entries in the cache", ["table"])
CACHE_BYTES: Final = Gauge("kvatlas_worker_cache_bytes", "Estimated memory of the cache", ["table"])
TABLE_BYTES: Final = Gauge("kvatlas_worker_table_bytes", "RocksDB files and memtables", ["table"])
TABLE_KEYS: Final = Gauge("kvatlas_worker_table_keys", "RocksDB's estimate of the keys", ["table"])
RESTORED: Final = Counter("kvatlas_worker_restored_entries_total", "Changelog entries read by restores", ["table"])
RESTORE_REMAINING: Final = Gauge(
    "kvatlas_worker_restore_remaining_entries", "Changelog entries left to read", ["table"]
)
RESTORE_RATE: Final = Gauge("kvatlas_worker_restore_entries_per_second", "Speed of the restore in progress", ["table"])
STANDBY_LAG: Final = Gauge(
    "kvatlas_worker_standby_lag_entries", "Changelog entries that standbys are behind", ["table"]
)
BLOCKS: Final = Gauge(
    "kvatlas_worker_blocks", "Blocks that a pod holds in this worker's partitions, from a sample", ["pod", "tier"]
)
LOOKUPS: Final = Counter("kvatlas_worker_lookups_total", "Lookups by outcome", ["outcome"])
LOOKUP_KEYS: Final = Counter("kvatlas_worker_lookup_keys_total", "Keys asked for")
LOOKUP_SECONDS: Final = Histogram(
    "kvatlas_worker_lookup_seconds",
    "Time in the worker per lookup",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)
SWEPT: Final = Counter("kvatlas_worker_sweep_entries_total", "Entries the sweep looked at", ["table"])
SWEEP_DROPPED: Final = Counter("kvatlas_worker_sweep_dropped_total", "Dead holders the sweep removed", ["table"])
SWEEPS: Final = Counter("kvatlas_worker_sweeps_total", "Complete sweeps of a partition", ["table"])
REBALANCES: Final = Counter("kvatlas_worker_rebalances_total", "Assignments received")
MIRROR_LAG_SECONDS: Final = Gauge(
    "kvatlas_worker_mirror_lag_seconds", "Time since all changes of a partition were in the mirror"
)
MIRROR_PENDING: Final = Gauge("kvatlas_worker_mirror_pending_keys", "Changelog records that are not in the mirror yet")
MIRROR_KEYS: Final = Counter("kvatlas_worker_mirror_keys_total", "Entries sent to the mirror")
MIRROR_COPIES: Final = Counter("kvatlas_worker_mirror_copies_total", "Partitions copied to the mirror as a whole")
MIRROR_REFUSED: Final = Counter(
    "kvatlas_worker_mirror_refused_total", "Times the mirror was left alone because another worker has claimed it"
)
MIRROR_ERRORS: Final = Counter("kvatlas_worker_mirror_errors_total", "Times the mirror's server failed")
DAMAGED: Final = Counter(
    "kvatlas_worker_state_damaged_total", "Local state that was damaged and set aside, to be rebuilt", ["what"]
)
UNREADABLE: Final = Counter(
    "kvatlas_worker_changelog_unreadable_total", "Entries of our changelogs that are no such thing, passed over"
)


def visible(agent: str, receive_ns: int) -> None:
    """Note that messages have come through an agent.

    Args:
        agent: ``resolve`` or ``index``.
        receive_ns: the newest one's receive time, ns since the epoch; 0 for none.
    """
    if receive_ns:
        VISIBLE_SECONDS.labels(agent).observe(max(time.time_ns() - receive_ns, 0) / 1e9)


def flushed(agent: str, updates: int, started: float, counts: Mapping[str, int]) -> None:
    """Note a committed flush.

    Args:
        agent: ``resolve`` or ``index``.
        updates: block updates in it.
        started: monotonic time when the first of it was applied, seconds.
        counts: what applying met.
    """
    UPDATES.labels(agent).inc(updates)
    BATCHES.labels(agent).inc()
    COMMIT_SECONDS.labels(agent).observe(time.monotonic() - started)
    for kind, number in counts.items():
        COUNTS.labels(agent, kind).inc(number)
