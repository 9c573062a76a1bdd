"""Explain: who holds each block of a prompt, and why each pod's walk ended where it did. For people, not for speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvatlas.scorer.scoring.walk import Fleet, Pod, Scene, tier_name
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.holders import Holder, holders

if TYPE_CHECKING:
    from kvatlas.scorer.api.core import Scored


def block_infos(
    keys: Sequence[bytes], values: Sequence[bytes | None], fleet: Fleet, partition: Callable[[bytes], int]
) -> list[pb.BlockInfo]:
    """Return every block with all its holders, also those that do not count."""
    infos = []
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        info = pb.BlockInfo(number=number, key=key.hex(), partition=partition(key), answered=value is not None)
        for holder in holders(value or b""):
            info.holders.extend(_holder_infos(holder, fleet))
        infos.append(info)
    return infos


def _holder_infos(holder: Holder, fleet: Fleet) -> list[pb.HolderInfo]:
    pod = fleet.by_ref.get(holder.pod_ref)
    if pod is not None:
        named = [(pod.name, pod.validity.state(holder.tier, holder.epoch))]
    elif holder.pod_ref in fleet.by_store:
        named = [(mounts.name, "live") for mounts in fleet.by_store[holder.pod_ref]]
    else:
        named = [(f"{holder.pod_ref:016x}", "unknown-pod")]
    return [
        pb.HolderInfo(pod=name, tier=tier_name(holder.tier), group=holder.group, epoch=holder.epoch, state=state)
        for name, state in named
    ]


def walk_ends(
    scored: Scored, scene: Scene, request: pb.ScoreRequest, explained: pb.ExplainResponse
) -> dict[str, tuple[int, str]]:
    """Return matched blocks and the reason of the end per pod: for all pods of the answer or named by a holder."""
    matched = {match.pod.name: match.blocks for match in scored.matches}
    allowed = set(request.pods)
    named = {holder.pod for block in explained.blocks for holder in block.holders}
    ends = {}
    for pod in scene.fleet.pods:
        if (allowed and pod.name not in allowed) or pod.name not in named | matched.keys():
            continue
        blocks = matched.get(pod.name, 0)
        limit = pod.usable_blocks(
            scored.response.prompt_tokens, scene.fleet.block_size_tokens, whole_prompt=not request.usable_only
        )
        ends[pod.name] = (blocks, _reason(pod, scored.values, scene, explained, limit))
    return ends


def _reason(pod: Pod, values: Sequence[bytes | None], scene: Scene, explained: pb.ExplainResponse, limit: int) -> str:
    for number, value in enumerate(values[:limit]):
        if value is None:
            partition = explained.blocks[number].partition
            return f"block {number}: partition {partition} did not answer, so the match may be longer"
        cell = scene.cells(value).get(pod.number)
        if cell is not None and cell.grade is not None:
            continue
        if pod.windowed_only:
            continue
        theirs = [holder for holder in explained.blocks[number].holders if holder.pod == pod.name]
        return f"block {number}: {_why_not(pod, theirs)}"
    if pod.windows:
        return (
            f"all {limit} usable blocks are held; the match ends where every window "
            f"(groups {', '.join(str(window.group) for window in pod.windows)}) is filled"
        )
    return f"end of the prompt: all {limit} blocks that count are held"


def _why_not(pod: Pod, theirs: Sequence[pb.HolderInfo]) -> str:
    if not theirs:
        return "not held on any tier"
    dead = [holder for holder in theirs if holder.state == "dead"]
    if len(dead) == len(theirs):
        newest = max(holder.epoch for holder in dead)
        return f"held only by epoch {newest}, which ended; the pod counts from epoch {pod.valid_from}"
    missing = set(pod.full or ()) - {holder.group for holder in theirs if holder.state != "dead"}
    if missing:
        return f"full-attention group {', '.join(str(group) for group in sorted(missing))} does not hold it"
    return "held, but on tiers or epochs that this strategy gives no weight"
