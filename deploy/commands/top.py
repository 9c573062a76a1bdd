"""``kvatlas top``: fleet, workers and scorers, live or once."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Final

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvatlas.bridge.errors import LogError, SettingsError
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import check_rights, rights_of
from kvatlas.deploy.cli.common import add_sections, async_stop_event, at_least, load_sections
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.watch import Picture, Watch

_WIDE: Final = 240
_TIERS: Final = ("gpu", "cpu", "disk")
_EPILOG: Final = "Exit code with --once: 1 while a partition is not served or a named scorer does not answer, else 0."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.epilog = _EPILOG
    parser.add_argument("--once", action="store_true", help="look twice, a second apart, print and end")
    parser.add_argument("--json", action="store_true", help="with --once: one JSON object")
    parser.add_argument(
        "--every",
        type=at_least(0, float, above=True),
        default=1.0,
        metavar="SECONDS",
        help="time between looks (default 1)",
    )
    parser.add_argument(
        "--scorer-metrics",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="telemetry_listen of a scorer, or a DNS name with an address for each scorer; repeatable",
    )
    add_sections(parser, "kafka", "log")


def run(args: argparse.Namespace) -> int:
    """Show the state.

    With ``--once`` the exit code is 1 while some partition is not served or a named scorer does not answer.
    """
    if args.json and not args.once:
        raise SettingsError("--json needs --once: the live view is for people")
    kafka: KafkaSettings = load_sections(args)["kafka"]
    return asyncio.run(_run(args, kafka))


async def _run(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    stop = async_stop_event()
    await check_rights(kafka, rights_of("top", kafka))
    async with LogReader(kafka) as reader:  # what follows the topics would wait for those that are missing
        for topic in (topics.PODS, topics.WORKERS):
            await reader.partitions(topic)
    async with Watch(kafka, args.scorer_metrics) as watch:
        picture = await watch.look()
        if args.once:
            await _pause(stop, args.every)
            picture = await watch.look()
            if args.json:
                print(msgspec.json.encode(picture).decode())
            else:
                # Without a terminal nothing is cut off at its width: scripts and tickets want whole names.
                Console(width=None if sys.stdout.isatty() else _WIDE).print(_drawn(picture))
            whole = picture.workers and not picture.unserved and all(scorer.up for scorer in picture.scorers)
            return 0 if whole else 1
        with Live(_drawn(picture), screen=False, refresh_per_second=4) as live:
            note = ""
            while not await _pause(stop, args.every):
                try:
                    picture, note = await watch.look(), ""
                except LogError as error:  # it may come back; what was seen last stays on the screen
                    note = str(error)
                live.update(_drawn(picture, note))
    return 0


async def _pause(stop: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True


def _drawn(picture: Picture, note: str = "") -> Group:
    parts: list[RenderableType] = [_pods(picture), _workers(picture)]
    if picture.scorers:
        parts.append(_scorers(picture))
    for row in picture.scorers:
        parts += [Text(f"{row.scorer}: {said}; run kvatlas doctor", style="bold red") for said in row.disagreements]
    if picture.stores:
        parts.append("shared stores: " + ", ".join(f"{name} {blocks}" for name, blocks in picture.stores.items()))
    if picture.unserved:
        parts.append(Text(f"no worker answers for partitions {_ranges(picture.unserved)}", style="bold red"))
    if note:
        parts.append(Text(note, style="bold red"))
    return Group(*parts)


def _pods(picture: Picture) -> Table:
    pods = Table(title=f"{len(picture.pods)} pods", title_justify="left")
    for name in ("pod", "state", "model", "epoch", "sequence", "messages/s", "age ms", "lost", *_TIERS):
        pods.add_column(name, justify="left" if name in ("pod", "state", "model") else "right")
    for row in picture.pods:
        lost = f"{row.lost} (last {row.first_lost} to {row.last_lost})" if row.lost else "0"
        pods.add_row(
            row.pod,
            row.state,
            row.model,
            f"{row.epoch >> 32}.{row.epoch & 0xFFFFFFFF}",
            str(row.sequence),
            f"{row.messages_per_second:.1f}",
            f"{row.age_ms:.0f}",
            lost,
            *(str(row.blocks.get(tier, 0)) for tier in _TIERS),
        )
    return pods


def _workers(picture: Picture) -> Table:
    workers = Table(title=f"{len(picture.workers)} workers", title_justify="left")
    for name in ("worker", "endpoint", "serves", "standby", "restoring", "behind", "records/s"):
        workers.add_column(name, justify="right" if name in ("behind", "records/s") else "left")
    for worker in picture.workers:
        workers.add_row(
            worker.worker + (" (silent)" if worker.expired else ""),
            worker.endpoint,
            _ranges(worker.partitions),
            _ranges(worker.standby),
            _ranges(worker.restoring),
            str(worker.lag_records),
            f"{worker.records_per_second:.1f}",
        )
    return workers


def _scorers(picture: Picture) -> Table:
    scorers = Table(title=f"{len(picture.scorers)} scorers", title_justify="left")
    scorers.add_column("scorer")
    for name in ("scores/s", "p50 ms", "p99 ms", "errors", "hit ratio", "realised", "pods", "unserved"):
        scorers.add_column(name, justify="right")
    for row in picture.scorers:
        if not row.up:
            scorers.add_row(Text(f"{row.scorer} does not answer", style="bold red"))
            continue
        scorers.add_row(
            row.scorer,
            f"{row.requests_per_second:.1f}",
            _shown(row.p50_ms),
            _shown(row.p99_ms),
            f"{row.errors:.1%}",
            "-" if row.hit_ratio is None else f"{row.hit_ratio:.1%}",
            "-" if row.realised is None else f"{row.realised:.1%}",
            str(row.pods),
            str(row.unserved),
        )
    return scorers


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ranges(numbers: list[int]) -> str:
    """Return 0-3,7 for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)
