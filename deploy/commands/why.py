"""``kvatlas why``: why a request went where it went, and what came of it."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import KvatlasError, WireError
from kvatlas.bridge.model import records, topics
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
from kvatlas.deploy.history.moment import EARLIEST, LATEST, Moment
from kvatlas.deploy.history.rebuild import rebuild
from kvatlas.deploy.history.verdict import Verdict, judge, keys_of, leading

_SERVED: Final = (
    "endpoint",
    "status",
    "prompt_tokens",
    "predicted_tokens",
    "cached_tokens",
    "first_token_ms",
    "outcome",
    "cause",
    "regret_tokens",
)
HELP: Final = "why a request went where it went, and what came of it"


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
    decision, outcome, served, verdict = asyncio.run(_why(args, kafka))
    if args.json:
        print(json.dumps(_document(decision, outcome, served, verdict)))
        return 0
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


class _Found(NamedTuple):
    """The records about one request."""

    decision: records.DecisionRecord
    outcome: records.DecisionRecord | None
    served: records.DecisionRecord | None


async def _why(
    args: argparse.Namespace, kafka: KafkaSettings
) -> tuple[records.DecisionRecord, records.DecisionRecord | None, records.DecisionRecord | None, Verdict]:
    async with LogReader(kafka) as reader:
        decision, outcome, served = await _find(reader, args.request_id)
        held: list[dict[str, int]] = []
        for moment_ns in (decision.decided_ns, decision.decided_ns + int(args.after * 1e9)):
            with tempfile.TemporaryDirectory(prefix="kvatlas-why-") as folder:
                past = await rebuild(
                    reader,
                    kafka,
                    Moment(time_ms=moment_ns // 1_000_000),
                    folder=Path(folder),
                    options=options_of(args),
                    clock=time.time_ns,
                    snapshots=args.snapshots,
                    progress=progress_to_stderr("rebuilding"),
                )
                if not held:
                    note_beginning(past)
                held.append(await leading(past, decision))
                past.close(keep=False)
    return decision, outcome, served, judge(decision, *held)


async def _find(reader: LogReader, request_id: str) -> _Found:
    decision: records.DecisionRecord | None = None
    outcome: records.DecisionRecord | None = None
    served: records.DecisionRecord | None = None
    async for chunk in reader.read(await reader.range(topics.DECISIONS, EARLIEST, LATEST)):
        for record in chunk:
            if record.key != request_id.encode() or not record.value:
                continue
            try:
                found = records.decode(records.DecisionRecord, record.value)
            except WireError:
                continue
            if found.kind == "outcome":
                outcome = found
            elif found.kind == "served":
                served = found
            else:
                decision = found
    if decision is None:
        raise KvatlasError(
            f"no decision about request {request_id!r} is on {topics.DECISIONS}; routers report them with "
            "ReportDecision, and the topic keeps them for its retention"
        )
    return _Found(decision, outcome, served)


def _document(
    decision: records.DecisionRecord,
    outcome: records.DecisionRecord | None,
    served: records.DecisionRecord | None,
    verdict: Verdict,
) -> dict[str, Any]:
    plain = msgspec.to_builtins(msgspec.structs.replace(decision, keys=b""), str_keys=True)
    return {
        "decision": {**plain, "keys": None, "blocks": len(keys_of(decision))},
        "outcome": outcome and {"outcome": outcome.outcome, "real_blocks": outcome.real_blocks},
        "served": served and {name: getattr(served, name) for name in _SERVED},
        "verdict": msgspec.to_builtins(verdict),
    }
