"""A request's whole story: its decision, what came of it, and what the log shows was there then and later."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import KvatlasError, WireError
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import EARLIEST, LATEST, Moment
from kvatlas.deploy.history.rebuild import PastIndex, rebuild
from kvatlas.deploy.history.verdict import Verdict, computed_again, judge, keys_of, leading
from kvatlas.streams.resolve.resolver import ResolveOptions

SERVED: Final = (
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


class Found(NamedTuple):
    """The records about one request."""

    decision: records.DecisionRecord
    outcome: records.DecisionRecord | None
    served: records.DecisionRecord | None


class Story(NamedTuple):
    """What is known of one request, and what the log says about its decision."""

    found: Found
    verdict: Verdict

    def document(self) -> dict[str, Any]:
        """Return it as ``kvatlas why --json`` prints it."""
        decision, outcome, served = self.found
        plain = msgspec.to_builtins(msgspec.structs.replace(decision, keys=b""), str_keys=True)
        return {
            "decision": {**plain, "keys": None, "blocks": len(keys_of(decision))},
            "outcome": outcome and {"outcome": outcome.outcome, "real_blocks": outcome.real_blocks},
            "served": served and {name: getattr(served, name) for name in SERVED},
            "verdict": msgspec.to_builtins(self.verdict),
        }


async def tell(
    reader: LogReader,
    kafka: KafkaSettings,
    request_id: str,
    *,
    after_seconds: float,
    options: ResolveOptions,
    snapshots: Path | None = None,
    began: Callable[[PastIndex], None] = lambda _past: None,
    progress: Callable[[int, int], None] | None = None,
) -> Story:
    """Find a decision and rebuild the index as of then and later.

    Args:
        reader: an open reader.
        kafka: which log.
        request_id: as it was reported to a scorer.
        after_seconds: how much later the second look is.
        options: what the deployment decides about the meaning of events.
        snapshots: where saved states are; None folds from the start of the log.
        began: told the first state once it is there.
        progress: called with records done and to do.

    Raises:
        KvatlasError: no decision about it is on the log.
        LogError: the log does not answer.
    """
    found = await find(reader, request_id)
    decision = found.decision
    held: list[dict[str, int]] = []
    again: dict[str, int] = {}
    for moment_ns in (decision.decided_ns, decision.decided_ns + int(after_seconds * 1e9)):
        with tempfile.TemporaryDirectory(prefix="kvatlas-why-") as folder:
            past = await rebuild(
                reader,
                kafka,
                Moment(time_ms=moment_ns // 1_000_000),
                folder=Path(folder),
                options=options,
                clock=time.time_ns,
                snapshots=snapshots,
                progress=progress,
            )
            if not held:
                began(past)
                again = computed_again(past)
            held.append(await leading(past, decision))
            past.close(keep=False)
    return Story(found, judge(decision, held[0], held[1], again))


async def find(reader: LogReader, request_id: str) -> Found:
    """Return the newest records about a request.

    Raises:
        KvatlasError: no decision about it is on the log.
        LogError: the log does not answer.
    """
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
            elif found.kind == "decision":
                decision = found
    if decision is None:
        raise KvatlasError(
            f"no decision about request {request_id!r} is on {topics.DECISIONS}; routers report them with "
            "ReportDecision, and the topic keeps them for its retention"
        )
    return Found(decision, outcome, served)
