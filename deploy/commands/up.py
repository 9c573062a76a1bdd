"""``kvatlas up``."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.cli import common
from kvatlas.deploy.processes.launcher import Launcher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="ENDPOINT",
        help="tcp://HOST:PORT[,tcp://HOST:REPLAYPORT] of one engine, repeatable",
    )
    parser.add_argument("--embedded", action="store_true", help="in-process broker (the default without --brokers)")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="logs and tables (default: a temporary folder)")
    parser.add_argument("--console", action="store_true", help="serve the console's page too, and print its address")
    names = ("kafka", "log", "bridge", "worker", "scorer", "tokenizer", "console")
    common.add_sections(parser, *names, prefixed=True)
    parser.set_defaults(sections=(*names, "picker"))  # what pickers reckon, for the console


def run(args: argparse.Namespace) -> int:
    """Run the parts until SIGTERM or Ctrl-C; says ``ready``, scorer and brokers once scores can be asked for."""
    sections = common.load_sections(args)
    given = common.is_given(args, "kafka", "brokers")
    if args.embedded and "kafka:brokers" in vars(args):
        raise SettingsError("--embedded and --brokers exclude one another")
    if args.engine:
        bridge = sections["bridge"]
        sections["bridge"] = msgspec.structs.replace(bridge, engines=[*bridge.engines, *args.engine])
    state_dir = args.state_dir or Path(tempfile.mkdtemp(prefix="kvatlas-"))
    stop = common.stop_event()
    launcher = Launcher(sections, state_dir, use_embedded=args.embedded or not given, console=args.console)
    failed = True
    try:
        if launcher.start(stop):
            shown = f" console={launcher.console}" if args.console else ""
            print(f"ready scorer={launcher.scorer} brokers={launcher.kafka.brokers}{shown}", flush=True)
            while not stop.wait(0.2):
                launcher.check()
        failed = False
    finally:
        if killed := launcher.stop():
            print(f"kvatlas up: {', '.join(killed)} did not stop in time and was killed", file=sys.stderr)
        if args.state_dir is None and not failed:
            shutil.rmtree(state_dir, ignore_errors=True)
    return 0
