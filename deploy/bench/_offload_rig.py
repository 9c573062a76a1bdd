"""Shared by the cases of ``bench offload``: timing, memory, threads, and one figure beside its baseline."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

MB: Final = 1 << 20


def figure(case: str, seconds: Sequence[float], plain: Sequence[float], size: int) -> dict[str, Any]:
    value, baseline = size / statistics.median(seconds) / 1e9, size / statistics.median(plain) / 1e9
    ranked = sorted(seconds)
    return {
        "bench": "offload",
        "case": case,
        "value": round(value, 3),
        "unit": "GB/s",
        "p50": round(value, 3),
        "p99": round(size / ranked[-1] / 1e9, 3),
        "baseline": round(baseline, 3),
        "ratio": round(value / baseline, 3),
    }


def fresh_memory(size: int) -> memoryview:
    """Return page-aligned memory with content that does not compress."""
    memory = memoryview(mmap.mmap(-1, size))
    seed = os.urandom(MB)
    for at in range(0, size, MB):
        part = memory[at : at + MB]
        part[:] = seed[: len(part)]
        part[:8] = at.to_bytes(8, "little")
    return memory


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def threaded(threads: int, count: int, work: Callable[[int], object]) -> None:
    """Call ``work`` with 0 to count - 1 on several threads; the first error is raised here."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, range(count)):
            pass


def good(results: dict[bytes, Any]) -> None:
    bad = [result for result in results.values() if not result.ok]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(results)} transfers failed, the first with {bad[0]}")
