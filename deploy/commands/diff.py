"""``kvatlas diff``: what changed per pod between two moments."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import msgspec

from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli.common import add_sections, load_sections
from kvatlas.deploy.commands.at import (
    add_rebuild_arguments,
    check_snapshots,
    note_beginning,
    options_of,
    progress_to_stderr,
)
from kvatlas.deploy.history.changes import PodChange, changes_between
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import FORMS, Moment, parse_moment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.epilog = f"MOMENT: {FORMS}. The later moment must not come first."
    parser.add_argument("first", metavar="MOMENT1", help="from when")
    parser.add_argument("second", metavar="MOMENT2", help="to when")
    parser.add_argument("--json", action="store_true", help="one JSON object a pod")
    add_rebuild_arguments(parser)
    add_sections(parser, "kafka", "log")


def run(args: argparse.Namespace) -> int:
    """Rebuild both states and print one row for each pod that is in either."""
    kafka: KafkaSettings = load_sections(args)["kafka"]
    check_snapshots(args.snapshots)
    now_ms = time.time_ns() // 1_000_000
    first, second = (parse_moment(text, now_ms) for text in (args.first, args.second))
    changes = asyncio.run(_changes(args, kafka, first, second))
    if not args.json:
        print(f"{'pod':<24}{'added':>10}{'removed':>10}{'messages':>10}{'lost':>6}  epoch")
    for change in changes:
        if args.json:
            print(msgspec.json.encode(change).decode())
        else:
            epoch = "raised" if change.epoch_raised else "same"
            print(
                f"{change.pod:<24}{change.added:>10}{change.removed:>10}{change.messages:>10}{change.lost:>6}"
                f"  {epoch} {change.state}"
            )
    return 0


async def _changes(args: argparse.Namespace, kafka: KafkaSettings, first: Moment, second: Moment) -> list[PodChange]:
    with tempfile.TemporaryDirectory(prefix="kvatlas-diff-") as folder:
        async with LogReader(kafka) as reader:
            return await changes_between(
                reader,
                kafka,
                first,
                second,
                folder=Path(folder),
                options=options_of(args),
                snapshots=args.snapshots,
                began=note_beginning,
                progress=(progress_to_stderr("first moment"), progress_to_stderr("second moment")),
            )
