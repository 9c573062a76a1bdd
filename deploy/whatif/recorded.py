"""Requests as routers reported them on ``kv-decisions``, as arrivals for a what-if."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvatlas.bridge.errors import SettingsError, WireError
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.records import DecisionRecord
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import Moment
from kvatlas.deploy.whatif.fleet import Arrival
from kvatlas.deploy.whatif.run import Outcome

#: Name of the row that says what really happened.
OBSERVED = "observed"


class Recording(NamedTuple):
    """What routers decided, and what the events later showed.

    Attributes:
        arrivals: requests in the order of their decisions.
        block_size_tokens: canonical block size of their keys.
        pods: pod ids that requests went to.
        skipped: decisions of another block size, or without keys.
        observed: hits as the events showed them; None when no outcome was recorded.
    """

    arrivals: list[Arrival]
    block_size_tokens: int
    pods: list[str]
    skipped: int
    observed: Outcome | None


async def read_decisions(reader: LogReader, since: Moment, until: Moment) -> list[DecisionRecord]:
    """Return the records of ``kv-decisions`` in a range; what cannot be read is left out.

    Raises:
        LogError: Kafka does not answer, or the topic does not exist.
    """
    found = []
    async for chunk in reader.read(await reader.range(topics.DECISIONS, since, until)):
        for record in chunk:
            try:
                found.append(records.decode(DecisionRecord, record.value or b""))
            except WireError:
                continue
    return found


def recording(found: Iterable[DecisionRecord]) -> Recording:
    """Turn decisions and their outcomes into arrivals; one request counts once, with its newest decision.

    Raises:
        SettingsError: there is no decision.
    """
    decisions: dict[str, DecisionRecord] = {}
    outcomes: dict[str, DecisionRecord] = {}
    for record in found:
        if record.kind not in ("decision", "outcome"):
            continue
        kind = decisions if record.kind == "decision" else outcomes
        if record.request_id not in kind or kind[record.request_id].decided_ns <= record.decided_ns:
            kind[record.request_id] = record
    ordered = sorted(decisions.values(), key=lambda decision: decision.decided_ns)
    if not ordered:
        raise SettingsError("kv-decisions holds no decision in this range; routers report them with ReportDecision")
    size = ordered[-1].block_size_tokens  # after a reindex: keys of different sizes have nothing in common
    used = [decision for decision in ordered if decision.block_size_tokens == size and decision.keys]
    arrivals = [Arrival(decision.decided_ns / 1e6, _blocks(decision), 0, decision.pod) for decision in used]
    return Recording(
        arrivals, size, sorted({decision.pod for decision in used}), len(ordered) - len(used), _observed(used, outcomes)
    )


def _blocks(decision: DecisionRecord) -> list[int]:
    keys = decision.keys
    return [int.from_bytes(keys[at : at + KEY_BYTES], "big") for at in range(0, len(keys), KEY_BYTES)]


def _observed(used: list[DecisionRecord], outcomes: dict[str, DecisionRecord]) -> Outcome | None:
    """Sum up the predicted hits that the events confirmed, over the requests that have an outcome."""
    judged = [decision for decision in used if outcomes.get(decision.request_id, decision).real_blocks >= 0]
    if not judged:
        return None
    blocks: dict[str, int] = {}
    hits = total = 0
    for decision in judged:
        count = len(decision.keys) // KEY_BYTES
        # What was there afterwards may have been computed by this very request: only what was predicted counts.
        hits += min(decision.predicted_blocks, outcomes[decision.request_id].real_blocks)
        total += count
        blocks[decision.pod] = blocks.get(decision.pod, 0) + count
    return Outcome(
        policy=OBSERVED,
        requests=len(judged),
        hit_ratio=hits / total,
        balance=max(blocks.values()) * len(blocks) / total,
        recomputed_tokens=(total - hits) * used[-1].block_size_tokens,
    )
