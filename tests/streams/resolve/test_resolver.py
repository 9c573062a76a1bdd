"""The behaviour of resolve and index together, case by case."""

from __future__ import annotations

import msgspec
import pytest

from kvatlas.bridge.model import epochs, pod_ids, records
from kvatlas.bridge.model.block_key import block_keys, encode_extra, multimodal_extra, pack_tokens, root_key
from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.streams.index.holders import holders

GPU, CPU, DISK, SHARED, UNKNOWN = (int(tier) for tier in (Tier.GPU, Tier.CPU, Tier.DISK, Tier.SHARED, Tier.UNKNOWN))


# --- tiers, pods and groups ------------------------------------------------------------------------------------------


def test_an_unknown_medium_is_its_own_tier(world, make):
    """A medium that nobody knows is kept as unknown, never as the GPU."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16, medium="TAPE"))
    assert w.where("p", w.keys(make.run(1, 16))[0]) == {(UNKNOWN, 0)}


def test_any_number_of_pods_holds_a_block(world, make):
    """64 pods x 4 groups x 2 tiers on one prompt are all kept."""
    w = world()
    key = w.keys(make.run(1, 16))[0]
    for number in range(64):
        for group in range(4):
            for medium in ("GPU", "CPU"):
                w.send(f"p{number}", make.stored([1], make.run(1, 16), 16, medium=medium, group_idx=group))
    assert len(w.holders(key)) == 64 * 4 * 2
    assert len({holder.pod_ref for holder in w.holders(key)}) == 64
    assert list(holders(w.value(key))) == sorted(holders(w.value(key)))


def test_a_tier_is_added_by_placeholders_and_leaves_alone(world, make):
    """An offload event without tokens adds its tier; each tier goes by its own removal; the last takes the mapping."""
    w = world()
    keys = w.keys(make.run(1, 64))
    hashes = [700, 701, 702, 703]
    w.send("p", make.stored(hashes, make.run(1, 64), 16))
    w.send("p", make.stored(hashes, [], 0, medium="CPU"))
    assert all(w.where("p", key) == {(GPU, 0), (CPU, 0)} for key in keys)
    w.send("p", make.removed(hashes))
    assert all(w.where("p", key) == {(CPU, 0)} for key in keys)
    assert all(w.resolves("p", name) for name in hashes)
    w.send("p", make.removed(hashes, "CPU"))
    assert not any(w.value(key) for key in keys)
    assert not any(w.resolves("p", name) for name in hashes)


def test_unknown_hashes_have_no_effect_but_are_counted(world, make):
    """Placeholders and removals of unknown hashes change nothing."""
    w = world()
    w.send("p", make.stored([1, 2], [], 0, medium="CPU"), make.removed([3, 4, 5]))
    assert w.counts["placeholders_unknown"] == 2
    assert w.counts["removals_unknown"] == 3
    assert not w.updates
    assert not w.dead


def test_groups_are_held_apart(world, make):
    """Removing a group, or a tier, leaves the others of the same hashes."""
    w = world()
    key = w.keys(make.run(1, 16))[0]
    w.send("p", make.stored([1], make.run(1, 16), 16, group_idx=0), make.stored([1], make.run(1, 16), 16, group_idx=1))
    w.send("p", make.stored([1], [], 0, medium="CPU"))
    w.send("p", make.removed([1], group_idx=0))
    assert w.where("p", key) == {(CPU, 0), (GPU, 1)}
    w.send("p", make.removed([1], "CPU"))
    assert w.where("p", key) == {(GPU, 1)}


def test_a_groups_kind_and_window_reach_the_index_and_the_pod(world, make):
    """Holders and the pod's record say what attention a group does."""
    w = world()
    kind = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 128}
    w.send("p", make.stored([1], make.run(1, 16), 16, group_idx=2, **kind))
    (holder,) = w.holders(w.keys(make.run(1, 16))[0])
    assert (holder.group, holder.kind, holder.window_tokens) == (2, Kind.SLIDING_WINDOW, 128)
    assert w.pods["p"].groups == {2: records.GroupSpec(int(Kind.SLIDING_WINDOW), 128, 16)}


def test_an_offload_event_takes_the_groups_kind_from_the_gpu(world, make):
    """Offload events do not say the kind; the group's own events do."""
    w = world()
    kind = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 64}
    w.send("p", make.stored([1], make.run(1, 16), 16, **kind), make.stored([1], [], 0, medium="CPU"))
    assert {(h.tier, h.kind, h.window_tokens) for h in w.holders(w.keys(make.run(1, 16))[0])} == {
        (GPU, Kind.SLIDING_WINDOW, 64),
        (CPU, Kind.SLIDING_WINDOW, 64),
    }


def test_pods_that_share_a_hash_do_not_touch_each_other(world, make):
    """Two models on two pods use one engine hash: one pod's removal leaves the other's block."""
    w = world()
    w.send("a", make.stored([9], make.run(1, 16), 16), model="one")
    w.send("b", make.stored([9], make.run(1, 16), 16), model="two")
    one, two = (block_keys(root_key(name), pack_tokens(make.run(1, 16)), 16)[0] for name in ("one", "two"))
    w.send("a", make.removed([9]), model="one")
    assert not w.where("a", one)
    assert w.where("b", two) == {(GPU, 0)}


def test_a_shared_block_is_the_stores_and_outlives_the_pods_epoch(world, make):
    """A shared block's holder is the store; a clear leaves it, and its removal still finds it."""
    w = world()
    key = w.keys(make.run(1, 16))[0]
    w.send("p", make.stored([1], make.run(1, 16), 16, medium="SHARED_STORAGE"))
    (holder,) = w.holders(key)
    assert (holder.pod_ref, holder.tier, holder.epoch) == (pod_ids.store_ref("default"), SHARED, 0)
    assert w.pods["p"].store == "default"
    w.send("p", make.cleared)
    assert len(w.holders(key)) == 1
    w.send("p", make.removed([1], "SHARED_STORAGE"))
    assert not w.holders(key)


def test_a_pods_store_is_named_by_the_bridge(world, make):
    """A header names the store; pods of different stores do not share blocks."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16, medium="OBJ"), store="bucket")
    assert [h.pod_ref for h in w.holders(w.keys(make.run(1, 16))[0])] == [pod_ids.store_ref("bucket")]
    assert w.pods["p"].store == "bucket"


# --- chains ----------------------------------------------------------------------------------------------------------


def test_children_chain_from_their_parents(world, make):
    """Blocks of later events go on from the parent's key, also over messages."""
    w = world()
    w.send("p", make.stored([1, 2], make.run(1, 32), 16))
    w.send("p", make.stored([3], make.run(33, 48), 16, parent=2))
    assert all(w.held("p", w.keys(make.run(1, 48))))


def test_lora_and_salt_are_in_the_root_and_children_inherit_them(world, make):
    """The same tokens under an adapter or a salt are other blocks; a child needs neither again."""
    w = world()
    salted = {"extra_keys": [["pepper"]]}
    w.send("p", make.stored([1], make.run(1, 16), 16, **salted), make.stored([2], make.run(17, 32), 16, parent=1))
    lora = {"lora_name": "sql", "lora_id": 3, "extra_keys": [["sql"]]}
    w.send("p", make.stored([3], make.run(1, 16), 16, **lora))
    w.send("p", make.stored([4], make.run(17, 32), 16, parent=3, **lora))
    tokens = make.run(1, 32)
    assert all(w.held("p", w.keys(tokens, salt="pepper")))
    assert all(w.held("p", w.keys(tokens, lora="sql")))
    assert not any(w.held("p", w.keys(tokens)))


def test_the_adapters_of_a_pod_are_told_by_name(world, make):
    """The pod's record names the adapters that its events named, each once and within bounds."""
    w = world()
    for number, name in enumerate(["sql", "sql", "poet", "x" * 2000]):
        run = make.run(1 + 16 * number, 16 + 16 * number)
        w.send("p", make.stored([number + 1], run, 16, lora_name=name, lora_id=3, extra_keys=[[name]]))
    assert w.pods["p"].adapters == ["sql", "poet"]


def test_an_orphan_waits_for_its_parent(world, make):
    """A child of an unknown parent is parked, counted, and keyed once the parent is stored; never as a root."""
    w = world()
    w.send("p", make.stored([3, 4], make.run(33, 64), 16, parent=2))
    assert w.state("p").orphans == 2
    assert w.counts["orphans_parked"] == 2
    assert not w.updates
    w.send("p", make.stored([1, 2], make.run(1, 32), 16))
    assert all(w.held("p", w.keys(make.run(1, 64))))
    assert w.state("p").orphans == 0
    assert not any(key[8:9] == b"\x03" for key in w.engine.values)


def test_a_child_may_come_before_its_parent_in_one_batch(world, make):
    """Self-describing offload events are not in chain order."""
    w = world()
    events = [
        make.stored([n], make.run(16 * n - 15, 16 * n), 16, parent=n - 1 or None, medium="CPU") for n in (3, 2, 1)
    ]
    w.send("p", *events)
    assert all(w.where("p", key) == {(CPU, 0)} for key in w.keys(make.run(1, 48)))
    assert w.state("p").orphans == 0


def test_an_orphan_that_is_removed_does_not_come_back(world, make):
    """A parked block is removed like any other; its parent then finds only what is left."""
    w = world()
    w.send("p", make.stored([2], make.run(17, 32), 16, parent=1), make.stored([2], [], 0, medium="CPU"))
    w.send("p", make.removed([2]))
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.where("p", w.keys(make.run(1, 32))[1]) == {(CPU, 0)}
    w.send("p", make.stored([5, 6], make.run(49, 80), 16, parent=4), make.removed([5, 6]))
    assert w.state("p").orphans == 0
    w.send("p", make.stored([4], make.run(1, 16), 16))
    assert len([key for key in w.engine.values if key[8:9] == b"\x03"]) == 0


@pytest.mark.parametrize("end", ["clear", "restart"])
def test_orphans_end_with_their_epoch(world, make, end):
    """A parent of the new epoch does not bring back a child of the old one."""
    w = world()
    w.send("p", make.stored([2], make.run(17, 32), 16, parent=1))
    if end == "clear":
        w.send("p", make.cleared)
    else:
        w.control("p", "restart")
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.held("p", w.keys(make.run(1, 32))) == [True, False]
    assert w.state("p").orphans == 0
    assert w.counts["orphans_dropped"] == 1


def test_orphans_are_bounded_and_the_oldest_go_first(world, make):
    """Beyond the bound those that have waited longest make room, counted; the newest find their parents."""
    w = world(orphan_blocks=3)
    w.send("p", make.stored([92, 93, 94, 95], make.run(901, 964), 16, parent=91))
    w.send("p", make.stored([2, 3], make.run(17, 48), 16, parent=1))
    assert w.state("p").orphans == 3
    assert w.counts["orphans_evicted"] == 3
    assert not w.dead
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.held("p", w.keys(make.run(1, 48))) == [True, True, True]
    assert w.state("p").orphans == 1
    w.send("p", make.stored([4], make.run(49, 64), 16, parent=3), make.removed([95]))
    assert w.state("p").orphans == 0
    assert not [key for key in w.engine.values if key[8:9] in (b"\x03", b"\x04")]


def test_a_known_block_needs_no_parent(world, make):
    """A block announced again is known by its own key, also when its parent has gone."""
    w = world()
    w.send("p", make.stored([1, 2], make.run(1, 32), 16), make.removed([1]))
    w.send("p", make.stored([2, 3], make.run(17, 48), 16, parent=1, medium="CPU"))
    keys = w.keys(make.run(1, 48))
    assert [w.where("p", key) for key in keys] == [set(), {(GPU, 0), (CPU, 0)}, {(CPU, 0)}]


# --- masked blocks ---------------------------------------------------------------------------------------------------


def test_masked_blocks_get_no_key_from_their_tokens(world, make):
    """When tokens and hashes do not line up nothing is keyed, and neither are the children."""
    w = world()
    w.send("p", make.stored([5], make.run(1, 48), 16), make.stored([6], make.run(49, 64), 16, parent=5))
    assert not w.updates
    assert w.counts["masked"] == 2
    assert w.state("p").orphans == 0
    w.send("p", make.removed([5, 6]))
    assert w.counts["removals_unknown"] == 0


@pytest.mark.parametrize("full_first", [True, False])
def test_masked_blocks_are_known_by_another_group_of_the_same_size(world, make, full_first):
    """Engines hash tokens, not groups: the full group's block tells what the window group's hash stands for."""
    w = world()
    full = make.stored([1, 2, 3], make.run(1, 48), 16, group_idx=1, kv_cache_spec_kind="full_attention")
    window = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 16}
    masked = make.stored([3], make.run(1, 48), 16, group_idx=0, **window)
    w.send("p", *([full, masked] if full_first else [masked, full]))
    keys = w.keys(make.run(1, 64))
    assert [w.where("p", key) for key in keys] == [{(GPU, 1)}, {(GPU, 1)}, {(GPU, 0), (GPU, 1)}, set()]
    w.send("p", make.stored([4], make.run(49, 64), 16, parent=3, group_idx=0, **window))
    assert w.where("p", keys[3]) == {(GPU, 0)}


# --- announcement counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("announcements", "stays"), [("copies", True), ("presence", False)])
def test_a_copy_is_removed_alone_when_copies_are_announced(world, make, announcements, stays):
    """Stored twice, removed once: still there by copies, gone by presence."""
    w = world(announcements=announcements)
    for _ in range(2):
        w.send("p", make.stored([1], make.run(1, 16), 16))
    w.send("p", make.removed([1]))
    assert w.held("p", w.keys(make.run(1, 16))) == [stays]
    w.send("p", make.removed([1]))
    assert w.held("p", w.keys(make.run(1, 16))) == [False]


def test_a_pods_header_wins_over_the_deployments_announcements(world, make):
    """The header says how one engine announces."""
    w = world()
    for _ in range(3):
        w.send("p", make.stored([1], make.run(1, 16), 16), announcements="presence")
    w.send("p", make.removed([1]), announcements="presence")
    assert w.held("p", w.keys(make.run(1, 16))) == [False]


def test_a_repeated_sequence_does_not_count_twice(world, make):
    """A replayed duplicate is no second copy."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16), sequence=0)
    w.send("p", make.stored([1], make.run(1, 16), 16), sequence=0, source="replay")
    w.send("p", make.removed([1]), sequence=1)
    assert w.held("p", w.keys(make.run(1, 16))) == [False]
    assert w.counts["messages_repeated"] == 1


def test_many_copies_count_exactly(world, make):
    """Ten copies need ten removals, within messages and across."""
    w = world()
    event = make.stored([1], make.run(1, 16), 16)
    w.send("p", *[event] * 7)
    w.send("p", *[event] * 3, *[make.removed([1])] * 4)
    w.send("p", *[make.removed([1])] * 5)
    assert w.held("p", w.keys(make.run(1, 16))) == [True]
    w.send("p", make.removed([1]))
    assert w.held("p", w.keys(make.run(1, 16))) == [False]


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_a_clear_ends_every_tier_and_group_of_one_pod(world, make):
    """After a clear only other pods' entries exist, in O(1); what is stored again is there again."""
    w = world(clears="all")
    key = w.keys(make.run(1, 16))[0]
    for pod in ("p", "q"):
        w.send(pod, make.stored([1], make.run(1, 16), 16), make.stored([1], make.run(1, 16), 16, group_idx=1))
        w.send(pod, make.stored([1], [], 0, medium="CPU"))
    updates = w.index_counts["updates"]
    w.send("p", make.cleared)
    assert w.urgent
    assert w.index_counts["updates"] == updates
    assert w.where("p", key) == set()
    assert w.where("q", key) == {(GPU, 0), (GPU, 1), (CPU, 0)}
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.where("p", key) == {(GPU, 0)}


def test_an_update_of_before_a_clear_may_be_applied_after_it(world, make):
    """Late records of an ended epoch bring nothing back."""
    w = world()
    keys = w.keys(make.run(1, 64))
    w.send("p", make.stored([1, 2, 3, 4], make.run(1, 64), 16), deliver=False)
    late = w.resolve(w.log)
    w.send("p", make.cleared)
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.apply(late)
    assert w.held("p", keys) == [True, False, False, False]


def test_a_clear_may_be_narrowed_to_the_gpu(world, make):
    """With clears set to gpu, the other tiers stay and go on to count."""
    w = world(clears="gpu")
    key = w.keys(make.run(1, 16))[0]
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.send("p", *[make.stored([1], [], 0, medium="CPU")] * 2, make.cleared)
    assert w.where("p", key) == {(CPU, 0)}
    w.send("p", make.removed([1], "CPU"))
    assert w.where("p", key) == {(CPU, 0)}
    w.send("p", make.stored([2], make.run(17, 32), 16, parent=1), make.removed([1], "CPU"))
    assert w.where("p", key) == set()
    assert w.where("p", w.keys(make.run(1, 32))[1]) == {(GPU, 0)}


def test_a_gap_makes_older_blocks_suspect_until_stored_again(world, make):
    """After an unrepaired gap older blocks exist as suspects; stored again they are not; children still resolve."""
    w = world()
    keys = w.keys(make.run(1, 48))
    w.send("p", make.stored([1, 2], make.run(1, 32), 16))
    w.control("p", "gap", lost=(1, 4))
    assert w.urgent
    assert w.held("p", keys) == [True, True, False]
    assert [w.suspect("p", key) for key in keys] == [True, True, False]
    w.send("p", make.stored([1], make.run(1, 16), 16), make.stored([3], make.run(33, 48), 16, parent=2))
    assert w.held("p", keys) == [True, True, True]
    assert [w.suspect("p", key) for key in keys] == [False, True, False]
    assert (w.pods["p"].first_lost, w.pods["p"].last_lost, w.pods["p"].lost) == (1, 4, 4)


def test_strict_gaps_end_the_epoch(world, make):
    """With strict gaps nothing of before the gap exists."""
    w = world(strict_gaps=True)
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.control("p", "gap", lost=(1, 1))
    assert w.held("p", w.keys(make.run(1, 16))) == [False]


def test_a_gap_ends_the_count_of_copies(world, make):
    """After a gap a removal takes the block whatever was announced before; a store begins a new count."""
    w = world()
    keys = w.keys(make.run(1, 32))
    event = make.stored([1, 2], make.run(1, 32), 16)
    w.send("p", event, event, event)
    w.control("p", "gap", lost=(1, 1))
    w.send("p", make.removed([1]), make.stored([1, 2], make.run(1, 32), 16), make.removed([2]))
    assert w.held("p", keys) == [True, False]


def test_a_hole_within_an_incarnation_is_a_gap(world, make):
    """Sequences that skip without a control record make older blocks suspect."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16), sequence=0)
    w.send("p", make.stored([2], make.run(17, 32), 16, parent=1), sequence=3)
    keys = w.keys(make.run(1, 32))
    assert [w.suspect("p", key) for key in keys] == [True, False]
    assert w.held("p", keys) == [True, True]
    assert (w.counts["holes"], w.pods["p"].lost) == (1, 2)


@pytest.mark.parametrize("kind", ["restart", "gone", "start"])
def test_a_new_incarnation_ends_everything_before_it(world, make, kind):
    """Nothing stored before a restart or a removal exists, even when its messages or updates come late."""
    w = world()
    keys = w.keys(make.run(1, 48))
    w.send("p", make.stored([1], make.run(1, 16), 16), sequence=0)
    w.send("p", make.stored([2], make.run(17, 32), 16, parent=1), sequence=1, deliver=False)
    late = w.log[-1]
    early = list(w.updates)
    w.control("p", kind)
    w.deliver([late])
    w.apply(early)
    assert w.held("p", keys) == [False, False, False]
    assert w.counts["messages_late"] == 1
    assert w.pods["p"].state == ("gone" if kind == "gone" else "live")
    w.send("p", make.stored([1], make.run(1, 16), 16), sequence=0)
    assert w.held("p", keys) == [True, False, False]
    assert w.pods["p"].state == "live"


def test_a_new_incarnation_without_its_control_record_counts_as_a_restart(world, make):
    """The header alone raises the epoch: what is not known is not trusted."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16), incarnation=5)
    w.send("p", make.stored([2], make.run(17, 32), 16), sequence=0, incarnation=6)
    assert w.held("p", w.keys(make.run(1, 16))) == [False]
    assert epochs.incarnation_of(w.pods["p"].epoch) == 6


def test_a_repeated_control_record_changes_nothing(world, make):
    """An incarnation begins once."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.control("p", "restart")
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.deliver([entry for entry in w.log if entry[2][0][0] == "content_type"])
    assert w.held("p", w.keys(make.run(1, 16))) == [True]
    assert w.counts["controls_late"] == 1


# --- block sizes -----------------------------------------------------------------------------------------------------


def test_small_engine_blocks_share_a_canonical_block(world, make):
    """C = 64, E = 16: four hashes stand for one key; without one of them the key is gone."""
    w = world(block_size_tokens=64)
    keys = w.keys(make.run(1, 128))
    w.send("p", make.stored(range(100, 108), make.run(1, 128), 16))
    assert w.held("p", keys) == [True, True]
    w.send("p", make.removed([100]))
    assert w.held("p", keys) == [False, True]
    assert not w.resolves("p", 100)
    w.send("p", make.stored([100], make.run(1, 16), 16))
    assert w.held("p", keys) == [True, True]


def test_large_engine_blocks_cover_several_keys(world, make):
    """C = 64, E = 128: each hash stands for two keys, and a child goes on from the second."""
    w = world(block_size_tokens=64)
    keys = w.keys(make.run(1, 256))
    w.send("p", make.stored([200], make.run(1, 128), 128))
    w.send("p", make.stored([201], make.run(129, 256), 128, parent=200))
    assert all(w.held("p", keys))
    w.send("p", make.removed([200]))
    assert w.held("p", keys) == [False, False, True, True]


def test_less_than_a_canonical_block_is_not_indexed_yet(world, make):
    """48 tokens at C = 64 have no key."""
    w = world(block_size_tokens=64)
    w.send("p", make.stored([1, 2, 3], make.run(1, 48), 16))
    assert not w.updates


@pytest.mark.parametrize("missing", [100, 101, 102, 103])
def test_partials_of_many_events_make_a_block(world, make, missing):
    """Four events of one engine block each complete the key; any removal takes it, storing that one brings it back."""
    w = world(block_size_tokens=64)
    (key,) = w.keys(make.run(1, 64))
    events = {
        100 + n: make.stored([100 + n], make.run(16 * n + 1, 16 * n + 16), 16, parent=99 + n if n else None)
        for n in range(4)
    }
    for number, event in enumerate(events.values()):
        assert not w.where("p", key), number
        w.send("p", event)
    assert w.where("p", key) == {(GPU, 0)}
    w.send("p", make.removed([missing]))
    assert not w.where("p", key)
    w.send("p", events[missing])
    assert w.where("p", key) == {(GPU, 0)}


def test_a_partial_block_is_complete_per_tier(world, make):
    """A tier holds a canonical block when it holds every member."""
    w = world(block_size_tokens=32)
    (key,) = w.keys(make.run(1, 32))
    w.send("p", make.stored([1, 2], make.run(1, 32), 16), make.stored([1], [], 0, medium="CPU"))
    assert w.where("p", key) == {(GPU, 0)}
    w.send("p", make.stored([2], [], 0, medium="CPU"))
    assert w.where("p", key) == {(GPU, 0), (CPU, 0)}


def test_continuations_share_their_first_members(world, make):
    """Two prompts that part inside a canonical block: the shared member takes both keys with it."""
    w = world(block_size_tokens=32)
    one, two = w.keys(make.run(1, 32)), w.keys([*make.run(1, 16), *make.run(101, 116)])
    w.send("p", make.stored([1, 2], make.run(1, 32), 16), make.stored([3], make.run(101, 116), 16, parent=1))
    assert w.held("p", [*one, *two]) == [True, True]
    w.send("p", make.removed([1]))
    assert w.held("p", [*one, *two]) == [False, False]
    w.send("p", make.removed([2]), make.stored([1], make.run(1, 16), 16))
    assert w.held("p", [*one, *two]) == [False, True]


def test_pods_of_different_block_sizes_meet_under_the_same_keys(world, make):
    """The same 128 tokens as 8 hashes from one pod and as 4 from another: both hold both keys."""
    w = world(block_size_tokens=64)
    w.send("a", make.stored(range(8), make.run(1, 128), 16))
    w.send("b", make.stored(range(50, 54), make.run(1, 128), 32))
    for key in w.keys(make.run(1, 128)):
        assert w.where("a", key) == w.where("b", key) == {(GPU, 0)}


def test_only_full_canonical_blocks_have_keys(world, make):
    """300 tokens at C = 256 are one key, 512 are two."""
    w = world(block_size_tokens=256)
    assert [len(w.keys(make.run(1, n))) for n in (300, 512)] == [1, 2]
    w.send("p", make.stored(range(1, 76), make.run(1, 300), 4))
    assert w.index_counts["updates"] == 1


def test_a_partial_goes_on_after_a_gap_as_its_oldest_member(world, make):
    """A canonical block is suspect while one member is."""
    w = world(block_size_tokens=32)
    (key,) = w.keys(make.run(1, 32))
    w.send("p", make.stored([1, 2], make.run(1, 32), 16))
    w.control("p", "gap", lost=(1, 1))
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.suspect("p", key)
    w.send("p", make.stored([2], make.run(17, 32), 16, parent=1))
    assert w.held("p", [key]) == [True]
    assert not w.suspect("p", key)


def test_orphans_of_small_blocks_find_their_place(world, make):
    """Parked partial blocks complete their canonical block once the chain is whole."""
    w = world(block_size_tokens=64)
    w.send("p", make.stored([2, 3, 4], make.run(17, 64), 16, parent=1))
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.held("p", w.keys(make.run(1, 64))) == [True]


# --- two engine keys for one block key -------------------------------------------------------------------------------


def test_a_block_stays_while_one_of_two_engine_keys_lives(world, make):
    """Hashes that look ahead name one block twice; each removal takes its own."""
    w = world()
    tokens = make.run(1, 16)
    (key,) = w.keys(tokens)
    w.send("p", make.stored([1], tokens, 16, lookahead_token_ids=[[70]]))
    w.send("p", make.stored([2], tokens, 16, lookahead_token_ids=[[80]]))
    w.send("p", make.removed([1]))
    assert w.held("p", [key]) == [True]
    w.send("p", make.removed([2]))
    assert w.held("p", [key]) == [False]
    assert not [name for name in w.engine.values if name[8:9] == b"\x02"]


def test_owners_of_different_epochs_are_told_apart(world, make):
    """When the newer of two owners goes, the block is as old as the other."""
    w = world()
    w.send("p", make.stored([8], make.run(900, 907), 8))  # sizes vary, so owners are kept
    tokens = make.run(1, 16)
    (key,) = w.keys(tokens)
    w.send("p", make.stored([1], tokens, 16), make.stored([2], tokens, 16))
    w.control("p", "gap", lost=(2, 2))
    w.send("p", make.stored([2], tokens, 16))
    assert not w.suspect("p", key)
    w.send("p", make.removed([2]))
    assert w.held("p", [key]) == [True]
    assert w.suspect("p", key)


def test_blocks_of_varying_size_are_owned_apart(world, make):
    """A partial block's event beside the full one: the block stays until both are gone, once sizes vary."""
    w = world()
    (key, *_) = w.keys(make.run(1, 32))
    w.send("p", make.stored([8], make.run(900, 907), 8), make.stored([1], make.run(1, 16), 16))
    w.send("p", make.stored([2, 3], make.run(1, 16), 8))
    w.send("p", make.removed([3]))
    assert w.held("p", [key]) == [True]
    w.send("p", make.removed([1]))
    assert w.held("p", [key]) == [False]


def test_a_key_used_again_for_other_tokens_is_believed_anew(world, make):
    """An engine that names other tokens by a known hash: the old block is gone, the new one is there."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.send("p", make.stored([1], make.run(101, 116), 16))
    assert w.held("p", [*w.keys(make.run(1, 16)), *w.keys(make.run(101, 116))]) == [False, True]
    assert w.counts["contradictions"] == 1


# --- extra keys ------------------------------------------------------------------------------------------------------


def _mm(w, tokens, items):
    size = w.options.block_size_tokens
    extra = multimodal_extra(items, size, len(tokens) // size)
    return block_keys(root_key("demo"), pack_tokens(tokens), size, extra)


@pytest.mark.parametrize("canonical", [8, 16, 32, 48])
def test_multimodal_items_reach_the_same_keys_at_any_block_size(world, make, canonical):
    """Offsets on the wire are the engine block's, offsets in keys the canonical block's."""
    w = world(block_size_tokens=canonical)
    tokens = make.run(1, 96)
    items = [("aa" * 32, 10, 38), ("bb" * 32, 50, 30)]  # to 48 and 80: ends of engine blocks
    extra = []
    for number in range(6):
        touching = [(name, at) for name, at, n in items if at < 16 * number + 16 and at + n > 16 * number]
        extra.append([[name, at - 16 * number] for name, at in touching] or None)
    w.send("p", make.stored(range(1, 7), tokens, 16, extra_keys=extra))
    assert all(w.held("p", _mm(w, tokens, items)))
    assert not any(w.held("p", w.keys(tokens)[-1:]))


def test_an_item_behind_a_block_that_looks_ahead_is_not_in_its_key(world, make):
    """An engine that hashes ahead lists items that begin after the block."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16, extra_keys=[[["cc" * 32, 16]]], lookahead_token_ids=[[5]]))
    assert w.held("p", w.keys(make.run(1, 16))) == [True]


def test_other_extra_keys_are_kept_verbatim(world, make):
    """Two requests that differ in a digest never share a key."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16, extra_keys=[[b"\x01" * 32]]))
    extra = {0: encode_extra([("raw", b"\x01" * 32)])}
    assert w.held("p", block_keys(root_key("demo"), pack_tokens(make.run(1, 16)), 16, extra)) == [True]
    assert w.held("p", w.keys(make.run(1, 16))) == [False]


# --- what cannot be used ---------------------------------------------------------------------------------------------


def test_a_bad_event_does_not_take_its_batch(world, make):
    """Each rejected event goes to the dead letters alone, with its bytes and the reason."""
    w = world()
    bad = make.stored([7], make.run(1, 16), 16, group_idx=-1)
    far = make.stored([8], make.run(1, 16), 16, extra_keys=[[["dd" * 32, 1 << 60]]])
    w.send("p", bad, {"type": "Nonsense"}, far, make.stored([1], make.run(1, 16), 16))
    assert w.held("p", w.keys(make.run(1, 16))) == [True]
    assert len(w.dead) == 3
    assert msgspec.msgpack.decode(w.dead[0].raw) == bad
    assert "group_idx is -1" in w.dead[0].reason
    assert "out of range" in w.dead[2].reason
    assert not w.resolves("p", 8)


@pytest.mark.parametrize(
    ("payload", "headers", "reason"),
    [
        (b"\xff\x00garbage", {}, "not an event batch"),
        (b"\x93\x00\x90\xc0", {"engine": "abacus"}, "no adapter"),
        (b"\x93\x00\x90\xc0", {"content_type": "poetry"}, "not known here"),
        (msgspec.msgpack.encode({"v": 99, "timestamp": 0.0}), {"content_type": "keys"}, "version 99"),
        (b"\x93\x00\x90\xc0", {"receive_ns": "soon"}, "receive_ns"),
    ],
)
def test_a_message_that_cannot_be_read_is_dead_as_a_whole(world, make, payload, headers, reason):
    """Garbage, unknown engines, types and versions are dead letters and leave the pod's blocks alone."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.raw("p", payload, **headers)
    assert [letter.raw for letter in w.dead] == [payload]
    assert reason in w.dead[0].reason
    assert w.dead[0].pod == "p"
    assert w.held("p", w.keys(make.run(1, 16))) == [True]


@pytest.mark.parametrize("window", [-5, 1 << 40, (1 << 64) - 1])
def test_an_impossible_window_harms_nothing(world, make, window):
    """A window out of range is cut to what a holder can say."""
    w = world()
    more = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": window}
    w.send("p", make.stored([1], make.run(1, 16), 16, **more))
    assert w.held("p", w.keys(make.run(1, 16))) == [True]


def test_garbage_takes_its_sequence_so_that_it_leaves_no_hole(world, make):
    """The message after an unreadable one follows it."""
    w = world()
    w.raw("p", b"garbage")
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.counts["holes"] == 0
    assert w.pods["p"].last_sequence == 1


def test_a_bad_control_record_is_dead(world):
    """Control records of unknown type or version, or with an impossible incarnation, are dead letters."""
    w = world()
    bad = [
        records.encode(records.Control(type="dance", incarnation=3)),
        records.encode(records.Control(v=9, type="gap", incarnation=3)),
        records.encode(records.Control(type="gap", incarnation=1 << 32)),
        records.encode(records.Control(type="gap", incarnation=-3)),
    ]
    w.deliver([(b"p", value, [("content_type", b"control")]) for value in bad])
    assert [letter.raw for letter in w.dead] == bad
    assert not w.engine.values


# --- batches without tokens ------------------------------------------------------------------------------------------


def _keyed(events):
    return records.encode(records.KeyedBatch(timestamp=3.0, events=events))


def test_keyed_batches_mean_what_the_engines_batch_means(world, make):
    """Stripped of its tokens, a batch leaves the same index, and removals and clears work."""
    w = world()
    keys = w.keys(make.run(1, 64))
    names = [n.to_bytes(8, "big") for n in (1, 2)]
    store = records.KeyedStored(
        engine_keys=names,
        parent=None,
        block_keys=b"".join(keys),
        keys_per_block=2,
        tier=int(Tier.CPU),
        group=1,
        kind=int(Kind.FULL),
        window_tokens=0,
        block_size_tokens=32,
    )
    w.raw("p", _keyed([store]), content_type="keys")
    assert all(w.where("p", key) == {(CPU, 1)} for key in keys)
    w.raw("p", _keyed([records.KeyedRemoved(engine_keys=names[:1], tier=CPU, group=1)]), content_type="keys")
    assert w.held("p", keys) == [False, False, True, True]
    w.raw("p", _keyed([records.KeyedCleared(), store]), content_type="keys")
    assert w.held("p", keys) == [True] * 4


def test_a_keyed_event_that_contradicts_itself_is_dead_alone(world, make):
    """Columns that disagree, unknown tiers and groups: the event is dead, its batch goes on."""
    w = world()
    keys = w.keys(make.run(1, 16))
    good = records.KeyedStored(
        engine_keys=[b"a"],
        parent=None,
        block_keys=keys[0],
        keys_per_block=1,
        tier=GPU,
        group=0,
        kind=0,
        window_tokens=0,
        block_size_tokens=16,
    )
    change = msgspec.structs.replace
    bad = [
        change(good, keys_per_block=2),
        change(good, tier=77),
        change(good, group=-3),
        change(good, window_tokens=-1),
    ]
    w.raw("p", _keyed([*bad, good]), content_type="keys")
    assert len(w.dead) == 4
    assert w.held("p", keys) == [True]
