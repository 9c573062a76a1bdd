"""``kvatlas why``: why a request went where it went, and what came of it."""

from __future__ import annotations

import argparse
import asyncio
import json

from kvatlas.bridge.model import records
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.cli.common import add_sections, at_least, load_sections
from kvatlas.deploy.commands.at import (
    add_rebuild_arguments,
    check_snapshots,
    note_beginning,
    options_of,
    progress_to_stderr,
)
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.story import Story, tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this subcommand."""
    parser.add_argument("request_id", metavar="REQUEST-ID", help="as it was reported to a scorer")
    parser.add_argument(
        "--after",
        type=at_least(0, float),
        default=10.0,
        metavar="SECONDS",
        help="later moment to compare with (default 10)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    add_rebuild_arguments(parser)
    add_sections(parser, "kafka", "log")


def run(args: argparse.Namespace) -> int:
    """Find the decision, rebuild the index as of then and later, and say what became of the hit."""
    kafka: KafkaSettings = load_sections(args)["kafka"]
    check_snapshots(args.snapshots)
    story = asyncio.run(_story(args, kafka))
    if args.json:
        print(json.dumps(story.document()))
        return 0
    (decision, outcome, served), verdict = story
    print(f"request {decision.request_id} ({decision.model}) went to {decision.pod}", end="")
    print(f" by {decision.policy}" if decision.policy else "")
    for pod, (score, blocks) in decision.scores.items():
        print(f"  scored {pod}: {score:g} ({blocks} blocks, sequence {decision.pod_sequences.get(pod, -1)})")
    print(f"  based on kv-blocks offsets {decision.freshness}")
    print(
        f"predicted {verdict.predicted} blocks; the log shows {verdict.held} then and {verdict.later} "
        f"{args.after:g} s later; most were on {verdict.best_pod or 'no pod'} ({verdict.best_held})"
    )
    if served is not None:
        print(_engine_said(decision, served))
    if outcome is not None:
        print(f"the scorer noted: {outcome.outcome} ({outcome.real_blocks} blocks)")
    for reason in verdict.reasons:
        print(f"  {reason}")
    return 0


def _engine_said(decision: records.DecisionRecord, served: records.DecisionRecord) -> str:
    """Return what the engine itself said of the request, beside the prediction."""
    text = f"the engine at {served.endpoint} answered {served.status or 'with a status nobody saw'}"
    if served.cached_tokens >= 0:
        why = f"{served.outcome}, {served.cause}" if served.cause else served.outcome
        text += f", had {served.cached_tokens} of {served.prompt_tokens} tokens cached"
        text += f" ({decision.predicted_tokens} predicted: {why})"
    if served.first_token_ms >= 0:
        text += f", first token after {served.first_token_ms:.0f} ms"
    if served.regret_tokens > 0:
        text += f"; the best other pod would have cost {served.regret_tokens:.0f} tokens less"
    return text


async def _story(args: argparse.Namespace, kafka: KafkaSettings) -> Story:
    async with LogReader(kafka) as reader:
        return await tell(
            reader,
            kafka,
            args.request_id,
            after_seconds=args.after,
            options=options_of(args),
            snapshots=args.snapshots,
            began=note_beginning,
            progress=progress_to_stderr("rebuilding"),
        )
