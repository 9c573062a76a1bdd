"""Shared by the cases of ``bench offload``: timing, memory, threads, and one figure beside its baseline."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from kvatlas.deploy.bench._figures import figure

MB: Final = 1 << 20


def moved(case: str, seconds: Sequence[float], plain: Sequence[float], size: int) -> dict[str, Any]:
    value, baseline = size / statistics.median(seconds) / 1e9, size / statistics.median(plain) / 1e9
    slowest = size / max(seconds) / 1e9
    return figure(case, value, "GB/s", p50=value, p99=slowest, baseline=baseline, ratio=value / baseline)


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
