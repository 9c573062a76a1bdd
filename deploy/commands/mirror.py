"""``kvatlas mirror``."""

from __future__ import annotations

import argparse
from typing import Final

from kvatlas.bridge.runtime.settings import add_flags
from kvatlas.deploy.cli import common
from kvatlas.deploy.processes import main
from kvatlas.deploy.processes.parts import PARTS

#: Of the workers' settings.
_FLAGS: Final = (
    "mirror", "mirror_prefix", "mirror_password_file", "mirror_cafile", "app", "index_version", "block_size_tokens",
    "session_timeout_seconds", "telemetry_listen",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "log")
    add_flags(parser, "worker", common.section_class("worker"), only=_FLAGS)
    parser.set_defaults(sections=PARTS["mirror"].sections)


def run(args: argparse.Namespace) -> int:
    """Mirror until SIGTERM or Ctrl-C; prints ``ready mirror=HOST:PORT/DB`` once it follows the log."""
    return main.serve("mirror", args)
