"""``kvatlas evictor``: keep a shared offload folder or bucket within its budget, beside running engines."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvatlas.bridge.errors import SettingsError
from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files.catalog import DiskBudget
from kvatlas.connector.files.evictor import Report, evict_root
from kvatlas.deploy.cli.common import at_least

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("root", help="the folder that engines offload to, or s3://bucket/prefix (with AWS_* variables)")
    parser.add_argument("--max-bytes", type=size, help="budget in bytes; k, m, g, t stand for powers of 1000")
    parser.add_argument(
        "--max-percent",
        type=at_least(0, float, above=True),
        default=80.0,
        help="budget in %% of the file system (default 80)",
    )
    parser.add_argument("--high", type=float, default=0.95, help="begin above this share of the budget")
    parser.add_argument("--low", type=float, default=0.85, help="go down to this share of the budget")
    parser.add_argument(
        "--interval", type=at_least(0, float), default=0.0, metavar="SECONDS", help="repeat; 0 runs once (default)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")
    parser.add_argument("--progress", action="store_true", help="say on standard error what is being done")


def size(text: str) -> int:
    """Return a size in bytes from text such as ``500g``.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    number, unit = (text[:-1], text[-1].lower()) if text and text[-1].isalpha() else (text, "")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500g or 500000000000") from error


def run(args: argparse.Namespace) -> int:
    """Evict once, or every ``--interval`` seconds; 1 when a name could not be removed.

    A root that cannot be read ends a single run; with ``--interval`` it is said and looked at again, since a mount that
    is away for a while must not end what keeps it within its budget.

    Raises:
        SettingsError: the watermarks make no sense, or a bucket has no budget.
        LayoutError: the root cannot be read, in a single run.
    """
    if not 0 < args.low <= args.high <= 1:
        raise SettingsError(f"--low {args.low} and --high {args.high}: need 0 < low <= high <= 1")
    budget = DiskBudget(
        max_bytes=args.max_bytes, max_percent=args.max_percent, high_watermark=args.high, low_watermark=args.low
    )
    evict = _pass_over(args, budget)
    while True:
        try:
            report = evict()
        except LayoutError as error:
            if not args.interval:
                raise
            _progress(str(error))
        else:
            print(_line(report, dry_run=args.dry_run), flush=True)
            if not args.interval:
                return 1 if report.failed else 0
        time.sleep(args.interval)


def _pass_over(args: argparse.Namespace, budget: DiskBudget) -> Callable[[], Report]:
    """Return what evicts once, from a folder or from a bucket."""
    progress = _progress if args.progress else None
    if "://" in args.root:
        from kvatlas.connector.objects.evictor import evict_prefix  # noqa: PLC0415 - needs obstore
        from kvatlas.connector.objects.settings import ObjectTierSettings  # noqa: PLC0415

        settings = ObjectTierSettings(url=args.root)
        if budget.max_bytes is None:
            raise SettingsError(f"{args.root}: a bucket has no size to take a share of; name --max-bytes")
        budget = replace(budget, max_percent=None)
        return lambda: evict_prefix(settings, budget, dry_run=args.dry_run, progress=progress)
    root = Path(args.root)
    if root.is_file():
        raise SettingsError(f"{root} is a file; name the folder that engines offload to")
    return lambda: evict_root(root, budget, dry_run=args.dry_run, progress=progress)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _line(report: Report, *, dry_run: bool) -> str:
    return (
        f"{len(report.directories)} directories, {report.blocks} blocks, {report.used_bytes} of "
        f"{report.limit_bytes} bytes used; {'would evict' if dry_run else 'evicted'} {report.evicted_blocks} blocks, "
        f"{report.evicted_bytes} bytes; {report.stale_files} abandoned files removed, {report.failed} failures"
    )
