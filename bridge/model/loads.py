"""A pod's load as its record tells it, and how long that counts. Pure.

The bridge tells a load when it has changed, at most once in so many seconds as it writes records, and an unchanged one
now and then. What is older than :data:`LOAD_STALE_SECONDS` is *stale*: the engine does not answer, or nobody asks it.
That is not the same as no load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvatlas.bridge.model.records import PodRecord

RUNNING: Final = "running"
WAITING: Final = "waiting"
CACHE_USAGE: Final = "cache_usage"
#: Prompt tokens since the engine's start: looked up in its prefix cache, and found there or by its connector.
ASKED: Final = "prefix_asked_tokens"
FOUND: Final = "prefix_found_tokens"

#: An unchanged load is told again after this time, so that it does not become stale.
LOAD_REPEAT_SECONDS: Final = 5.0
LOAD_STALE_SECONDS: Final = 15.0


def load_age_seconds(record: PodRecord, now_ns: int) -> float:
    """Return the age of a pod's load by the wall clock ``now_ns``, 0 for one from a clock ahead of it."""
    return max(0.0, (now_ns - record.load_ns) / 1e9)


def fresh_load(record: PodRecord, now_ns: int) -> Mapping[str, float] | None:
    """Return what a pod reports, empty where it never did; None for what is stale."""
    if record.load and load_age_seconds(record, now_ns) > LOAD_STALE_SECONDS:
        return None
    return record.load
