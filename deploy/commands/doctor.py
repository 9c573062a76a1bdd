"""``kvatlas doctor``."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

import msgspec

from kvatlas.bridge.engines.http import parse_http
from kvatlas.deploy.cli import common
from kvatlas.deploy.commands import score
from kvatlas.deploy.doctor.examine import Examined, examine
from kvatlas.deploy.doctor.findings import Finding, exit_code, markdown, page
from kvatlas.deploy.doctor.log import look_at_log


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
    parser.add_argument(
        "--picker", default="", metavar="HOST:PORT", help="telemetry_listen of a picker, to see what it knows of load"
    )
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
    if args.engines_only:
        return await examine(Examined(urls=urls, wait_seconds=args.wait))
    kafka = common.load_sections(args)["kafka"]
    with score.connect(args) as client:
        return await examine(
            Examined(
                urls=urls,
                client=client,
                scorer=args.scorer,
                log=None if args.skip_kafka else lambda: look_at_log(kafka, args.app, wait_seconds=args.wait),
                picker=args.picker,
                probe=not args.no_probe,
                wait_seconds=args.wait,
                told=(lambda _text: None) if args.json else lambda text: print(text, file=sys.stderr),
            )
        )
