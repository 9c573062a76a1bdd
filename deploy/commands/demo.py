"""``kvatlas demo``."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from kvatlas.deploy.cli import common
from kvatlas.deploy.processes.demo import Check, Demo, DemoError, PodView
from kvatlas.deploy.sim.options import SimPlan

_LINE_SECONDS: Final = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the traffic (default 10)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts to score at the end (default 12)")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="logs and tables (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="go on with traffic after the checks, until interrupted")
    parser.add_argument("--console", action="store_true", help="serve the console's page too, and print its address")
    names = ("kafka", "log", "bridge", "worker", "scorer", "tokenizer", "sim", "console")
    common.add_sections(parser, *names, prefixed=True)
    parser.set_defaults(sections=(*names, "picker"))  # what pickers reckon, for the console


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; 0 when every score equals the truth."""
    sections = common.load_sections(args, defaults={name: {"listen": "127.0.0.1:0"} for name in ("scorer", "console")})
    sim = SimPlan.of(sections.pop("sim"))
    state_dir = args.state_dir or Path(tempfile.mkdtemp(prefix="kvatlas-demo-"))
    stop = common.stop_event()
    sim = msgspec.structs.replace(sim, requests_per_second=max(sim.requests_per_second, 40.0))
    demo = Demo(sections, sim, state_dir, console=args.console)
    print("starting: broker in memory (librdkafka's mock cluster), bridge, worker, scorer", flush=True)
    failed = True
    try:
        if demo.start(stop):
            if args.console:
                print(f"running {demo.addresses}", flush=True)
            _traffic(demo, args.seconds, stop)
            checks = [] if stop.is_set() else list(demo.checks(args.prompts))
            failed = not _report(checks)
            if args.keep and not failed:
                print(f"ready {demo.addresses}", flush=True)
                demo.keep(stop)
    except DemoError as error:
        print(f"kvatlas demo: {error}; logs are in {state_dir}", file=sys.stderr)
    finally:
        demo.stop()
        if args.state_dir is None and not failed:
            shutil.rmtree(state_dir, ignore_errors=True)
    if failed:
        why = "interrupted" if stop.is_set() else f"scores differ from the truth; logs are in {state_dir}"
        print(f"kvatlas demo: failed: {why}", file=sys.stderr)
        return 130 if stop.is_set() else 1
    print("kvatlas demo: ok")
    return 0


def _traffic(demo: Demo, seconds: float, stop: threading.Event) -> None:
    console = Console()
    if not console.is_terminal:
        show = _lines()
        demo.traffic(seconds, stop, show)
        demo.drain(stop, show)
        return
    began, rates = time.monotonic(), _Rate()
    with Live(console=console, refresh_per_second=4) as live:

        def draw(rows: list[PodView]) -> None:
            live.update(_table(rows, rates(rows), time.monotonic() - began))

        demo.traffic(seconds, stop, draw)
        demo.drain(stop, draw)


class _Rate:
    """Messages per second between two looks."""

    def __init__(self) -> None:
        self._last = (time.monotonic(), 0)

    def __call__(self, rows: list[PodView]) -> float:
        now, total = time.monotonic(), sum(row.seen for row in rows)
        before, self._last = self._last, (now, total)
        return (total - before[1]) / max(now - before[0], 1e-3)


def _lines() -> Callable[[list[PodView]], None]:
    rate, shown = _Rate(), [0.0]

    def show(rows: list[PodView]) -> None:
        if time.monotonic() - shown[0] < _LINE_SECONDS:
            return
        shown[0] = time.monotonic()
        blocks, lag = sum(row.blocks for row in rows), sum(max(row.lag, 0) for row in rows)
        print(f"{len(rows)} pods, {rate(rows):.0f} messages/s, {blocks} blocks, {lag} messages behind", flush=True)

    return show


def _table(rows: list[PodView], rate: float, seconds: float) -> Table:
    table = Table(title=f"{seconds:.0f} s, {rate:.0f} messages/s")
    for name in ("pod", "messages", "blocks", "behind", "age ms"):
        table.add_column(name, justify="left" if name == "pod" else "right")
    for row in rows:
        table.add_row(row.pod, str(row.messages), str(row.blocks), str(max(row.lag, 0)), f"{row.age_ms:.0f}")
    return table


def _report(checks: list[Check]) -> bool:
    """Print the scores beside the truth; returns whether all are equal."""
    table = Table(title="scores beside the truth (pod: score)")
    for name in ("prompt", "tokens", "kvatlas", "truth", ""):
        table.add_column(name, justify="right" if name == "tokens" else "left")
    for check in checks:
        table.add_row(
            check.prompt,
            str(check.tokens),
            _shown(check.scored),
            _shown(check.expected),
            "equal" if check.equal else "DIFFERENT",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    hits = sum(bool(check.expected) for check in checks)
    return bool(checks) and hits > 0 and all(check.equal for check in checks)


def _shown(scores: dict[str, float]) -> str:
    best = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{pod}: {score:g}" for pod, score in best[:4]) + (" ..." if len(best) > 4 else "") or "no pod"
