"""What a routing decision was worth: what was predicted, what the log shows was there, and where the rest went."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from kvatlas.bridge.model import block_key, records
from kvatlas.deploy.history.past import view_of
from kvatlas.deploy.history.rebuild import PastIndex
from kvatlas.scorer.scoring.scorer import Chunks, look_up
from kvatlas.scorer.scoring.walk import Walk, Weights


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The join of a decision with the log.

    Attributes:
        predicted: leading blocks that the chosen pod was scored with.
        held: leading blocks that the log says it held at that moment.
        best_pod, best_held: the pod that held most at that moment, and how much.
        later: leading blocks that it held at the later moment.
        reasons: where blocks of the best possible hit went, for people; empty when nothing was lost.
    """

    predicted: int
    held: int
    best_pod: str
    best_held: int
    later: int
    reasons: list[str]


async def leading(past: PastIndex, decision: records.DecisionRecord) -> dict[str, int]:
    """Return, per pod, how many leading blocks of a decision's prompt the scoring engine counts as of a state."""
    keys, view = keys_of(decision), view_of(past)
    tokens = len(keys) * view.fleet.block_size_tokens
    steps = Walk(view.fleet.scene(decision.model, Weights()), tokens, whole_prompt=True)
    await look_up(view.lookups, keys, steps, math.inf, chunks=Chunks())
    return {pod.name: 0 for pod in view.fleet.pods} | {match.pod.name: match.blocks for match in steps.matches()}


def computed_again(past: PastIndex) -> dict[str, int]:
    """Return, per pod that decodes speculatively, how many blocks at the end of a match it computes again."""
    return {pod.name: pod.again_blocks for pod in view_of(past).fleet.pods if pod.again_blocks}


def judge(
    decision: records.DecisionRecord,
    before: Mapping[str, int],
    after: Mapping[str, int],
    again: Mapping[str, int] | None = None,
) -> Verdict:
    """Compare a decision with what the log shows.

    Args:
        decision: as it was recorded.
        before: pod -> leading blocks held when it was made.
        after: pod -> leading blocks held at the later moment.
        again: pod -> blocks at the end of a match that it computes again.
    """
    held, later = before.get(decision.pod, 0), after.get(decision.pod, 0)
    best_pod = max(before, key=lambda name: (before[name], name == decision.pod), default="")
    best = before.get(best_pod, 0)
    total = len(decision.keys) // block_key.KEY_BYTES
    reasons = []
    spent = min((again or {}).get(best_pod, 0), total - best) if best else 0
    if best + spent < total:
        reasons.append(f"never cached: {total - best - spent} of {total} blocks were on no pod")
    if spent:
        reasons.append(f"speculation: {best_pod} computes the last {spent} of the blocks that it holds again")
    if best > held:
        reasons.append(f"routing: {best_pod} held {best - held} blocks more than {decision.pod}")
    if decision.predicted_blocks > held:
        reasons.append(f"stale view: {decision.predicted_blocks - held} predicted blocks were gone already")
    elif decision.predicted_blocks < held:
        reasons.append(f"stale view: {held - decision.predicted_blocks} blocks were there and not seen yet")
    if later < held:
        reasons.append(f"eviction: {held - later} of the blocks were gone by the later moment")
    return Verdict(
        predicted=decision.predicted_blocks, held=held, best_pod=best_pod, best_held=best, later=later, reasons=reasons
    )


def keys_of(decision: records.DecisionRecord) -> list[bytes]:
    """Return the block keys of a decision's prompt."""
    size = block_key.KEY_BYTES
    return [decision.keys[at : at + size] for at in range(0, len(decision.keys), size)]
