"""``kvatlas reindex``: build a new index version beside the live one, compare, and switch over."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from typing import Any, Final

import msgspec

from kvatlas.bridge.model.records import IndexCatalog
from kvatlas.bridge.model.topics import WORKERS
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli import common
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.reindex.catalog import drop_version, read_catalog, start_version, write_catalog
from kvatlas.deploy.reindex.compare import Comparison, Versions, compare
from kvatlas.deploy.reindex.errors import NotCaughtUpError, ReindexError
from kvatlas.deploy.reindex.progress import Progress, ProgressReader
from kvatlas.deploy.reindex.prompts import recent_prompts
from kvatlas.scorer.options import ScorerSettings

_SEED: Final = 1
_COMMIT_SECONDS: Final = 2.0
_SHOWN_DIFFERENCES: Final = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the steps of a reindex as subcommands."""
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    def step(name: str, text: str, *, version: bool = True) -> argparse.ArgumentParser:
        made = steps.add_parser(name, help=text, description=text)
        if version:
            made.add_argument("version", metavar="VERSION", help="name of the index version")
        common.add_sections(made, "kafka")
        made.add_argument("--app", default="kvatlas", help="the workers' app name")
        made.add_argument("--json", action="store_true", help="JSON instead of text")
        return made

    start = step("start", "make a version's topics and enter it in the catalog; its workers come next")
    start.add_argument("--block-size-tokens", type=common.at_least(1), help="canonical block size; default: as now")
    start.add_argument("--index-partitions", type=common.at_least(1), help="partitions of its index; default: as now")
    step("status", "show all versions: workers, partitions, lag", version=False)
    for name, text in (
        ("wait", "show a version's progress until it has caught up"),
        ("switch", "let scorers answer from a version, as soon as it has caught up; also the way back"),
    ):
        waiting = step(name, text)
        waiting.add_argument("--timeout-seconds", type=float, default=3600.0, help="give up after so long")
        waiting.add_argument(
            "--max-lag-records",
            type=int,
            default=100,
            help="records on the way that count as caught up; the traffic of the last seconds always does",
        )
    check = step("compare", "score prompts of the log on two versions; exit code 1 when they differ")
    check.add_argument("--against", default="", metavar="VERSION", help="the other one; default: the active one")
    check.add_argument("--prompts", type=int, default=300, help="prompts to score")
    check.add_argument("--messages", type=int, default=50_000, help="newest messages that prompts are taken from")
    check.add_argument("--seed", type=int, default=_SEED, help="of the choice of prompts")
    step("drop", "delete a version that does not answer: its topics and records")


def run(args: argparse.Namespace) -> int:
    """Do one step; returns 1 when versions differ or a version did not catch up in time."""
    kafka: KafkaSettings = common.load_sections(args)["kafka"]
    return asyncio.run(_step(args, kafka))


async def _step(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    await _check_topics(kafka)
    return await _STEPS[args.step](args, kafka)


async def _check_topics(kafka: KafkaSettings) -> None:
    """See that the deployment is there: what follows its topics would wait for them for long."""
    async with LogReader(kafka) as reader:
        await reader.partitions(WORKERS)


async def _start(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    catalog = await read_catalog(kafka)
    async with ProgressReader(kafka, args.app) as reader:
        now = await reader.look(catalog.active)
    size = args.block_size_tokens or now.block_size_tokens
    partitions = args.index_partitions or now.partitions
    if size < 1 or partitions < 1:
        raise ReindexError("no worker says what is in use now; give --block-size-tokens and --index-partitions")
    await start_version(
        kafka, args.app, args.version, block_size_tokens=size, partitions=partitions, clock_ns=time.time_ns
    )
    _say(
        args,
        {"version": args.version, "block_size_tokens": size, "partitions": partitions},
        f"index version {args.version}: {size}-token blocks in {partitions} partitions\n"
        f"next: kvatlas worker --index-version {args.version} --state-dir ANOTHER-FOLDER\n"
        f"then: kvatlas reindex wait {args.version}; compare {args.version}; switch {args.version}",
    )
    return 0


async def _status(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    async with ProgressReader(kafka, args.app) as reader:
        found = [await reader.look(version) for version in sorted(reader.catalog.versions)]
    if args.json:
        print(json.dumps([msgspec.to_builtins(one) for one in found]))
        return 0
    print(
        f"{'version':<20} {'block':>6} {'parts':>6} {'workers':>8} {'unserved':>9} {'events behind':>14} {'blocks':>8}"
    )
    for one in found:
        name = f"{one.version} *" if one.active else one.version
        print(
            f"{name:<20} {one.block_size_tokens:>6} {one.partitions:>6} {one.workers:>8} {len(one.uncovered):>9} "
            f"{one.events_lag:>14} {one.blocks_lag:>8}"
        )
    return 0


async def _wait(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    found = await _caught_up(args, kafka)
    _say(args, msgspec.to_builtins(found), f"index version {args.version} has caught up")
    return 0


async def _switch(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    await _caught_up(args, kafka)
    catalog = await read_catalog(kafka)
    before = catalog.active
    if before != args.version:
        catalog = await write_catalog(kafka, msgspec.structs.replace(catalog, active=args.version), time.time_ns())
    _say(
        args,
        {"active": args.version, "before": before},
        f"scorers answer from index version {args.version}; "
        f"back: kvatlas reindex switch {before}; done with it: kvatlas reindex drop {before}"
        if before != args.version
        else f"index version {args.version} answers already",
    )
    return 0


async def _compare(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    catalog = await read_catalog(kafka)
    against = args.against or catalog.active
    for version in (args.version, against):
        _check_known(catalog, version)
    if against == args.version:
        raise ReindexError(f"index version {against} compared with itself says nothing; name another with --against")
    async with LogReader(kafka) as reader:
        rng = random.Random(args.seed)  # noqa: S311 # a choice of samples
        prompts = await recent_prompts(reader, args.messages, args.prompts, rng)
    async with Versions(kafka, against, args.version, ScorerSettings(name="reindex")) as versions:
        found = await compare(versions, prompts, lambda done: _tell(f"{done}/{len(prompts)} prompts"))
    if args.json:
        print(json.dumps(msgspec.to_builtins(found)))
    else:
        _print_comparison(found, against, args.version)
    return 1 if found.differences or found.unanswered or not found.matches else 0


def _print_comparison(found: Comparison, old: str, new: str) -> None:
    print(f"{'pod':<24} {'prompts':>8} {'different':>10}")
    for pod, (count, bad) in found.pods.items():
        print(f"{pod:<24} {count:>8} {bad:>10}")
    for one in found.differences[:_SHOWN_DIFFERENCES]:
        print(f"    {one.pod}: prompt of {one.prompt_tokens} tokens: {old} {one.before}, {new} {one.after}")
    print(
        f"{found.prompts} prompts, {found.matches} matches of a pod, {len(found.differences)} differences, "
        f"{found.unanswered} not answered completely"
    )
    if not found.matches:
        print("no prompt matched any pod on either version: nothing was compared")


async def _drop(args: argparse.Namespace, kafka: KafkaSettings) -> int:
    async with ProgressReader(kafka, args.app) as reader:
        _check_known(reader.catalog, args.version)
        if (await reader.look(args.version)).workers:
            raise ReindexError(f"workers still keep index version {args.version}; stop them first")
    await drop_version(kafka, args.app, args.version, time.time_ns())
    _say(args, {"dropped": args.version}, f"index version {args.version} is gone; its workers' folders can go too")
    return 0


async def _caught_up(args: argparse.Namespace, kafka: KafkaSettings) -> Progress:
    """Wait until a version can take over.

    Raises:
        ReindexError: there is no such version.
        NotCaughtUpError: not within the time.
    """
    deadline = time.monotonic() + args.timeout_seconds
    async with ProgressReader(kafka, args.app) as reader:
        _check_known(reader.catalog, args.version)
        first: tuple[float, int] | None = None
        while True:
            found = await reader.look(args.version)
            # Workers commit once a second: what came since is on the way, not behind.
            first = first or (time.monotonic(), found.events_end)
            rate = (found.events_end - first[1]) / max(time.monotonic() - first[0], 0.2)
            why = found.behind(max(args.max_lag_records, round(rate * _COMMIT_SECONDS)))
            if why is None:
                return found
            _tell(f"{args.version}: {why}")
            if time.monotonic() >= deadline:
                raise NotCaughtUpError(f"index version {args.version} cannot take over: {why}")
            await asyncio.sleep(min(0.5, max(deadline - time.monotonic(), 0.01)))


def _check_known(catalog: IndexCatalog, version: str) -> None:
    if version not in catalog.versions:
        known = ", ".join(sorted(catalog.versions))
        raise ReindexError(f"there is no index version {version!r}; known: {known}")


def _tell(text: str) -> None:
    """Show progress where somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _say(args: argparse.Namespace, data: dict[str, Any], text: str) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(json.dumps(data) if args.json else text)


_STEPS: Final = {
    "start": _start,
    "status": _status,
    "wait": _wait,
    "switch": _switch,
    "compare": _compare,
    "drop": _drop,
}
