"""``kvatlas bench calibrate``: a spin figure of the machine, so that absolute figures of two machines can be compared.

Every benchmark prints the one-core figure as ``spin`` beside each of its own, taken at that moment: what else runs on
the machine shows in it too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any, Final

from kvatlas.deploy.bench._figures import figure

HELP: Final = "how fast this machine runs Python, on one core and on all at once (million steps/s)"

_STEPS: Final = 100_000
_ROUNDS: Final = 5
_UNIT: Final = "million steps/s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--rounds", type=int, default=50, help="rounds of 100,000 steps; the best counts")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    cores = os.cpu_count() or 1
    one = spin(args.rounds)
    yield figure("spin", one, _UNIT)
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(spin, [1] * cores, chunksize=1)  # all of them have started
        together = sum(pool.map(spin, [args.rounds] * cores, chunksize=1))
    yield figure(f"spin, {cores} cores", together, _UNIT, baseline=one, ratio=round(together / one, 2))


def spin(rounds: int = _ROUNDS) -> float:
    """Return how many million steps a second one core does: a dict written and read, integers added, bytes cut."""
    return round(_STEPS / min(_round() for _ in range(rounds)) / 1e6, 2)


def _round() -> float:
    seen: dict[bytes, int] = {}
    packed = bytes(range(256)) * 2
    began = time.perf_counter()
    for number in range(_STEPS):
        key = packed[number & 255 : (number & 255) + 16]
        seen[key] = seen.get(key, 0) + number
    return time.perf_counter() - began
