"""``kvatlas version``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Final

_PARTS: Final = ("faust-streaming", "aiokafka", "rocksdict", "pyzmq", "grpcio", "tokenizers", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print versions of kvatlas, Python and the libraries that are installed."""
    found = {"kvatlas": importlib.metadata.version("kvatlas"), "python": platform.python_version()}
    for part in _PARTS:
        try:
            found[part] = importlib.metadata.version(part)
        except importlib.metadata.PackageNotFoundError:
            continue
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name} {version}" for name, version in found.items()))
    return 0
