"""``kvatlas whatif``: compare routing policies on a trace or on recorded decisions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.whatif.fleet import Arrival
from kvatlas.deploy.whatif.policies import Options, parse
from kvatlas.deploy.whatif.run import Outcome, read_trace, simulate

HELP: Final = "replay decisions through other routing policies"
_DEFAULT: Final = (
    "shared",
    "precise:1",
    "precise:2",
    "precise:4",
    "precise:8",
    "approximate:1",
    "approximate:8",
    "round-robin",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument(
        "policy",
        nargs="*",
        metavar="POLICY",
        help="precise:N (N scorers), approximate:N (N routers), round-robin, random, recorded, shared (the bound); "
        f"default: {' '.join(_DEFAULT)}",
    )
    parser.add_argument("--trace", type=Path, required=True, help="trace file: JSON lines, .gz or plain")
    parser.add_argument("--pods", type=int, default=8, help="pods in the fleet (default 8)")
    parser.add_argument("--blocks", type=int, default=2048, help="blocks in one pod's cache (default 2048)")
    parser.add_argument("--block-size-tokens", type=int, default=512, help="tokens per block of the trace (512)")
    parser.add_argument("--load-weight", type=float, default=0.3, help="cost of a waiting block (default 0.3)")
    parser.add_argument("--delay-ms", type=float, default=30.0, help="age of what a precise scorer knows (30)")
    parser.add_argument("--blocks-per-second", type=float, help="prefill rate of a pod; default: 90 %% busy")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random choices (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a policy instead of a table")


def run(args: argparse.Namespace) -> int:
    """Simulate each policy and print one row for each."""
    for name in ("pods", "blocks", "block_size_tokens"):
        if getattr(args, name) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be 1 or more")
    policies = args.policy or list(_DEFAULT)
    for policy in policies:
        parse(policy)
    arrivals = list(read_trace(args.trace, args.block_size_tokens))
    if not arrivals:
        raise SettingsError(f"{args.trace} holds no requests")
    if not args.json:
        print(f"{len(arrivals)} requests, {args.pods} pods x {args.blocks} blocks of {args.block_size_tokens} tokens")
        print(f"{'policy':<16}{'hit ratio':>10}{'balance':>9}{'recomputed tokens':>19}")
    for policy in policies:
        outcome = _simulate(args, policy, arrivals)
        print(msgspec.json.encode(outcome).decode() if args.json else _row(outcome), flush=True)
    return 0


def _simulate(args: argparse.Namespace, policy: str, arrivals: list[Arrival]) -> Outcome:
    live = sys.stderr.isatty()

    def progress(done: int) -> None:
        print(f"\r{policy}: {done}/{len(arrivals)}", end="\r", file=sys.stderr, flush=True)

    return simulate(
        arrivals,
        policy,
        pods=args.pods,
        capacity_blocks=args.blocks,
        block_size_tokens=args.block_size_tokens,
        options=Options(args.load_weight, args.delay_ms, args.seed),
        blocks_per_second=args.blocks_per_second,
        progress=progress if live else None,
    )


def _row(outcome: Outcome) -> str:
    return f"{outcome.policy:<16}{outcome.hit_ratio:>10.3f}{outcome.balance:>9.2f}{outcome.recomputed_tokens:>19,}"
