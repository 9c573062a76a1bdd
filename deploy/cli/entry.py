"""The ``kvatlas`` command: finds the subcommand's module and runs it.

A subcommand is one module in ``kvatlas.deploy.commands`` with ``add_arguments(parser)`` and
``run(args) -> int``. Only the module that is asked for is imported, so ``kvatlas score`` starts without Faust.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Final

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.cli.help import Parser, polish

#: Subcommand -> what its line in the overview says.
COMMANDS: Final = {
    "up": "run broker, bridge, worker and scorer on this machine until interrupted",
    "demo": "run the whole pipeline on simulated pods and check its answers",
    "demo-gateway": "send chats through a real Envoy and check that they arrive where their prefix is",
    "bridge": "subscribe to engines and put their events on Kafka",
    "worker": "materialise the block index and answer lookups",
    "mirror": "copy the index to Redis or Valkey, beside the workers",
    "scorer": "answer which pod holds a prompt's prefix",
    "picker": "pick the pod for a gateway's next request (Envoy, Gateway API)",
    "gateway": "run a real Envoy before a picker, or print its configuration",
    "score": "ask a scorer for scores",
    "tokenize": "ask a scorer which token ids the engine makes of a request",
    "explain": "ask a scorer why, block by block",
    "pods": "list or watch the pods a scorer knows",
    "sim": "run a simulated fleet of pods that publish real events",
    "broker": "start, stop or look at a local Apache Kafka",
    "topics": "create the topics, or check those that exist",
    "audit": "compare the index with what pods really hold",
    "replay": "read, filter, save or play back the event log",
    "at": "ask the index as of a past moment",
    "diff": "what changed per pod between two moments",
    "why": "why a request went where it went, and what came of it",
    "whatif": "replay decisions through other routing policies",
    "doctor": "check engines, Kafka, workers and scorer, and say what to fix",
    "console": "web page of fleet, prefixes, decisions and flow",
    "top": "live view of fleet, workers and scorers",
    "reindex": "build a new index version beside the live one",
    "evictor": "keep a shared offload folder within its budget",
    "bench": "run a benchmark",
    "config": "show every setting with its source names and default",
    "version": "print the version and what it runs on",
}

EXIT_USAGE: Final = 2
_EXIT_INTERRUPTED: Final = 130


def _module(name: str) -> str:
    return f"kvatlas.deploy.commands.{name.replace('-', '_')}"


def available() -> list[str]:
    """Return the subcommands whose module is installed, in the order of the overview."""
    return [name for name in COMMANDS if importlib.util.find_spec(_module(name))]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; help and wrong flags end the process as argparse does."""
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    parser = Parser(prog="kvatlas", description="A durable map of which KV-cache blocks live on which inference pod.")
    polish(parser)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    used: Parser | None = None
    for name in available():
        subparser = subparsers.add_parser(name, help=COMMANDS[name], description=COMMANDS[name].capitalize() + ".")
        if name == chosen:
            module = importlib.import_module(_module(name))
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
            polish(subparser, name)
            used = subparser
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        (used or parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvatlas``; returns the exit code: 0 done, 1 failed, 2 what trying again does not help, 130 interrupted."""
    args = parse(list(sys.argv[1:] if argv is None else argv))
    try:
        return int(args.run(args))
    except KvatlasError as error:
        print(f"kvatlas {args.command}: {error}", file=sys.stderr)
        return 1 if error.restart_helps else EXIT_USAGE
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 1
