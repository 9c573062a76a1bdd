"""Figures as benchmarks give them, and the load that several of them make: events as vLLM publishes them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from kvatlas.bridge.model import topics


def figure(case: str, value: float, unit: str, **more: float) -> dict[str, Any]:
    """Return one figure, with what stands beside it, such as ``baseline`` and ``ratio``."""
    return {"case": case, "value": _short(value), "unit": unit} | {name: _short(one) for name, one in more.items()}


def spread(case: str, values: Sequence[float], unit: str, baseline: float | None = None) -> dict[str, Any]:
    """Return the median of some values, with ``p50`` and ``p99`` and how it stands to a baseline."""
    ordered = sorted(values)
    p50, p99 = statistics.median(ordered), ordered[int(len(ordered) * 0.99)]
    beside = {} if baseline is None else {"baseline": baseline, "ratio": p50 / baseline}
    return figure(case, p50, unit, p50=p50, p99=p99, **beside)


def stored(
    hashes: Sequence[int], tokens: Sequence[int], *, size: int = 16, parent: int | None = None
) -> dict[str, Any]:
    """Return an event that stores blocks."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


def removed(hashes: Sequence[int]) -> dict[str, Any]:
    """Return an event that removes blocks."""
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}


def headers(
    sequence: int, incarnation: int, model: str, content: str = topics.CONTENT_ENGINE
) -> list[tuple[str, bytes]]:
    """Return the headers that the bridge gives a message on ``kv-events``."""
    return [
        (topics.H_SEQUENCE, str(sequence).encode()),
        (topics.H_INCARNATION, str(incarnation).encode()),
        (topics.H_RECEIVE_NS, str(time.time_ns()).encode()),
        (topics.H_ENGINE, b"vllm"),
        (topics.H_MODEL, model.encode()),
        (topics.H_CONTENT_TYPE, content.encode()),
    ]


def _short(value: float) -> float:
    return round(value) if abs(value) >= 1_000 else round(value, 4)
