"""``kvatlas console``."""

from __future__ import annotations

import argparse
from typing import Final

from kvatlas.bridge.runtime.settings import add_flags
from kvatlas.deploy.cli import common
from kvatlas.deploy.processes import main
from kvatlas.deploy.processes.parts import PARTS

#: What events mean, as the workers run; the rest of ``[worker]``, and ``[picker]``, comes from file and environment.
_MEANING: Final = ("block_size_tokens", "announcements", "strict_gaps", "clears", "default_store")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "log", "console")
    add_flags(parser, "worker", common.section_class("worker"), only=_MEANING)
    parser.set_defaults(sections=PARTS["console"].sections)


def run(args: argparse.Namespace) -> int:
    """Serve the page until SIGTERM or Ctrl-C; prints ``ready console=URL`` once it listens."""
    return main.serve("console", args)
