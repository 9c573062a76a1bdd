"""Explain, for the library: who holds each block of a prompt, and why each pod's match ended. Pure; for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvatlas.scorer.library.answers import BlockInfo, Explained, HolderInfo, Scored
from kvatlas.scorer.scoring.walk import Fleet, Pod, Scene, tier_name
from kvatlas.streams.index.holders import holders


def explain(
    scored: Scored,
    keys: Sequence[bytes],
    values: Sequence[bytes | None],
    scene: Scene,
    pods: Collection[str],
    *,
    usable_only: bool,
) -> Explained:
    """Return a scored prompt block by block.

    Args:
        scored: the answer.
        keys: the prompt's block keys.
        values: packed holders of each; None where the index did not answer.
        scene: pods, model and weights of the walk.
        pods: pod ids that were allowed; empty for all.
        usable_only: whether the walk left out the last token's block.
    """
    blocks = [
        BlockInfo(number=number, key=key.hex(), holders=_holders(value or b"", scene.fleet))
        for number, (key, value) in enumerate(zip(keys, values, strict=True))
    ]
    named = {holder.pod for block in blocks for holder in block.holders} | scored.scores.keys()
    ends = {
        pod.name: _end(pod, blocks, values, scene, scored, usable_only=usable_only)
        for pod in scene.fleet.pods
        if pod.name in named and (not pods or pod.name in pods)
    }
    return Explained(scored=scored, blocks=blocks, ends=ends)


def _holders(value: bytes, fleet: Fleet) -> list[HolderInfo]:
    found = []
    for holder in holders(value):
        pod = fleet.by_ref.get(holder.pod_ref)
        if pod is not None:
            named = [(pod.name, pod.validity.state(holder.tier, holder.epoch))]
        elif holder.pod_ref in fleet.by_store:
            named = [(mounts.name, "live") for mounts in fleet.by_store[holder.pod_ref]]
        else:
            named = [(f"{holder.pod_ref:016x}", "unknown-pod")]
        found += [
            HolderInfo(pod=name, tier=tier_name(holder.tier), group=holder.group, epoch=holder.epoch, state=state)
            for name, state in named
        ]
    return found


def _end(
    pod: Pod,
    blocks: Sequence[BlockInfo],
    values: Sequence[bytes | None],
    scene: Scene,
    scored: Scored,
    *,
    usable_only: bool,
) -> str:
    limit = pod.usable_blocks(scored.prompt_tokens, scored.block_size_tokens, whole_prompt=not usable_only)
    for number, value in enumerate(values[:limit]):
        if value is None:
            return f"block {number}: the index did not answer, so the match may be longer"
        cell = scene.cells(value).get(pod.number)
        if pod.windowed_only or (cell is not None and cell.grade is not None):
            continue
        theirs = [holder for holder in blocks[number].holders if holder.pod == pod.name]
        return f"block {number}: {_why_not(pod, theirs)}"
    matched = scored.scores[pod.name].matched_blocks if pod.name in scored.scores else 0
    if pod.windows and matched < limit:
        groups = ", ".join(str(window.group) for window in pod.windows)
        return f"the match ends at block {matched}, the last place where every window (groups {groups}) is filled"
    return f"end of the prompt: all {limit} blocks are held"


def _why_not(pod: Pod, theirs: Sequence[HolderInfo]) -> str:
    if not theirs:
        return "not held on any tier"
    live = [holder for holder in theirs if holder.state != "dead"]
    if not live:
        newest = max(holder.epoch for holder in theirs)
        return f"held only by epoch {newest}, which ended; the pod counts from epoch {pod.valid_from}"
    missing = set(pod.full or ()) - {holder.group for holder in live}
    if missing:
        return f"full-attention group {', '.join(str(group) for group in sorted(missing))} does not hold it"
    return "held, but only where these weights count nothing"
