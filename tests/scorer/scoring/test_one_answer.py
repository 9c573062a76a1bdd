"""Scorer, Explain, `at` and `why` give one answer on fleets of every kind: what a search by the rule finds."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.pod_ids import pod_ref, store_ref
from kvatlas.bridge.model.records import DecisionRecord, PodRecord, encode
from kvatlas.bridge.model.validity import SPECULATIVE
from kvatlas.deploy.history import ask
from kvatlas.deploy.history.verdict import leading
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.lookups.index import Index
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.answers import Explained
from kvatlas.scorer.scoring.scorer import Chunks, ScoringRun
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.streams.index.holders import ASSUMED, Holder, holders
from kvatlas.streams.resolve.resolver import ResolveOptions
from tests.scorer.fleets import MODEL, NOW_NS, PARTITIONS, SIZE, RandomFleet, TableLookup, decided


def scorer_over(fleet: RandomFleet) -> Core:
    """A service's core over a fleet, with its decisions open."""
    pods = PodTable()
    for record in fleet.pods:
        pods.apply(f"streams|{record.pod}".encode(), encode(record))
    core = Core(
        ScorerSettings(name="one"),
        Index(pods, TableLookup(fleet), lambda: SIZE, lambda: PARTITIONS),
        chunks=Chunks(3, 16_384),
        clock_ns=lambda: NOW_NS,
    )
    for made in fleet.decisions:
        core.decisions.put(made, NOW_NS)
    return core


def past_of(fleet: RandomFleet) -> Any:
    """The same fleet as a state that was rebuilt from the log, with what was decided in it."""
    return SimpleNamespace(
        blocks=decided(fleet),
        options=ResolveOptions(block_size_tokens=SIZE),
        pods=lambda: {record.pod: record for record in fleet.pods},
        offsets={},
    )


def request_of(fleet: RandomFleet, **fields: Any) -> pb.ScoreRequest:
    return pb.ScoreRequest(model=MODEL, tokens=fleet.tokens, cache_salt=fleet.salt, **fields)


async def scored_by(fleet: RandomFleet, **fields: Any) -> ScoringRun:
    return await scorer_over(fleet).run(request_of(fleet, **fields), all_blocks=True)


# --- the rule, searched ----------------------------------------------------------------


def _groups_of(record: PodRecord, holder: Holder) -> set[int] | None:
    """Groups in which a holder holds its block for a pod; None for every one."""
    if holder.kind & ASSUMED and record.named:
        return set()
    if holder.pod_ref == pod_ref(record.pod):
        if not record.validity.counts(holder.tier, holder.epoch):
            return set()
        return None if holder.tier == SPECULATIVE else {holder.group}
    if holder.tier == Tier.SHARED and record.store and holder.pod_ref == store_ref(record.store):
        return {holder.group} if record.model in ("", MODEL) else set()
    return set()


def _holds(record: PodRecord, value: bytes, group: int | None, *, gpu: bool | None = None) -> bool:
    """Whether a pod holds a block in a group (None: in any): on the GPU, behind it, or anywhere."""
    for holder in holders(value):
        if gpu is not None and (holder.tier in (Tier.GPU, SPECULATIVE)) != gpu:
            continue
        held = _groups_of(record, holder)
        if group is None and held != set() and holder.kind & ~ASSUMED != Kind.CROSS:
            return True
        if group is not None and (held is None or group in held):
            return True
    return False


def _needed(record: PodRecord, group: int, match: int, found: int) -> range:
    """Blocks that a group must hold for a match that is found by ``found`` blocks, the last of which may not count."""
    spec = record.groups[group]
    if spec.kind == Kind.MAMBA:
        return range(max(match - 1, 0), match)
    if spec.kind == Kind.SLIDING_WINDOW:
        return range(max(match - math.ceil((spec.window_tokens - 1) / SIZE), 0), found)
    return range(match * SIZE // spec.window_tokens * spec.window_tokens // SIZE, found)


def _reach(record: PodRecord, values: list[bytes], full: list[int | None], step: int) -> int:
    """Blocks that full attention finds: the GPU's prefix, then whole chunks of the tiers behind it."""
    on_gpu = 0
    while on_gpu + step <= len(values) and all(
        _holds(record, values[on_gpu + step - 1], group, gpu=True) for group in full
    ):
        on_gpu += step
    chunk = math.lcm(step, (record.chunk_tokens or SIZE) // SIZE)
    reach, end = on_gpu, (on_gpu // chunk + 1) * chunk
    while end <= len(values) and all(_holds(record, values[end - 1], group, gpu=False) for group in full):
        reach, end = end, end + chunk
    return reach


def searched(fleet: RandomFleet, record: PodRecord, *, usable_only: bool) -> int:
    """Longest match of a pod, found by trying every length from the longest."""
    values = [decided(fleet).get(key, b"") for key in fleet.keys]
    counted = [group for group, spec in record.groups.items() if spec.kind != Kind.CROSS]
    windows = [group for group in counted if record.groups[group].kind != Kind.FULL]
    full: list[int | None] = [group for group in counted if group not in windows] if counted else [None]
    sizes = {record.block_size_tokens or SIZE, *(record.groups[group].block_size_tokens for group in counted)}
    align = math.lcm(*sizes)
    tokens = len(fleet.tokens)
    limit = (max(tokens - 1, 0) // align * align if usable_only else tokens) // SIZE
    step = max(1, align // SIZE)
    reach = _reach(record, values, full, step) if full else len(values)
    again = step if record.computes_again else 0
    for found in range(min(limit, reach) // step * step, 0, -step):
        match = found - again
        if all(_holds(record, values[n], group) for group in windows for n in _needed(record, group, match, found)):
            return match
    return 0


@settings(max_examples=250, deadline=None)
@given(dice=st.randoms(use_true_random=False), usable_only=st.booleans())
def test_matches_are_what_a_search_by_the_rule_finds(dice: random.Random, usable_only: bool) -> None:
    """Groups, windows, stores, guesses, clears and gaps: each pod's match is the longest that the rule allows."""
    fleet = RandomFleet(dice, silent=False).speculating(dice)
    run = run_now(scored_by(fleet, usable_only=usable_only))
    expected = {
        record.pod: found
        for record in fleet.pods
        if record.state != "gone" and (found := searched(fleet, record, usable_only=usable_only))
    }
    assert {pod: found.matched_blocks for pod, found in run.scored.scores.items()} == expected


def run_now(work: Any) -> Any:
    """Run what never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


# --- one answer -------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(dice=st.randoms(use_true_random=False))
def test_the_past_scores_as_the_scorer_did(dice: random.Random) -> None:
    """`at score` and `at explain` of the same state give the scorer's scores, holders and reasons."""
    fleet = RandomFleet(dice, silent=False).speculating(dice)
    question = ask.Question(tokens=fleet.tokens, cache_salt=fleet.salt or None)
    live: ScoringRun = run_now(scored_by(fleet))
    then = run_now(ask.score(past_of(fleet), MODEL, question))
    assert then["scores"] == {
        pod: {"score": found.score, "matched_blocks": found.matched_blocks, "matched_tokens": found.matched_tokens}
        for pod, found in live.scored.scores.items()
    }
    told = run_now(ask.explain(past_of(fleet), MODEL, question))
    explained: Explained = live.explained()
    assert told["walks"] == explained.ends
    assert [block["holders"] for block in told["blocks"]] == [
        msgspec.to_builtins(block.holders) for block in explained.blocks
    ]


@settings(max_examples=150, deadline=None)
@given(dice=st.randoms(use_true_random=False))
def test_why_counts_what_the_scorer_counts(dice: random.Random) -> None:
    """For every pod `why` finds the blocks that the scorer matched in the prompt's full blocks."""
    fleet = RandomFleet(dice, silent=False).speculating(dice)
    fleet.tokens = fleet.tokens[: len(fleet.keys) * SIZE]
    decision = DecisionRecord(request_id="r", pod="a", model=MODEL, keys=b"".join(fleet.keys), block_size_tokens=SIZE)
    live: ScoringRun = run_now(scored_by(fleet))
    held = run_now(leading(past_of(fleet), decision))
    assert {pod: blocks for pod, blocks in held.items() if blocks} == {
        pod: found.matched_blocks for pod, found in live.scored.scores.items()
    }


@settings(max_examples=250, deadline=None)
@given(dice=st.randoms(use_true_random=False), usable_only=st.booleans())
def test_explain_gives_the_reason_of_the_match_that_was_scored(dice: random.Random, usable_only: bool) -> None:
    """A reason names the first block that counts for nothing, or the end; holders are called by the rule."""
    fleet = RandomFleet(dice).speculating(dice)
    run: ScoringRun = run_now(scored_by(fleet, usable_only=usable_only))
    explained = run.explained()
    records = {record.pod: record for record in fleet.pods}
    for block in explained.blocks:
        for holder in block.holders:
            if holder.pod in records and holder.tier not in ("shared", "speculative"):
                tier = int(Tier[holder.tier.upper()])
                record = records[holder.pod]
                state = record.validity.state(tier, holder.epoch)
                assert holder.state in (
                    (state, "assumed") if records[holder.pod].named and state != "dead" else (state,)
                )
    pods = {pod.name: pod for pod in run.view.fleet.pods}
    for name, reason in explained.ends.items():
        matched = run.scored.scores[name].matched_blocks if name in run.scored.scores else 0
        again = pods[name].again_blocks
        assert again == 0 or "computed again" in reason
        step = max(1, pods[name].engine_block_tokens // SIZE)
        if reason.startswith("block "):
            stopped = int(reason.split(":")[0].removeprefix("block "))
            assert matched <= stopped
            assert pods[name].windows or matched + again > stopped - max(step, pods[name].chunk_blocks)
            assert ("did not answer" in reason) == (not explained.blocks[stopped].answered)
        elif reason.startswith("the match ends at block "):
            assert pods[name].windows
            assert matched == int(reason.split(",")[0].rpartition(" ")[2])
        elif again:
            limit = pods[name].usable_blocks(len(fleet.tokens), SIZE, whole_prompt=not usable_only)
            assert matched == max(limit // step * step - again, 0)
        else:
            limit = pods[name].usable_blocks(len(fleet.tokens), SIZE, whole_prompt=not usable_only)
            assert matched == limit // step * step


@pytest.mark.parametrize("silent", [False, True])
def test_fleets_are_of_every_kind(silent: bool) -> None:
    """The fleets that these tests draw have guesses, stores, windows, gaps, clears and matches in them."""
    seen: set[str] = set()
    for seed in range(150):
        fleet = RandomFleet(random.Random(seed), silent=silent)
        run: ScoringRun = run_now(scored_by(fleet))
        seen |= {name for found in run.scored.scores.values() for name in found.tiers}
        seen |= {holder.state for block in run.explained().blocks for holder in block.holders}
        seen |= {"windows" for match in run.matches if match.pod.windows}
        seen |= {"partial"} if run.scored.partial else set()
    wanted = {"gpu", "cpu", "shared", "speculative", "suspect", "dead", "other-model", "unknown-pod", "windows"}
    assert wanted | ({"partial"} if silent else set()) <= seen
