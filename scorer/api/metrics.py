"""Metrics of the scorer; each name is defined here and nowhere else."""

from __future__ import annotations

import time
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from kvatlas.scorer.scoring.answers import Scored

_BUCKETS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2.5)
_AGES: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

REQUESTS: Final = Counter("kvatlas_scorer_requests", "Requests by operation and status code.", ["operation", "code"])
SECONDS: Final = Histogram(
    "kvatlas_scorer_request_seconds", "Time of a request in the scorer.", ["operation"], buckets=_BUCKETS
)
_STAGE: Final = Histogram("kvatlas_scorer_stage_seconds", "Time of a stage of a score.", ["stage"], buckets=_BUCKETS)
STAGE: Final = {stage: _STAGE.labels(stage) for stage in ("tokenize", "keys", "lookup", "score")}
LOOKUP_EVENTS: Final = Counter(
    "kvatlas_scorer_lookup_events", "Lookups hedged, redirected, failed or left unanswered.", ["event"]
)
ANSWERS: Final = Counter("kvatlas_scorer_answers", "Scores: complete, from a standby, or partial.", ["kind"])
PROMPT_BLOCKS: Final = Counter("kvatlas_scorer_prompt_blocks", "Full blocks of the prompts scored.", ["model"])
CACHED_BLOCKS: Final = Counter(
    "kvatlas_scorer_cached_blocks", "Blocks of them that the pod with the longest match holds.", ["model"]
)
POD_AGE: Final = Histogram(
    "kvatlas_scorer_pod_age_seconds", "Age of the oldest of an answer's pods' last messages.", buckets=_AGES
)
INDEX_AGE: Final = Histogram(
    "kvatlas_scorer_index_age_seconds",
    "Age of the newest message applied in the partition of an answer where it is oldest.",
    buckets=_AGES,
)
PODS: Final = Gauge("kvatlas_scorer_pods", "Pods known.")
OPEN_DECISIONS: Final = Gauge("kvatlas_scorer_open_decisions", "Decisions that vouch for blocks now.")
DECISIONS_LOST: Final = Counter("kvatlas_scorer_decisions_lost", "Decisions that could not be published.")
UNCOVERED: Final = Gauge("kvatlas_scorer_uncovered_partitions", "Partitions that no worker answers for.")
PREDICTED_BLOCKS: Final = Counter("kvatlas_scorer_predicted_blocks", "Blocks that decisions counted on.", ["model"])
REAL_BLOCKS: Final = Counter("kvatlas_scorer_real_blocks", "Blocks that were there later.", ["model"])
DISAGREEMENTS: Final = Gauge(
    "kvatlas_scorer_disagreements",
    "Requests over which predictions and engines disagree: models that never match, pods whose engine says otherwise.",
    ["subject", "finding"],
)
OUTCOMES: Final = Counter("kvatlas_scorer_outcomes", "What came of decisions.", ["model", "outcome"])

#: Models come from requests; only those that some pod holds blocks of get a label of their own, and so many at most.
_MOST_MODELS: Final = 200
_OTHER: Final = "other"
_models: set[str] = set()


def model_label(model: str, *, held: bool) -> str:
    """Return the label of a model; ``held`` says that some pod holds blocks of it."""
    if held and len(_models) < _MOST_MODELS:
        _models.add(model)
    return model if model in _models else _OTHER


def observe(stage: str, seconds: float) -> None:
    """Note how long a stage of a score took."""
    STAGE[stage].observe(seconds)


def answered(model: str, scored: Scored) -> None:
    """Count an answer: how complete it is, how much of the prompt is cached, how old what it rests on is."""
    kind = "partial" if scored.partial else "standby" if scored.standby else "complete"
    ANSWERS.labels(kind).inc()
    longest = max((entry.matched_blocks for entry in scored.scores.values()), default=0)
    label = model_label(model, held=longest > 0)
    PROMPT_BLOCKS.labels(label).inc(scored.blocks)
    CACHED_BLOCKS.labels(label).inc(longest)
    if ages := [pod.age_ms for pod in scored.freshness.values() if pod.age_ms >= 0]:
        POD_AGE.observe(max(ages) / 1e3)
    if received := [seen.applied_receive_ns for seen in scored.partitions.values() if seen.applied_receive_ns > 0]:
        INDEX_AGE.observe(max(time.time_ns() - min(received), 0) / 1e9)
