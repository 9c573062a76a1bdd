"""``kvatlas whatif``: compare routing policies on a trace or on recorded decisions."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli import common
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import parse_moment
from kvatlas.deploy.whatif.compare import QueuedFleet, first_tokens
from kvatlas.deploy.whatif.fleet import Arrival
from kvatlas.deploy.whatif.policies import Options, parse
from kvatlas.deploy.whatif.queueing import Engine, FirstTokens, at_load, requests_of, shared_bound
from kvatlas.deploy.whatif.recorded import Recording, read_decisions, recording
from kvatlas.deploy.whatif.routers import ROUTERS, split
from kvatlas.deploy.whatif.run import Outcome, read_trace, simulate

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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, help="trace file: JSON lines, .gz or plain")
    source.add_argument("--decisions", action="store_true", help="requests that routers reported on kv-decisions")
    parser.add_argument("--since", default="earliest", metavar="MOMENT", help="first decision (default earliest)")
    parser.add_argument("--until", default="latest", metavar="MOMENT", help="end before this moment (default latest)")
    parser.add_argument(
        "--queueing",
        action="store_true",
        help="time to first token in a fleet with queues; policies: " + ", ".join(ROUTERS) + ", as KIND or KIND:N "
        "(N picker replicas); default: all, with 1 and 4 replicas",
    )
    common.add_sections(parser, "kafka", "picker", prefixed=("picker",))
    number, positive = common.at_least(1), common.at_least(0, float, above=True)
    parser.add_argument("--pods", type=number, help="pods in the fleet (default 8; of decisions: as many as they name)")
    parser.add_argument("--blocks", type=number, default=2048, help="blocks in one pod's cache (default 2048)")
    parser.add_argument(
        "--block-size-tokens", type=number, help="tokens per block of the trace (512); of decisions: as recorded"
    )
    parser.add_argument(
        "--load-weight", type=common.at_least(0, float), default=0.3, help="cost of a waiting block (default 0.3)"
    )
    parser.add_argument(
        "--delay-ms", type=common.at_least(0, float), default=30.0, help="age of what a precise scorer knows (30)"
    )
    parser.add_argument("--blocks-per-second", type=positive, help="prefill rate of a pod; default: 90 %% busy")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random choices (default 1)")
    parser.add_argument(
        "--load",
        type=positive,
        default=0.8,
        help="with --queueing: share of the fleet's time that the requests take when its caches hold as much as one "
        "of their size could (default 0.8)",
    )
    parser.add_argument(
        "--tokens-per-second", type=positive, default=8_000.0, help="with --queueing: prompt rate of a pod (8000)"
    )
    parser.add_argument("--step-ms", type=positive, default=20.0, help="with --queueing: one decoding step (20)")
    parser.add_argument("--json", action="store_true", help="one JSON object a policy instead of a table")


def run(args: argparse.Namespace) -> int:
    """Simulate each policy and print one row for each."""
    if args.queueing:
        return _queueing(args)
    policies = args.policy or list(_DEFAULT if args.trace else ("recorded", *_DEFAULT))
    for policy in policies:
        if parse(policy)[0] == "recorded" and args.trace:
            raise SettingsError(f"policy {policy!r} needs --decisions; a trace does not say where its requests went")
    observed = None
    if args.trace:
        args.pods, args.block_size_tokens = args.pods or 8, args.block_size_tokens or 512
        arrivals = list(read_trace(args.trace, args.block_size_tokens))
        if not arrivals:
            raise SettingsError(f"{args.trace} holds no requests")
    else:
        found = asyncio.run(_recorded(args, common.load_sections(args)["kafka"]))
        args.pods, args.block_size_tokens = args.pods or len(found.pods), found.block_size_tokens
        arrivals, observed = found.arrivals, found.observed
        if found.skipped:
            print(f"{found.skipped} decisions left out: no keys, or of another block size", file=sys.stderr)
    if not args.json:
        print(f"{len(arrivals)} requests, {args.pods} pods x {args.blocks} blocks of {args.block_size_tokens} tokens")
        print(f"{'policy':<16}{'hit ratio':>10}{'balance':>9}{'recomputed tokens':>19}")
    if observed is not None:
        print(msgspec.json.encode(observed).decode() if args.json else _row(observed), flush=True)
    for policy in policies:
        outcome = _simulate(args, policy, arrivals)
        print(msgspec.json.encode(outcome).decode() if args.json else _row(outcome), flush=True)
    return 0


def _queueing(args: argparse.Namespace) -> int:
    """Simulate each policy in a fleet with queues and print one row for each."""
    policies = args.policy or [name for kind in ROUTERS for name in (f"{kind}:1", f"{kind}:4")]
    chosen = [split(name) for name in policies]
    sections = common.load_sections(args)
    if args.trace:
        size = args.block_size_tokens or 512
        arrivals, pods = list(read_trace(args.trace, size)), args.pods or 8
        if not arrivals:
            raise SettingsError(f"{args.trace} holds no requests")
    else:
        found = asyncio.run(_recorded(args, sections["kafka"]))
        arrivals, pods, size = found.arrivals, args.pods or len(found.pods), found.block_size_tokens
    engine = Engine(
        tokens_per_second=args.tokens_per_second,
        step_seconds=args.step_ms / 1e3,
        capacity_blocks=args.blocks,
        block_tokens=size,
    )
    requests = at_load(requests_of(arrivals, size), engine, pods, args.load)
    if not args.json:
        bound = shared_bound(requests, engine, pods)
        print(
            f"{len(requests)} requests, {pods} pods x {args.blocks} blocks of {size} tokens, {args.load:.0%} busy; "
            f"one cache of all pods' size would hit {bound:.3f}"
        )
        print(f"{'policy':<14}{'mean ms':>9}{'p50':>8}{'p90':>8}{'p99':>8}{'hit ratio':>11}{'req/s':>8}{'balance':>9}")
    fleet = QueuedFleet(engine, pods, args.seed, args.delay_ms / 1e3)
    for outcome in first_tokens(requests, fleet, chosen, sections["picker"]):
        print(msgspec.json.encode(outcome).decode() if args.json else _first_tokens_row(outcome), flush=True)
    return 0


def _first_tokens_row(one: FirstTokens) -> str:
    return (
        f"{f'{one.policy}:{one.replicas}':<14}{one.mean_ms:>9.0f}{one.p50_ms:>8.0f}{one.p90_ms:>8.0f}{one.p99_ms:>8.0f}"
        f"{one.hit_ratio:>11.3f}{one.requests_per_second:>8.2f}{one.balance:>9.2f}"
    )


async def _recorded(args: argparse.Namespace, kafka: KafkaSettings) -> Recording:
    now_ms = time.time_ns() // 1_000_000
    since, until = parse_moment(args.since, now_ms), parse_moment(args.until, now_ms)
    async with LogReader(kafka) as reader:
        return recording(await read_decisions(reader, since, until))


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
