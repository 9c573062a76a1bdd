"""From matches to the messages of ``scorer.proto``: scores, freshness, pods. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.lookups.router import STANDBY, Seen
from kvatlas.scorer.scoring.strategies import Strategy
from kvatlas.scorer.scoring.walk import Match
from kvatlas.scorer.v1 import scorer_pb2 as pb


def fill_scores(response: pb.ScoreResponse, matches: Sequence[Match], strategy: Strategy, blocks: int) -> None:
    """Put the matches in; what is zero stays unset."""
    scores = response.scores
    for match in matches:
        entry = scores[match.pod.name]
        entry.score = strategy.score(match, blocks)
        entry.matched_blocks = match.blocks
        entry.matched_tokens = match.tokens
        for name, count in match.tiers.items():
            entry.tiers[name] = count
        if match.suspect:
            entry.suspect_blocks = match.suspect
        if match.speculative:
            entry.speculative_blocks = match.speculative
        if match.pod.approximate:
            entry.approximate = True


def fill_freshness(
    freshness: pb.Freshness,
    matches: Sequence[Match],
    seen: Mapping[int, Seen],
    pods: Mapping[str, PodRecord],
    now_ns: int,
) -> None:
    """Put in what the answer is based on: the partitions that were asked, and the pods that matched."""
    for number, state in sorted(seen.items()):
        freshness.partitions.add(
            partition=number,
            applied_offset=state.applied_offset,
            applied_receive_ns=state.applied_receive_ns,
            role=state.role,
            worker=state.worker,
        )
        if state.role == STANDBY:
            freshness.standby = True
    for match in matches:
        record = pods.get(match.pod.name)
        if record is not None:
            entry = freshness.pods[match.pod.name]
            entry.last_sequence = record.last_sequence
            entry.age_ms = age_ms(record, now_ns)
            entry.state = record.state
            entry.epoch = record.epoch


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
        approximate=record.approximate,
    )


def age_ms(record: PodRecord, now_ns: int) -> float:
    """Return the age of a pod's last known message in ms; -1 before the first."""
    return max(now_ns - record.receive_ns, 0) / 1e6 if record.receive_ns else -1.0
