"""Scores in the words of ``kvatlas.v1``: what the pure parts return, put into messages."""

from __future__ import annotations

from collections.abc import Mapping

from kvatlas.bridge.block_key import partition_of
from kvatlas.bridge.events import Tier
from kvatlas.bridge.records import GONE, PodRecord, pod_ref, store_ref
from kvatlas.scorer.engine import Engine, Prompt, Scored
from kvatlas.scorer.reader import STANDBY, Seen
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.codec import Holder, holders

_NS_PER_MS = 1_000_000


def age_ms(record: PodRecord, now_ns: int) -> float:
    """Return the age of a pod's last known message in ms; -1 before the first."""
    return (now_ns - record.receive_ns) / _NS_PER_MS if record.receive_ns else -1.0


def response(
    engine: Engine, prompt: Prompt, scored: Scored, now_ns: int, *, tokenize_ms: float = 0.0, tokenizer: str = ""
) -> pb.ScoreResponse:
    """Return the answer to a Score."""
    keys_ms, lookup_ms, score_ms = scored.stages_ms
    answer = pb.ScoreResponse(
        prompt_tokens=prompt.tokens,
        block_size_tokens=engine.block_size_tokens,
        blocks=len(scored.keys),
        stages=pb.StageTimes(tokenize_ms=tokenize_ms, keys_ms=keys_ms, lookup_ms=lookup_ms, score_ms=score_ms),
        tokenizer=tokenizer,
    )
    merged = engine.pods.merged
    for match in scored.matches:
        name = match.pod.name
        found = answer.scores[name]
        found.score = match.score
        found.matched_blocks = match.blocks
        found.matched_tokens = match.tokens
        found.suspect_blocks = match.suspect
        found.speculative_blocks = match.speculative
        found.approximate = match.pod.approximate
        for tier, count in match.tiers.items():
            found.tiers[tier] = count
        record = merged.get(name)
        if record is not None:
            fresh = answer.freshness.pods[name]
            fresh.last_sequence = record.last_sequence
            fresh.age_ms = age_ms(record, now_ns)
            fresh.state = record.state
            fresh.epoch = record.epoch
    _partitions(answer.freshness, scored.partitions, partial=scored.partial)
    return answer


def _partitions(fresh: pb.Freshness, partitions: Mapping[int, Seen], *, partial: bool) -> None:
    fresh.partial = partial
    for number, seen in sorted(partitions.items()):
        fresh.standby = fresh.standby or seen.role == STANDBY
        fresh.partitions.add(
            partition=number,
            applied_offset=seen.applied_offset,
            applied_receive_ns=seen.applied_receive_ns,
            role=seen.role,
            worker=seen.worker,
        )


def explained(
    engine: Engine, prompt: Prompt, scored: Scored, answer: pb.ScoreResponse, partition_count: int
) -> pb.ExplainResponse:
    """Return block by block who holds it, and why each pod's walk ended."""
    merged = engine.pods.merged
    by_ref = {pod_ref(name): record for name, record in merged.items()}
    stores = {store_ref(record.store): record.store for record in merged.values() if record.store}
    found = pb.ExplainResponse(scored=answer)
    for number, (key, value) in enumerate(zip(scored.keys, scored.values, strict=False)):
        block = found.blocks.add(
            number=number,
            key=key.hex(),
            partition=partition_of(key, partition_count) if partition_count else 0,
            answered=value is not None,
        )
        for holder in holders(value or b""):
            record = by_ref.get(holder.pod_ref)
            block.holders.add(
                pod=record.pod if record else stores.get(holder.pod_ref, f"{holder.pod_ref:016x}"),
                tier=tier_name(holder.tier),
                group=holder.group,
                epoch=holder.epoch,
                state=holder_state(holder, record),
            )
    for name, record in sorted(merged.items()):
        if prompt.pods and name not in prompt.pods:
            continue
        matched = answer.scores[name].matched_blocks if name in answer.scores else 0
        found.walks[name].matched_blocks = matched
        found.walks[name].reason = _reason(record, prompt, scored, found, matched)
    return found


def tier_name(tier: int) -> str:
    """Return what people call a tier number."""
    return Tier(tier).name.lower() if tier in Tier.__members__.values() else "unknown"


def holder_state(holder: Holder, record: PodRecord | None) -> str:
    """Return live, suspect, dead, shared or unknown-pod."""
    if record is None:
        return "shared" if holder.tier == Tier.SHARED else "unknown-pod"
    if record.state == GONE or holder.epoch < record.valid_from:
        return "dead"
    if holder.tier == Tier.GPU and holder.epoch < record.gpu_valid_from:
        return "dead"
    return "suspect" if holder.epoch < record.suspect_before else "live"


def _reason(  # noqa: PLR0911 - one return per reason reads best
    record: PodRecord, prompt: Prompt, scored: Scored, found: pb.ExplainResponse, matched: int
) -> str:
    if record.state == GONE:
        return "the pod is gone"
    if matched >= len(scored.keys):
        return "every full block of the prompt matched"
    if matched < len(scored.values) and scored.values[matched] is None:
        return f"block {matched} was not answered by its worker"
    if matched >= len(found.blocks):
        return f"block {matched} was not asked for: no pod was still walking"
    if record.model and record.model != prompt.model:
        return f"the pod serves model {record.model!r}, the request is for {prompt.model!r}"
    states = sorted({holder.state for holder in found.blocks[matched].holders if holder.pod == record.pod})
    if not states:
        return f"the pod does not hold block {matched}"
    if states == ["dead"]:
        return f"the pod held block {matched} in an ended epoch (valid from {record.valid_from})"
    return f"block {matched} is {', '.join(states)}, but another group or window of the model lacks what it needs"


def pod_info(record: PodRecord, now_ns: int) -> pb.PodInfo:
    """Return a pod as ListPods and WatchPods tell of it."""
    return pb.PodInfo(
        pod=record.pod,
        state=record.state,
        model=record.model,
        engine=record.engine,
        endpoint=record.endpoint,
        epoch=record.epoch,
        valid_from=record.valid_from,
        suspect_before=record.suspect_before,
        block_size_tokens=record.block_size_tokens,
        dp_rank=record.dp_rank,
        last_sequence=record.last_sequence,
        age_ms=age_ms(record, now_ns),
        lost=record.lost,
        store=record.store,
        load=record.load,
        approximate=record.approximate,
    )
