"""What a routing decision was worth: what was predicted, what the log shows was there, and where the rest went."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvatlas.bridge.model import block_key, pod_ids, records
from kvatlas.bridge.model.events import Tier
from kvatlas.deploy.history.rebuild import PastIndex
from kvatlas.streams.index.holders import Holder, holders


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


def leading(past: PastIndex, keys: list[bytes]) -> dict[str, int]:
    """Return, per pod, how many leading blocks of a prompt it held as of a state."""
    pods = past.pods()
    by_ref = {pod_ids.pod_ref(name): record for name, record in pods.items()}
    by_store: dict[int, list[str]] = {}
    for name, record in pods.items():
        if record.store:
            by_store.setdefault(pod_ids.store_ref(record.store), []).append(name)
    walking = set(pods)
    found = dict.fromkeys(pods, 0)
    for key in keys:
        walking &= _holding(past.blocks.get(key) or b"", by_ref, by_store)
        if not walking:
            break
        for name in walking:
            found[name] += 1
    return found


def _holding(value: bytes, by_ref: Mapping[int, records.PodRecord], by_store: Mapping[int, list[str]]) -> set[str]:
    names: set[str] = set()
    for holder in holders(value):
        record = by_ref.get(holder.pod_ref)
        if record is None:
            names.update(by_store.get(holder.pod_ref, ()))
        elif _live(record, holder):
            names.add(record.pod)
    return names


def _live(record: records.PodRecord, holder: Holder) -> bool:
    ended = holder.tier == Tier.GPU and holder.epoch < record.gpu_valid_from
    return record.state != records.GONE and holder.epoch >= record.valid_from and not ended


def judge(decision: records.DecisionRecord, before: Mapping[str, int], after: Mapping[str, int]) -> Verdict:
    """Compare a decision with what the log shows.

    Args:
        decision: as it was recorded.
        before: pod -> leading blocks held when it was made.
        after: pod -> leading blocks held at the later moment.
    """
    held, later = before.get(decision.pod, 0), after.get(decision.pod, 0)
    best_pod = max(before, key=lambda name: (before[name], name == decision.pod), default="")
    best = before.get(best_pod, 0)
    total = len(decision.keys) // block_key.KEY_BYTES
    reasons = []
    if best < total:
        reasons.append(f"never cached: {total - best} of {total} blocks were on no pod")
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
