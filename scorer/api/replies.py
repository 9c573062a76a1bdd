"""From plain values to the messages of ``scorer.proto``, and back where a request carries more than a query. Pure."""

from __future__ import annotations

from kvatlas.bridge.model.loads import load_age_seconds
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.scoring.answers import Explained, Scored
from kvatlas.scorer.scoring.lookup import STANDBY
from kvatlas.scorer.scoring.pick import LOAD_TERMS, PickQuery, PodChoice
from kvatlas.scorer.scoring.scorer import age_ms
from kvatlas.scorer.v1 import scorer_pb2 as pb


def reply_of(scored: Scored) -> pb.ScoreResponse:
    """Return an answer as the API gives it; what is zero stays unset."""
    response = pb.ScoreResponse(
        prompt_tokens=scored.prompt_tokens,
        block_size_tokens=scored.block_size_tokens,
        blocks=scored.blocks,
        tokenizer=scored.tokenizer,
    )
    _fill_scores(response, scored)
    _fill_freshness(response.freshness, scored)
    stages, took = response.stages, scored.took_ms
    stages.tokenize_ms = took.get("tokenize", 0.0)
    stages.keys_ms = took.get("keys", 0.0)
    stages.lookup_ms = took.get("lookup", 0.0)
    stages.score_ms = took.get("score", 0.0)
    return response


def _fill_scores(response: pb.ScoreResponse, scored: Scored) -> None:
    scores = response.scores
    for pod, found in scored.scores.items():
        entry = scores[pod]
        entry.score = found.score
        entry.matched_blocks = found.matched_blocks
        entry.matched_tokens = found.matched_tokens
        for name, count in found.tiers.items():
            entry.tiers[name] = count
        if found.suspect_blocks:
            entry.suspect_blocks = found.suspect_blocks
        if found.speculative_blocks:
            entry.speculative_blocks = found.speculative_blocks
        if found.approximate:
            entry.approximate = True


def _fill_freshness(freshness: pb.Freshness, scored: Scored) -> None:
    freshness.partial = scored.partial
    add = freshness.partitions.add
    for number, (role, worker, offset, receive_ns) in sorted(scored.partitions.items()):
        add(partition=number, applied_offset=offset, applied_receive_ns=receive_ns, role=role, worker=worker)
        if role == STANDBY:
            freshness.standby = True
    pods = freshness.pods
    for pod, found in scored.freshness.items():
        entry = pods[pod]
        entry.last_sequence = found.last_sequence
        entry.age_ms = found.age_ms
        entry.state = found.state
        entry.epoch = found.epoch
        entry.coverage = found.coverage
        entry.heard_from = found.heard_from


def explained_reply(explained: Explained) -> pb.ExplainResponse:
    """Return an explanation as the API gives it."""
    scored = explained.scored
    response = pb.ExplainResponse(scored=reply_of(scored))
    for block in explained.blocks:
        info = response.blocks.add(
            number=block.number, key=block.key, partition=block.partition, answered=block.answered
        )
        for holder in block.holders:
            info.holders.add(
                pod=holder.pod, tier=holder.tier, group=holder.group, epoch=holder.epoch, state=holder.state
            )
    for pod, reason in explained.ends.items():
        end = response.walks[pod]
        end.matched_blocks = scored.scores[pod].matched_blocks if pod in scored.scores else 0
        end.reason = reason
    return response


def pick_query(request: pb.PickRequest) -> PickQuery:
    """Return what a Pick says beside its prompt."""
    return PickQuery(
        model=request.request.model,
        request_id=request.request.request_id,
        load={pod: {term: getattr(load, term) for term in LOAD_TERMS} for pod, load in request.load.items()},
        weights=dict(request.weights),
        tie_break=request.tie_break,
    )


def pick_reply(choice: PodChoice, scored: Scored) -> pb.PickResponse:
    """Return a choice as the API gives it."""
    response = pb.PickResponse(pod=choice.pod, reason=choice.reason, scored=reply_of(scored))
    for each in choice.candidates:
        response.candidates.add(pod=each.pod, total=each.total, terms=each.terms, matched_tokens=each.matched_tokens)
    return response


def pod_info(record: PodRecord, now_ns: int) -> pb.PodInfo:
    """Return a pod as the API shows it."""
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
        load_age_ms=load_age_seconds(record, now_ns) * 1e3 if record.load else 0.0,
        approximate=record.approximate,
        coverage=record.coverage,
        heard_from=max(record.heard_from, 0),
    )
