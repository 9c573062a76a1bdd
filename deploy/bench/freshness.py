"""``kvatlas bench freshness``: from an engine's publish call to the score that counts its blocks, under load.

Kafka, bridge, one worker process, scorer and the engines share the machine. The load is half of what the worker is
built for, in messages as engines with full caches send them, see :mod:`kvatlas.deploy.bench._system`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any, Final

from kvatlas.deploy.bench import _rig, _system
from kvatlas.deploy.bench._figures import figure, spread

HELP: Final = "from an engine's message on ZMQ to its blocks in a score, while other blocks are ingested (ms)"

_LOAD_BLOCKS_PER_SECOND: Final = 20_000
_PROBES: Final = 300
_SETTLE_SECONDS: Final = 45.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    _rig.add_arguments(parser)
    parser.add_argument("--load", type=int, default=_LOAD_BLOCKS_PER_SECOND, help="blocks/s ingested meanwhile")
    parser.add_argument("--probes", type=int, default=_PROBES, help="messages whose way is timed")


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures.

    Raises:
        StalledError: what was published does not arrive.
    """
    rate = args.load / _system.BLOCKS_PER_MESSAGE
    probes = max(int(args.probes * args.scale), 20)
    # Made before the load begins: the engines' own work must not compete with what is measured.
    ahead = int(rate * (_SETTLE_SECONDS + probes * 0.08))
    with (
        _rig.broker(args.brokers, args.work_dir) as (bootstrap, folder),
        _system.engines(max(ahead, _system.PODS)) as engines,
        _system.probe() as probe,
        _system.running(
            "freshness", bootstrap, folder, args, [*engines.flags, f"{probe.endpoint},{probe.replay_endpoint}"]
        ) as (address, metrics),
    ):
        _system.until(metrics, engines.filled)
        began = engines.send(rate)
        time.sleep(_SETTLE_SECONDS)
        delays = list(_system.freshness(probe, address, probes))
        lookups = list(_system.lookups(probe, address, probes))
        carried = (_system.metric(metrics, _system.UPDATES) - engines.filled) / (time.time() - began)
    yield spread("ZMQ to score", delays, "ms")
    yield spread("lookup of 512 keys", lookups, "ms")
    yield figure("load meanwhile", carried, "blocks/s")
