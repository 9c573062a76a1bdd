"""``kvatlas scorer``."""

from __future__ import annotations

import argparse
from typing import Final

from kvatlas.bridge.runtime.logs import configure_logging
from kvatlas.deploy.cli import common
from kvatlas.deploy.processes import main

_SECTIONS: Final = ("kafka", "log", "scorer", "tokenizer")


def _names() -> tuple[str, ...]:
    return tuple(name for name in _SECTIONS if name in common.SECTIONS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, *_names(), "picker", prefixed=("picker",))
    parser.add_argument("--with-picker", action="store_true", help="also pick pods for a gateway, in this process")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; prints ``ready scorer=HOST:PORT`` once scores can be asked for."""
    sections = common.load_sections(args)
    configure_logging(sections["log"], "scorer")
    return main.run("scorer-with-picker" if args.with_picker else "scorer", sections)
