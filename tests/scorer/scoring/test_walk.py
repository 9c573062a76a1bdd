"""Tests of the walk, case by case and against a naive one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.bridge.model.block_key import block_keys, multimodal_extra, pack_tokens, root_key
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.pod_ids import pod_ref, store_ref
from kvatlas.bridge.model.records import GroupSpec, PodRecord
from kvatlas.scorer.scoring.walk import SPECULATIVE, Fleet, Walk, Weights, walk
from kvatlas.streams.index.holders import ASSUMED, add_holder, holders, pack_holder

SIZE = 16


def pod(name: str, **fields: object) -> PodRecord:
    return PodRecord(pod=name, writer="streams", model="m", block_size_tokens=SIZE, **fields)  # type: ignore[arg-type]


def value(*held: tuple[str, int, int, int, int]) -> bytes:
    """Build a value of (pod or store, tier, group, kind, epoch)."""
    found = b""
    for name, tier, group, kind, epoch in held:
        ref = store_ref(name) if tier == Tier.SHARED else pod_ref(name)
        found = add_holder(found, pack_holder(ref, group, tier, kind, 0, epoch))
    return found


def on(name: str, tier: int = Tier.GPU, group: int = 0, epoch: int = 0) -> tuple[str, int, int, int, int]:
    return (name, tier, group, Kind.FULL, epoch)


def scores(values, records, weights=None, tokens=None, **options):
    scene = Fleet(records, SIZE).scene("m", weights or Weights())
    length = tokens or len(values) * SIZE
    matches, partial = walk(values, scene, length, whole_prompt=options.pop("whole_prompt", True), **options)
    return {m.pod.name: pytest.approx(m.score) for m in matches}, partial, {m.pod.name: m for m in matches}


def test_prefix_ends_at_the_first_missing_block_and_takes_the_best_tier():
    """The walk stops at a hole and a block counts by its best tier."""
    ks = [value(on("a")), value(on("a")), value(on("a"), on("a", Tier.CPU)), value(on("b", Tier.CPU))]
    ks += [value(on("b", Tier.CPU)), value(on("a"))]
    assert scores(ks, [pod("a"), pod("b")], Weights(cpu=0.5))[0] == {"a": 3.0}
    ks[2] = value(on("a", Tier.CPU))
    assert scores(ks, [pod("a"), pod("b")], Weights(cpu=0.5))[0] == {"a": 2.5}


def test_default_weights_filter_and_empty_answers():
    """Default weights hold, a filter restricts, nothing held or nothing asked is an empty answer."""
    assert scores([value(on("a")), value(on("a", Tier.CPU))], [pod("a")])[0] == {"a": 1.8}
    ks = [value(on("a"), on("b")), value(on("a")), value(on("a"), on("b"))]
    records = [pod("a"), pod("b")]
    assert scores(ks, records)[0] == {"a": 3.0, "b": 1.0}
    assert scores(ks, records, pods=["a"])[0] == {"a": 3.0}
    assert scores([b"", b""], records)[0] == {}
    assert scores([], records, tokens=3)[0] == {}


def test_unknown_medium_scores_a_tenth():
    """A tier nobody knows never scores like a GPU."""
    assert scores([value(on("a", Tier.UNKNOWN))], [pod("a")])[0] == {"a": 0.1}


def test_no_cap_on_pods_per_block():
    """64 pods, 4 groups and 2 tiers on one prompt give 64 scores."""
    names = [f"p{n}" for n in range(64)]
    one = value(*(on(name, tier, group) for name in names for group in range(4) for tier in (1, 2)))
    groups = {group: GroupSpec(kind=Kind.FULL, block_size_tokens=SIZE) for group in range(4)}
    found, _, _ = scores([one] * 5, [pod(name, groups=groups) for name in names])
    assert found == dict.fromkeys(names, 5.0)


def test_suspect_blocks_weigh_half_until_stored_again_and_nothing_with_strict_gaps():
    """After a gap older blocks score half and say so; a new store scores in full; strict gaps end the match."""
    old, new = epoch_of(5), epoch_of(6)
    record = pod("a", epoch=new, valid_from=old, suspect_before=new)
    ks = [value(on("a", epoch=new)), value(on("a", epoch=old)), value(on("a", epoch=old))]
    found, _, matches = scores(ks, [record])
    assert found == {"a": 2.0}
    assert matches["a"].suspect == 2
    assert scores(ks, [record], Weights(suspect_factor=0.0))[0] == {"a": 1.0}


def test_what_only_a_decision_said_ends_with_its_epoch_also_when_a_gap_raised_it():
    """A gap leaves blocks that events showed, at half weight; a speculative holder of the epoch before is gone."""
    old, new = epoch_of(5), epoch_of(6)
    seen, decided = value(on("a", epoch=old)), value(on("a", SPECULATIVE, epoch=old))
    assert scores([seen, decided], [pod("a", epoch=old)])[0] == {"a": 1.9}
    assert scores([seen, decided], [pod("a", epoch=new, suspect_before=new)])[0] == {"a": 0.5}
    assert scores([seen, decided], [pod("a", epoch=new, valid_from=new)])[0] == {}


def test_nothing_of_an_ended_epoch_scores():
    """Blocks stored before a restart do not exist, also when a later block is new."""
    record = pod("a", epoch=epoch_of(9), valid_from=epoch_of(9))
    ks = [value(on("a", epoch=epoch_of(8))), value(on("a", epoch=epoch_of(9)))]
    assert scores(ks, [record])[0] == {}


def test_a_clear_narrowed_to_the_gpu_keeps_other_tiers():
    """With gpu_valid_from raised only the GPU's entries are gone."""
    record = pod("a", epoch=2, valid_from=1, gpu_valid_from=2)
    held = value(on("a", epoch=1), on("a", Tier.CPU, epoch=1))
    assert scores([held, held], [record])[0] == {"a": 1.6}


def test_a_shared_block_counts_for_every_pod_that_mounts_the_store():
    """A shared block is a candidate for all pods of its store and model, and for no other."""
    records = [
        pod("a", store="s"),
        pod("b", store="s"),
        pod("c"),
        PodRecord(pod="d", writer="streams", model="x", store="s"),
    ]
    held = value(on("s", Tier.SHARED))
    both = add_holder(held, value(on("a")))
    assert scores([both, held], records)[0] == {"a": 1.4, "b": 0.8}


def test_the_last_token_is_left_out_only_when_asked_for():
    """Of L tokens engines reuse floor((L - 1) / E) blocks; every held block counts unless only usable ones do."""
    ks = [value(on("a"))] * 4
    assert scores(ks, [pod("a")])[0] == {"a": 4.0}
    assert scores(ks, [pod("a")], whole_prompt=False)[0] == {"a": 3.0}
    assert scores(ks, [pod("a")], tokens=65, whole_prompt=False)[0] == {"a": 4.0}


def test_a_sliding_window_needs_only_its_window():
    """Blocks before the window may be gone from the windowed group, not from the full one."""
    groups = {0: GroupSpec(Kind.FULL, 0, SIZE), 1: GroupSpec(Kind.SLIDING_WINDOW, 33, SIZE)}
    full = value(on("a"))
    both = value(on("a"), on("a", group=1))
    record = pod("a", groups=groups)
    assert scores([full, full, full, both, both], [record])[0] == {"a": 5.0}
    assert scores([both, full, full, full, both], [record])[0] == {"a": 1.0}
    assert scores([both, both, value(on("a", group=1)), both], [record])[0] == {"a": 2.0}


def test_mamba_needs_the_last_block_alone_and_cross_attention_none():
    """A state group decides where a match may end; a cross-attention group decides nothing."""
    groups = {0: GroupSpec(Kind.FULL, 0, SIZE), 1: GroupSpec(Kind.MAMBA, 0, SIZE), 2: GroupSpec(Kind.CROSS, 0, SIZE)}
    full, both = value(on("a")), value(on("a"), on("a", group=1))
    assert scores([full, both, full, full], [pod("a", groups=groups)])[0] == {"a": 2.0}


def test_an_unanswered_block_ends_the_match_and_flags_it():
    """A block without an answer is not one that nobody holds: the score is partial."""
    found, partial, _ = scores([value(on("a")), None, value(on("a"))], [pod("a")])
    assert (found, partial) == ({"a": 1.0}, True)
    found, partial, _ = scores([value(on("a")), b"", None], [pod("a")])
    assert (found, partial) == ({"a": 1.0}, False)


def test_placeholders_of_images_touch_only_their_blocks():
    """Images at [0,32) and [48,80) mark blocks 0, 1, 3, 4; an image in block 2 leaves keys 0 and 1 alone."""
    extra = multimodal_extra([("A", 0, 32), ("B", 48, 32)], SIZE, 5)
    assert sorted(extra) == [0, 1, 3, 4]
    packed = pack_tokens(range(64))
    plain = block_keys(root_key("m"), packed, SIZE)
    image = block_keys(root_key("m"), packed, SIZE, multimodal_extra([("A", 32, 16)], SIZE, 4))
    assert [a == b for a, b in zip(plain, image, strict=True)] == [True, True, False, False]


NAMES = ("a", "b", "c")
HELD = st.sets(
    st.tuples(st.sampled_from(NAMES), st.sampled_from([1, 2, 3]), st.sampled_from([0, 1]), st.integers(0, 3))
)
WINDOW = st.sampled_from([0, 1, 17, 33, 64])


def naive(values: list[bytes | None], record: PodRecord, tokens: int, weights: Weights) -> tuple[int, float]:
    """Walk one pod block by block, trying every match length from the longest."""

    def grade(raw: bytes | None, group: int, tiers: tuple[int, ...] = (1, 2, 3)) -> float | None:
        best = None
        for h in holders(raw or b""):
            if h.pod_ref != pod_ref(record.pod) or h.group != group or h.epoch < record.valid_from:
                continue
            if h.tier not in tiers:
                continue
            worth = weights.of(h.tier) * (weights.suspect_factor if h.epoch < record.suspect_before else 1)
            best = worth if best is None else max(best, worth)
        return best

    window = record.groups[1].window_tokens
    full = (0,) if window else (0, 1)
    gpu = 0  # the prefix that the GPU holds
    while gpu < len(values) and all(grade(values[gpu], group, (1,)) is not None for group in full):
        gpu += 1
    for match in range(min(len(values), tokens // SIZE), 0, -1):
        each = [
            [grade(v, group, (1, 2, 3) if number < gpu else (2, 3)) for group in full]
            for number, v in enumerate(values[:match])
        ]
        if any(None in grades for grades in each):
            continue
        if window:
            need = min(math.ceil((window - 1) / SIZE), match)
            if any(grade(v, 1) is None for v in values[match - need : match]):
                continue
        return match, sum(min(grades) for grades in each)  # type: ignore[type-var]
    return 0, 0.0


@settings(max_examples=300, deadline=None)
@given(
    blocks=st.lists(HELD, max_size=10),
    repeat=st.lists(st.integers(1, 4), min_size=10, max_size=10),
    windows=st.lists(WINDOW, min_size=3, max_size=3),
    valid=st.integers(0, 2),
    cuts=st.lists(st.integers(1, 9), min_size=40, max_size=40),
)
def test_the_walk_equals_a_naive_one_however_it_is_cut(blocks, repeat, windows, valid, cuts):
    """Matches and scores equal those of a per-pod search, fed whole or in any pieces with an early end."""
    values: list[bytes | None] = []
    for held, times in zip(blocks, repeat, strict=False):
        values += [value(*(on(n, t, g, e) for n, t, g, e in sorted(held)))] * times
    records = [
        pod(
            name,
            valid_from=valid,
            suspect_before=2,
            groups={0: GroupSpec(Kind.FULL, 0, SIZE), 1: GroupSpec(Kind.SLIDING_WINDOW, window, SIZE)},
        )
        for name, window in zip(NAMES, windows, strict=True)
    ]
    tokens = len(values) * SIZE
    expected = {r.pod: naive(values, r, tokens, Weights()) for r in records}
    scene = Fleet(records, SIZE).scene("m", Weights())
    steps = Walk(scene, tokens, whole_prompt=True)
    at = 0
    for cut in cuts:
        if at >= len(values) or not steps.feed(values[at : at + cut]):
            break
        at += cut
    for matches in (walk(values, scene, tokens, whole_prompt=True)[0], steps.matches()):
        got = {m.pod.name: (m.blocks, m.score) for m in matches}
        assert got == {n: (b, pytest.approx(s)) for n, (b, s) in expected.items() if b}


def test_equal_neighbours_are_worked_out_once():
    """512 blocks that the same 8 pods hold are one run: the walk works per run of equal values, not per block."""
    scene = Fleet([pod(f"p{n}") for n in range(8)], SIZE).scene("m", Weights())
    values = [value(*(on(f"p{n}") for n in range(8)))] * 512
    steps = Walk(scene, 8192, whole_prompt=True)
    runs, run = [], steps._run

    def counted(one, blocks):
        runs.append(blocks)
        return run(one, blocks)

    steps._run = counted
    assert not steps.feed(values)
    assert [m.blocks for m in steps.matches()] == [512] * 8
    assert (runs, len(scene._memo)) == ([512], 1)


def test_offload_tiers_count_from_where_the_gpu_prefix_ends():
    """The GPU's prefix comes first; behind it a block that is on the GPU alone is a gap."""
    gpu, cpu, both = value(on("a")), value(on("a", Tier.CPU)), value(on("a"), on("a", Tier.CPU))
    assert scores([gpu, cpu, gpu, cpu], [pod("a")])[2]["a"].blocks == 2
    assert scores([cpu, both, cpu, gpu], [pod("a")])[2]["a"].blocks == 3
    assert scores([both, both, gpu, cpu], [pod("a")])[2]["a"].tiers == {"gpu": 3, "cpu": 1}
    shared = value(on("s", Tier.SHARED))
    assert scores([gpu, cpu, shared, gpu], [pod("a", store="s")])[2]["a"].tiers == {"gpu": 1, "cpu": 1, "shared": 1}


def test_offload_tiers_count_in_whole_chunks():
    """A chunk is loaded whole or not at all, counted from the prompt's start; its last block names it."""
    gpu, cpu, both = value(on("a")), value(on("a", Tier.CPU)), value(on("a"), on("a", Tier.CPU))
    chunked = [pod("a", chunk_tokens=4 * SIZE)]
    assert scores([cpu] * 7, chunked)[2]["a"].blocks == 4
    assert scores([b"", b"", b"", cpu, b"", b"", b"", cpu, cpu], chunked)[2]["a"].blocks == 8
    assert scores([gpu, gpu, gpu, both, gpu, b"", b"", cpu, cpu], chunked)[2]["a"].tiers == {"gpu": 5, "cpu": 3}
    assert scores([gpu, gpu, cpu], chunked)[2]["a"].blocks == 2
    assert scores([b"", b"", cpu, b""], chunked)[0] == {}
    assert scores([b"", b"", b"", gpu, cpu, cpu, cpu, cpu], chunked)[0] == {}


def test_the_last_block_of_an_engine_block_stands_for_it():
    """Another engine block with the same beginning may have taken that one's holder with it when it went."""
    big = [pod("a", groups={0: GroupSpec(Kind.FULL, 0, 2 * SIZE)})]
    gpu, cpu = value(on("a")), value(on("a", Tier.CPU))
    assert scores([b"", gpu, cpu, gpu, gpu], big)[2]["a"].blocks == 4
    assert scores([gpu, b"", gpu, gpu], big)[0] == {}


def test_a_block_named_by_its_tokens_alone_counts_until_salts_are_in_use():
    """Once a pod is known to name blocks otherwise too, what tokens alone named may be anybody's."""
    guess = value(("a", Tier.CPU, 0, Kind.FULL | ASSUMED, 0))
    assert scores([guess], [pod("a")])[2]["a"].blocks == 1
    assert scores([guess], [pod("a", named=True)])[0] == {}


def test_a_cache_of_pairs_has_one_unit_less_than_tokens():
    """The last token of a prompt begins no pair, and the engine computes one more for itself."""
    held = [value(on("a"))] * 2
    assert scores(held, [pod("a", pairs=True)], tokens=32)[2]["a"].blocks == 1
    assert scores(held, [pod("a", pairs=True)], tokens=33)[2]["a"].blocks == 2
    assert scores(held, [pod("a", pairs=True)], tokens=33, whole_prompt=False)[2]["a"].blocks == 1
    assert scores(held, [pod("a", pairs=True)], tokens=34, whole_prompt=False)[2]["a"].blocks == 2


GROUP = st.one_of(
    st.just(GroupSpec(Kind.FULL, 0, SIZE)),
    st.just(GroupSpec(Kind.MAMBA, 0, SIZE)),
    st.just(GroupSpec(Kind.CROSS, 0, SIZE)),
    st.sampled_from([1, 17, 33, 64]).map(lambda window: GroupSpec(Kind.SLIDING_WINDOW, window, SIZE)),
    st.sampled_from([32, 48, 40]).map(lambda chunk: GroupSpec(Kind.CHUNKED_LOCAL, chunk, SIZE)),
)
KINDS = ("a", "b")


def needed(spec: GroupSpec, match: int, step: int) -> range:
    """Return the blocks that a group must hold for a match of so many; of an engine block the last stands for all."""
    if spec.kind == Kind.CROSS:
        return range(0)
    if spec.kind == Kind.MAMBA:
        return range(match - 1, match)
    if spec.kind == Kind.SLIDING_WINDOW:
        return range(max(match - math.ceil((spec.window_tokens - 1) / SIZE), 0), match)
    if spec.kind == Kind.CHUNKED_LOCAL:
        return range(match * SIZE // spec.window_tokens * spec.window_tokens // SIZE, match)
    return range(step - 1, match, step)


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.lists(st.sets(st.tuples(st.sampled_from(KINDS), st.sampled_from([0, 1, 2]))), max_size=12),
    repeat=st.lists(st.integers(1, 3), min_size=12, max_size=12),
    groups=st.lists(st.lists(GROUP, min_size=1, max_size=3), min_size=2, max_size=2),
    engine=st.sampled_from([SIZE, 2 * SIZE]),
    silent=st.none() | st.integers(0, 20),
    usable=st.booleans(),
    cuts=st.lists(st.integers(1, 5), min_size=40, max_size=40),
)
def test_every_kind_of_group_matches_as_far_as_a_search_says(blocks, repeat, groups, engine, silent, usable, cuts):
    """The match is the longest that all groups allow, whole or cut with an early end; less only where it is flagged."""
    values: list[bytes | None] = []
    for held, times in zip(blocks, repeat, strict=False):
        values += [value(*(on(name, group=group) for name, group in sorted(held)))] * times
    records = [
        PodRecord(pod=name, writer="streams", model="m", block_size_tokens=engine, groups=dict(enumerate(specs)))
        for name, specs in zip(KINDS, groups, strict=True)
    ]
    tokens = len(values) * SIZE
    limit = max(tokens - 1, 0) // engine * engine // SIZE if usable else len(values)
    expected = {}
    for record in records:
        if all(spec.kind == Kind.CROSS for spec in record.groups.values()):
            continue  # nothing is known of such a pod's blocks: any group counts
        held = {
            (n, g)
            for n, v in enumerate(values)
            for h in holders(v or b"")
            for g in [h.group]
            if h.pod_ref == pod_ref(record.pod)
        }
        for match in range(limit // (engine // SIZE) * (engine // SIZE), 0, -(engine // SIZE)):
            if all((n, g) in held for g, spec in record.groups.items() for n in needed(spec, match, engine // SIZE)):
                expected[record.pod] = match
                break
    scene = Fleet(records, SIZE).scene("m", Weights())
    if silent is not None and silent < len(values):
        values[silent] = None
    steps = Walk(scene, tokens, whole_prompt=not usable)
    at = 0
    for cut in cuts:
        if at >= len(values) or not steps.feed(values[at : at + cut]):
            break
        at += cut
    matches, partial = walk(values, scene, tokens, whole_prompt=not usable)
    assert partial == steps.partial
    for found in (matches, steps.matches()):
        got = {m.pod.name: m.blocks for m in found if m.pod.name in expected or m.pod.full is not None}
        if partial:
            assert all(blocks <= expected.get(name, 0) for name, blocks in got.items())
        else:
            assert got == expected
