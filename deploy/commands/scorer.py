"""``kvatlas scorer``."""

from __future__ import annotations

import argparse

from kvatlas.deploy.cli import common
from kvatlas.deploy.processes import main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "log", "scorer", "tokenizer", "picker", prefixed=("picker",))
    parser.add_argument("--with-picker", action="store_true", help="also pick pods for a gateway, in this process")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; prints ``ready scorer=HOST:PORT`` once scores can be asked for."""
    return main.serve("scorer-with-picker" if args.with_picker else "scorer", args)
