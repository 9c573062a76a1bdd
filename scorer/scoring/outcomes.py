"""What came of a decision: the prediction against what the index shows some time later.

By then the pod may have computed the blocks for this very request and announced them, which makes any prediction look
right. What the data tells apart is counted apart: a holder of a later epoch than the decision's came after it, blocks
that only other decisions vouched for had been shown by no event when the decision was made, and a prediction of
nothing predicted no hit. Within one epoch a block that was evicted unseen and stored again looks as if it had stayed;
only the log knows (``kvatlas why``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvatlas.bridge.model.chain import split_keys
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import GONE, DecisionRecord, PodRecord
from kvatlas.scorer.scoring.decisions import OUTCOME
from kvatlas.scorer.scoring.fleet import Weights
from kvatlas.scorer.scoring.lookup import IndexView
from kvatlas.scorer.scoring.scorer import Chunks, look_up
from kvatlas.scorer.scoring.walk import Walk
from kvatlas.streams.index.holders import EPOCH_AT, HOLDER_BYTES, POD_BYTES

COLD: Final = "cold"
HIT: Final = "hit"
UNPROVEN: Final = "unproven"
LOST_EVICTION: Final = "lost-eviction"
LOST_STALE: Final = "lost-stale"
WRONG: Final = "wrong"


async def outcome_of(
    record: DecisionRecord, view: IndexView, weights: Weights, now_ns: int, *, chunks: Chunks, deadline: float
) -> DecisionRecord:
    """Compare a decision with what the index shows now; returns its outcome record.

    Args:
        record: the decision.
        view: the index now.
        weights: of the decision's model.
        now_ns: wall clock in ns.
        chunks: how many blocks to ask for.
        deadline: monotonic seconds after which the index counts as silent.
    """
    outcome = msgspec.structs.replace(record, kind=OUTCOME, keys=b"", decided_ns=now_ns)
    if record.block_size_tokens != view.fleet.block_size_tokens:  # of another index version: its keys mean nothing here
        return outcome
    pod = view.fleet.by_name.get(record.pod)
    if pod is not None and pod.pairs:  # its blocks are named with tokens that a decision does not keep
        return outcome
    keys = split_keys(record.keys)
    steps = Walk(
        view.fleet.scene(record.model, weights),
        len(keys) * record.block_size_tokens,
        pods=[record.pod],
        whole_prompt=True,
    )
    await look_up(view.lookups, keys, steps, deadline, chunks=chunks, overlay=AsOf(record))
    found = steps.matches()
    real = found[0].blocks if found else 0
    came = "" if steps.partial else judge(record, real, view.pods.get(record.pod))
    return msgspec.structs.replace(outcome, real_blocks=real, outcome=came)


class AsOf:
    """Overlay that takes out what a decision's pod has stored since."""

    def __init__(self, record: DecisionRecord) -> None:
        self._record = record

    def overlay(self, keys: bytes, start: int, values: Sequence[bytes | None], now_ns: int) -> list[bytes | None]:  # noqa: ARG002 - part of the protocol
        """Return the values as of the decision."""
        return [value and as_of(value, self._record) for value in values]


def as_of(value: bytes, record: DecisionRecord) -> bytes:
    """Return a table value without what the decision's pod has stored in later epochs than the decision's."""
    pod, epoch = pod_ref(record.pod).to_bytes(POD_BYTES, "big"), record.pod_epoch.to_bytes(8, "big")
    if pod not in value:
        return value
    each = [value[at : at + HOLDER_BYTES] for at in range(0, len(value), HOLDER_BYTES)]
    return b"".join(holder for holder in each if not (holder.startswith(pod) and holder[EPOCH_AT:] > epoch))


def judge(record: DecisionRecord, real_blocks: int, pod: PodRecord | None) -> str:
    """Return what came of a decision.

    Args:
        record: the decision.
        real_blocks: leading blocks of the prompt that the index shows on the pod now, of the decision's epoch.
        pod: the pod's record now.
    """
    if not record.predicted_blocks:
        return COLD
    if real_blocks >= record.predicted_blocks:
        return UNPROVEN if record.speculative_blocks else HIT
    if pod is None or pod.state == GONE or max(pod.epoch, pod.valid_from, pod.gpu_valid_from) > record.pod_epoch:
        return LOST_STALE
    return LOST_EVICTION if real_blocks else WRONG
