"""Explain: who holds each block of a prompt, and why each pod's match ended where it did. Pure; for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from kvatlas.bridge.model.block_key import partition_of
from kvatlas.bridge.model.events import Tier
from kvatlas.scorer.scoring.answers import BlockInfo, Explained, HolderInfo, Scored
from kvatlas.scorer.scoring.walk import Pod, Scene, stopped_at, tier_name
from kvatlas.streams.index.holders import ASSUMED, Holder, holders

#: States of holders that count for nothing -> what the walk says where there are no others.
_WITHOUT_CREDIT: Final = {
    "dead": "held only by epochs that ended",
    "other-model": "held only in a shared store, for another model",
    "adapters": "held by a cache server whose chunks do not name adapters, while the pod uses some",
    "assumed": "named by its tokens alone, while the pod uses salts or pictures",
}


_AGAIN: Final = "; the engine block before that is computed again, for speculative decoding"


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
            whole = not usable_only
            limit = pod.usable_blocks(scored.prompt_tokens, scored.block_size_tokens, whole_prompt=whole)
            stopped = stopped_at(pod, values, scene, scored.prompt_tokens, whole_prompt=whole)
            end = _end(pod, blocks, scored, stopped, limit=limit, partitioned=partition_count > 0)
            ends[pod.name] = end + _AGAIN if pod.again_blocks else end
    return Explained(scored=scored, blocks=blocks, ends=ends)


def _infos(holder: Holder, scene: Scene) -> list[HolderInfo]:
    fleet, assumed = scene.fleet, bool(holder.kind & ASSUMED)
    pod = fleet.by_ref.get(holder.pod_ref)
    if pod is not None:
        state = pod.validity.state(holder.tier, holder.epoch)
        named = [(pod.name, "assumed" if assumed and pod.named and state != "dead" else state)]
    elif (server := fleet.servers.get(holder.pod_ref)) is not None:
        state = server.own.validity.state(holder.tier, holder.epoch)
        named = [(pod.name, _of_server(pod, scene, state)) for pod in server.serves]
    elif holder.tier == Tier.SHARED and holder.pod_ref in fleet.by_store:
        mounts = fleet.by_store[holder.pod_ref]
        named = [(pod.name, _in_store(pod, scene, assumed=assumed)) for pod in mounts]
    elif holder.pod_ref in fleet.gone:
        named = [(fleet.gone[holder.pod_ref], "dead")]
    else:
        named = [(f"{holder.pod_ref:016x}", "unknown-pod")]
    return [
        HolderInfo(pod=name, tier=tier_name(holder.tier), group=holder.group, epoch=holder.epoch, state=state)
        for name, state in named
    ]


def _of_server(pod: Pod, scene: Scene, state: str) -> str:
    if not scene.reads(pod):
        return "other-model"
    return "adapters" if pod.adapted and state != "dead" else state


def _in_store(pod: Pod, scene: Scene, *, assumed: bool) -> str:
    if not scene.reads(pod):
        return "other-model"
    return "assumed" if assumed and pod.named else "live"


def _end(
    pod: Pod, blocks: Sequence[BlockInfo], scored: Scored, stopped: int | None, *, limit: int, partitioned: bool
) -> str:
    matched = scored.scores[pod.name].matched_blocks if pod.name in scored.scores else 0
    if stopped is not None:
        block = blocks[stopped]
        if not block.answered:
            silent = f"partition {block.partition}" if partitioned else "the index"
            return f"block {stopped}: {silent} did not answer, so the match may be longer"
        theirs = [holder for holder in block.holders if holder.pod == pod.name]
        return f"block {stopped}: {_why_not(pod, theirs)}"
    if pod.windows and matched < limit - pod.again_blocks:
        groups = ", ".join(str(window.group) for window in pod.windows)
        return f"the match ends at block {matched}, the last place where every window (groups {groups}) is filled"
    return f"end of the prompt: all {limit} blocks that count are held"


def _why_not(pod: Pod, theirs: Sequence[HolderInfo]) -> str:
    if not theirs:
        return "not held on any tier"
    there = [holder for holder in theirs if holder.state not in _WITHOUT_CREDIT]
    if not there:
        dead = [holder.epoch for holder in theirs if holder.state == "dead"]
        if not dead:
            return _WITHOUT_CREDIT[theirs[0].state]
        newest = max(dead)
        bound = min((each for each in pod.validity[:3] if each > newest), default=pod.valid_from)
        return f"held only by epoch {newest}, which ended; the pod counts from epoch {bound}"
    held = {holder.group for holder in there}
    missing = set() if any(holder.state == "speculative" for holder in there) else set(pod.full or ()) - held
    if missing:
        return f"full-attention group {', '.join(str(group) for group in sorted(missing))} does not hold it"
    if all(holder.tier in ("gpu", "speculative") for holder in there):
        return "held on the GPU, behind blocks that are not; from there on engines look in the offload tiers alone"
    return "held, but on tiers or epochs that this strategy gives no weight"
