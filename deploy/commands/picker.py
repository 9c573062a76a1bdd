"""``kvatlas picker``: the endpoint picker of a gateway."""

from __future__ import annotations

import argparse
from typing import Final

from kvatlas.deploy.cli import common
from kvatlas.deploy.processes import main

#: Settings of the scorer inside: the engine's own word replaces the later look at the index.
DEFAULTS: Final = {"scorer": {"outcome_delay_ms": 0.0}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "log", "picker", "scorer", "tokenizer", prefixed=("scorer",))


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; prints ``ready picker=HOST:PORT metrics=HOST:PORT`` once a pod can be picked."""
    return main.serve("picker", args, DEFAULTS)
