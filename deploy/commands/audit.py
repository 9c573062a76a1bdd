"""``kvatlas audit``."""

from __future__ import annotations

import argparse
import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Final

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.audit.audit import PodAudit, Truth, audit, fold_events, read_truth
from kvatlas.deploy.brokers.rights import check_rights, rights_of
from kvatlas.deploy.cli import common
from kvatlas.deploy.reindex.catalog import configured
from kvatlas.streams.errors import StreamsError
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve.options import resolve_options

_TIMEOUT_SECONDS: Final = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    common.add_sections(parser, "kafka", "worker")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--truth", metavar="URL", help="truth endpoint of the simulated fleet, http://HOST:PORT/truth")
    source.add_argument("--events", action="store_true", help="work the truth out from the kv-events log")
    parser.add_argument("--pod", action="append", default=[], help="audit this pod alone, repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object a pod and line")


def run(args: argparse.Namespace) -> int:
    """Print ghost and missing blocks per pod; returns 1 if there are any."""
    sections = common.load_sections(args)
    found = asyncio.run(_audit(args, sections["kafka"], sections["worker"]))
    if unknown := set(args.pod) - {pod.pod for pod in found}:
        known = ", ".join(pod.pod for pod in found) or "none"
        raise SettingsError(
            f"--pod {', '.join(sorted(unknown))}: neither the truth nor the index knows it; pods: {known}"
        )
    chosen = [pod for pod in found if not args.pod or pod.pod in args.pod]
    for line in lines(chosen, as_json=args.json):
        print(line)
    return 1 if any(pod.ghosts or pod.missing for pod in chosen) else 0


async def _audit(args: argparse.Namespace, kafka: KafkaSettings, worker: WorkerSettings) -> list[PodAudit]:
    await check_rights(kafka, rights_of("audit", kafka, app=worker.app))
    worker = await configured(kafka, worker)
    truth = await fold_events(kafka, resolve_options(worker)) if args.events else fetch_truth(args.truth)
    return await audit(kafka, truth, app=worker.app, version=worker.index_version)


def fetch_truth(url: str) -> Truth:
    """Fetch a truth endpoint.

    Raises:
        StreamsError: it does not answer, or with something else.
    """
    if not url.startswith(("http://", "https://")):
        url = f"http://{url}"
    if not url.endswith("/truth"):
        url = url.rstrip("/") + "/truth"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310 # http by the check above
            return read_truth(answer.read())
    except (urllib.error.URLError, OSError) as error:
        raise StreamsError(f"truth endpoint {url} does not answer: {error}") from error


def lines(found: Sequence[PodAudit], *, as_json: bool) -> list[str]:
    """Return what is printed."""
    if as_json:
        return [json.dumps(msgspec.to_builtins(pod)) for pod in found]
    made = [f"{'pod':<24} {'held':>8} {'ghosts':>8} {'missing':>8} {'suspect':>8}"]
    for pod in found:
        made.append(f"{pod.pod:<24} {pod.held:>8} {pod.ghosts:>8} {pod.missing:>8} {pod.suspect_ghosts:>8}")
        made += [f"    {example}" for example in pod.examples]
    total = (sum(pod.ghosts for pod in found), sum(pod.missing for pod in found))
    made.append(f"{len(found)} pods, {total[0]} ghosts, {total[1]} missing")
    return made
