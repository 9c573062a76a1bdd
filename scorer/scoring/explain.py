"""Explain: who holds each block of a prompt, and why each pod's match ended where it did. Pure; for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvatlas.bridge.model.block_key import partition_of
from kvatlas.bridge.model.events import Tier
from kvatlas.scorer.scoring.answers import BlockInfo, Explained, HolderInfo, Scored
from kvatlas.scorer.scoring.walk import Pod, Scene, tier_name
from kvatlas.streams.index.holders import Holder, holders


def explain(
    scored: Scored,
    keys: Sequence[bytes],
    values: Sequence[bytes | None],
    scene: Scene,
    *,
    pods: Collection[str] = (),
    usable_only: bool = False,
    partition_count: int = 0,
) -> Explained:
    """Return a scored prompt block by block.

    Args:
        scored: the answer.
        keys: the prompt's block keys.
        values: packed holders of each; None where the index did not answer.
        scene: pods, model and weights of the walk.
        pods: pod ids that were allowed; empty for all.
        usable_only: whether the walk left out the last token's block.
        partition_count: partitions of the index, 0 where there are none.
    """
    blocks = [
        BlockInfo(
            number=number,
            key=key.hex(),
            partition=partition_of(key, partition_count) if partition_count else 0,
            answered=value is not None,
            holders=[info for holder in holders(value or b"") for info in _infos(holder, scene)],
        )
        for number, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    named = {holder.pod for block in blocks for holder in block.holders} | scored.scores.keys()
    ends = {}
    for pod in scene.fleet.pods:
        if pod.name in named and (not pods or pod.name in pods):
            limit = pod.usable_blocks(scored.prompt_tokens, scored.block_size_tokens, whole_prompt=not usable_only)
            ends[pod.name] = _end(pod, blocks[:limit], values, scene, scored, partitioned=partition_count > 0)
    return Explained(scored=scored, blocks=blocks, ends=ends)


def _infos(holder: Holder, scene: Scene) -> list[HolderInfo]:
    fleet = scene.fleet
    pod = fleet.by_ref.get(holder.pod_ref)
    if pod is not None:
        named = [(pod.name, pod.validity.state(holder.tier, holder.epoch))]
    elif holder.tier == Tier.SHARED and holder.pod_ref in fleet.by_store:
        mounts = fleet.by_store[holder.pod_ref]
        named = [(pod.name, "live" if scene.reads(pod) else "other-model") for pod in mounts]
    elif holder.pod_ref in fleet.gone:
        named = [(fleet.gone[holder.pod_ref], "dead")]
    else:
        named = [(f"{holder.pod_ref:016x}", "unknown-pod")]
    return [
        HolderInfo(pod=name, tier=tier_name(holder.tier), group=holder.group, epoch=holder.epoch, state=state)
        for name, state in named
    ]


def _end(
    pod: Pod,
    blocks: Sequence[BlockInfo],
    values: Sequence[bytes | None],
    scene: Scene,
    scored: Scored,
    *,
    partitioned: bool,
) -> str:
    for block, value in zip(blocks, values, strict=False):
        if value is None:
            silent = f"partition {block.partition}" if partitioned else "the index"
            return f"block {block.number}: {silent} did not answer, so the match may be longer"
        cell = scene.cells(value).get(pod.number)
        if pod.windowed_only or (cell is not None and cell.grade is not None):
            continue
        return f"block {block.number}: {_why_not(pod, [holder for holder in block.holders if holder.pod == pod.name])}"
    matched = scored.scores[pod.name].matched_blocks if pod.name in scored.scores else 0
    if pod.windows and matched < len(blocks):
        groups = ", ".join(str(window.group) for window in pod.windows)
        return f"the match ends at block {matched}, the last place where every window (groups {groups}) is filled"
    return f"end of the prompt: all {len(blocks)} blocks that count are held"


def _why_not(pod: Pod, theirs: Sequence[HolderInfo]) -> str:
    if not theirs:
        return "not held on any tier"
    there = [holder for holder in theirs if holder.state not in ("dead", "other-model")]
    if not there:
        dead = [holder.epoch for holder in theirs if holder.state == "dead"]
        if not dead:
            return "held only in a shared store, for another model"
        newest = max(dead)
        bound = min((each for each in pod.validity[:3] if each > newest), default=pod.valid_from)
        return f"held only by epoch {newest}, which ended; the pod counts from epoch {bound}"
    held = {holder.group for holder in there}
    missing = set() if any(holder.state == "speculative" for holder in there) else set(pod.full or ()) - held
    if missing:
        return f"full-attention group {', '.join(str(group) for group in sorted(missing))} does not hold it"
    return "held, but on tiers or epochs that this strategy gives no weight"
