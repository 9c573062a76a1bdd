"""``kvatlas doctor``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from contextlib import AsyncExitStack
from typing import Final

import msgspec

from kvatlas.bridge.engines.http import parse_http
from kvatlas.deploy.cli import common
from kvatlas.deploy.commands import score
from kvatlas.deploy.doctor.engine import EngineSeen, judge, look
from kvatlas.deploy.doctor.findings import Finding, by_subject, exit_code, markdown, page
from kvatlas.deploy.doctor.probe import check_probe
from kvatlas.deploy.doctor.system import block_size, check_log, check_scorer
from kvatlas.scorer.client import ScorerClient

HELP: Final = "check engines, Kafka, workers and scorer, and say what to fix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("engine", nargs="*", help="http://HOST:PORT of an engine's API, repeatable")
    common.add_sections(parser, "kafka")
    score.add_connection(parser)
    parser.add_argument("--app", default="kvatlas", help="the workers' app name, which their changelogs carry")
    parser.add_argument(
        "--engines-only", action="store_true", help="look at the engines alone, not at Kafka and scorer"
    )
    parser.add_argument("--skip-kafka", action="store_true", help="do not look at Kafka and the workers on it")
    parser.add_argument("--no-probe", action="store_true", help="send no request through the engines")
    parser.add_argument(
        "--wait", type=float, default=10.0, metavar="SECONDS", help="how long an event may be under way"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a finding and line")
    parser.add_argument("--markdown", action="store_true", help="print the page of all checks, and do nothing else")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be reached; exit code 1 where a check fails."""
    if args.markdown:
        print(markdown(), end="")
        return 0
    urls = [parse_http(text)[0] for text in args.engine]
    findings = asyncio.run(_examine(args, urls))
    if args.json:
        for finding in findings:
            print(json.dumps(msgspec.structs.asdict(finding)))
    else:
        print(page(findings))
        counts = {
            state: sum(finding.state == state for finding in findings) for state in ("ok", "warn", "fail", "skip")
        }
        print(
            f"\n{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed, {counts['skip']} not looked at"
        )
    return exit_code(findings)


async def _examine(args: argparse.Namespace, urls: list[str]) -> list[Finding]:
    findings: list[Finding] = []
    async with AsyncExitStack() as stack:
        engines = await asyncio.gather(*(stack.enter_async_context(look(url)) for url in urls))
        if args.engines_only:
            await _settle(args, engines)
            return [finding for seen in engines for finding in judge(seen)]
        client = stack.enter_context(score.connect(args))
        if not args.skip_kafka:
            findings += await check_log(common.load_sections(args)["kafka"], args.app)
        size = await block_size(client, engines)
        probes = [] if args.no_probe else [await _probe(args, seen, size, client) for seen in engines]
        await _settle(args, engines)
        # Last: an engine that had nothing to say before the probe is known to the scorer only now.
        findings += await check_scorer(client, args.scorer, engines)
        for seen in engines:
            findings += judge(seen, size)
        findings += [finding for probe in probes for finding in probe]
    return by_subject(findings)


async def _probe(args: argparse.Namespace, seen: EngineSeen, size: int | None, client: ScorerClient) -> list[Finding]:
    if seen.facts is None or not seen.facts.models or size is None:
        return [Finding("probe", seen.url, "skip", "no model, or no scorer to predict with")]
    if not args.json:
        print(f"probing {seen.url} ...", file=sys.stderr)
    longest = max(size, seen.facts.block_size_tokens or 0)
    return await check_probe(seen.url, seen.facts.models[0], longest, client, wait_seconds=args.wait)


async def _settle(args: argparse.Namespace, engines: list[EngineSeen] | tuple[EngineSeen, ...]) -> None:
    """Give sockets that have just connected a moment to hear something, unless there is nothing to hear."""
    heard = [source for seen in engines for source in seen.sources if source.connected]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min(1.0, args.wait)):
            while heard and any(not source.sequences for source in heard):  # noqa: ASYNC110 - sockets fill it
                await asyncio.sleep(0.05)
