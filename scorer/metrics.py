"""Metrics of the scorer; each name is defined here and nowhere else."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2.5)

REQUESTS: Final = Counter("kvatlas_scorer_requests", "Requests by operation and status code.", ["operation", "code"])
SECONDS: Final = Histogram(
    "kvatlas_scorer_request_seconds", "Time of a request in the scorer.", ["operation"], buckets=_BUCKETS
)
_STAGE: Final = Histogram("kvatlas_scorer_stage_seconds", "Time of a stage of a score.", ["stage"], buckets=_BUCKETS)
STAGE: Final = {stage: _STAGE.labels(stage) for stage in ("tokenize", "keys", "lookup", "score")}
LOOKUP_EVENTS: Final = Counter(
    "kvatlas_scorer_lookup_events", "Lookups hedged, redirected, failed or left unanswered.", ["event"]
)
PODS: Final = Gauge("kvatlas_scorer_pods", "Pods known.")
OPEN_DECISIONS: Final = Gauge("kvatlas_scorer_open_decisions", "Decisions that vouch for blocks now.")
DECISIONS_LOST: Final = Counter("kvatlas_scorer_decisions_lost", "Decisions that could not be published.")
UNCOVERED: Final = Gauge("kvatlas_scorer_uncovered_partitions", "Partitions that no worker answers for.")
PREDICTED_BLOCKS: Final = Counter("kvatlas_scorer_predicted_blocks", "Blocks that decisions counted on.", ["model"])
REAL_BLOCKS: Final = Counter("kvatlas_scorer_real_blocks", "Blocks that were there later.", ["model"])
OUTCOMES: Final = Counter("kvatlas_scorer_outcomes", "What came of decisions.", ["model", "outcome"])
