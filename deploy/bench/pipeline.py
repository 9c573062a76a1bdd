"""``kvatlas bench pipeline``: the parts of ``kvatlas up`` under load, from an engine's socket to table and score.

For the load see :mod:`kvatlas.deploy.bench._system`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kvatlas.deploy.bench import _rig, _system
from kvatlas.deploy.bench._figures import figure, spread

HELP: Final = "events/s and blocks/s from ZMQ to table, and ZMQ-to-score freshness, on both brokers"

#: The embedded broker keeps 5 MB a partition, so what is measured on it must fit whatever pods share a partition.
_BLOCKS: Final = {"embedded": 120_000, "real": 600_000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _rig.add_arguments(parser)
    parser.add_argument("--on", choices=["both", "embedded", "real"], default="both", help="which broker")
    parser.add_argument("--probes", type=int, default=100, help="messages whose way to the score is timed")
    parser.add_argument("--rate", type=float, default=20.0, help="other messages a second meanwhile")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each broker."""
    if args.on in ("both", "embedded"):
        # With an address given none is started.
        with _rig.broker("-", args.work_dir) as (_, folder):
            yield from _measure("embedded", "", folder, args)
    if args.on in ("both", "real"):
        with _rig.broker(args.brokers, args.work_dir) as (bootstrap, folder):
            yield from _measure("real", bootstrap, folder, args)


def _measure(kind: str, bootstrap: str, folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    messages = max(int(_BLOCKS[kind] * args.scale) // _system.BLOCKS_PER_MESSAGE, _system.PODS)
    with (
        _system.engines(messages) as engines,
        _system.probe() as probe,
        _system.running(
            kind, bootstrap, folder, args, [*engines.flags, f"{probe.endpoint},{probe.replay_endpoint}"]
        ) as (
            address,
            metrics,
        ),
    ):
        _system.until(metrics, engines.filled)
        cpu, began = _system.metric(metrics, _system.CPU_SECONDS), engines.send(0.0)
        seconds = _system.until(metrics, engines.filled + engines.updates) - began
        yield figure(f"{kind}: blocks, ZMQ to table", engines.updates / seconds, "blocks/s")
        yield figure(f"{kind}: events, ZMQ to table", messages * _system.EVENTS_PER_MESSAGE / seconds, "events/s")
        cpu = (_system.metric(metrics, _system.CPU_SECONDS) - cpu) / engines.updates
        yield figure(f"{kind}: CPU of the worker", cpu * 1e6, "us/block")
        engines.send(args.rate)
        delays = list(_system.freshness(probe, address, args.probes))
        yield spread(f"{kind}: freshness, ZMQ to score", delays, "ms")
