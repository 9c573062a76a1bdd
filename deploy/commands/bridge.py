"""``kvatlas bridge``: the bridge until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse

from kvatlas.deploy.cli import common
from kvatlas.deploy.processes import main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "bridge", "log")


def run(args: argparse.Namespace) -> int:
    """Run the bridge; prints ``ready bridge metrics=HOST:PORT`` once it is subscribed."""
    return main.serve("bridge", args)
