"""``kvatlas top``: fleet and workers, live or once."""

from __future__ import annotations

import argparse
import asyncio
from typing import Final

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvatlas.bridge.settings import KafkaSettings
from kvatlas.deploy.commands.common import add_sections, async_stop_event, load_sections
from kvatlas.deploy.history.watch import Picture, Watch
from kvatlas.deploy.rights import check_rights, rights_of

HELP: Final = "live view of fleet and workers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("--once", action="store_true", help="look twice, a second apart, print and end")
    parser.add_argument("--json", action="store_true", help="with --once: one JSON object")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="time between looks (default 1)")
    add_sections(parser, "kafka", "log")


def run(args: argparse.Namespace) -> int:
    """Show the state; with ``--once`` the exit code is 1 while some partition is not served."""
    kafka: KafkaSettings = load_sections(args)["kafka"]
    return asyncio.run(_run(args, kafka))


async def _run(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    stop = async_stop_event()
    await check_rights(kafka, rights_of("top", kafka))
    async with Watch(kafka) as watch:
        picture = await watch.look()
        if args.once:
            await _pause(stop, args.every)
            picture = await watch.look()
            if args.json:
                print(msgspec.json.encode(picture).decode())
            else:
                Console().print(_drawn(picture))
            return 1 if picture.unserved or not picture.workers else 0
        with Live(_drawn(picture), screen=False, refresh_per_second=4) as live:
            while not await _pause(stop, args.every):
                live.update(_drawn(await watch.look()))
    return 0


async def _pause(stop: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True


def _drawn(picture: Picture) -> Group:
    pods = Table(title=f"{len(picture.pods)} pods", title_justify="left")
    for name in ("pod", "state", "model", "epoch", "sequence", "messages/s", "age ms", "lost"):
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
        )
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
    note = f"no worker answers for partitions {_ranges(picture.unserved)}" if picture.unserved else ""
    return Group(pods, workers, Text(note, style="bold red"))


def _ranges(numbers: list[int]) -> str:
    """Return 0-3,7 for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)
