"""Copies, owners, chunks and contexts: what engines say of blocks beyond stored and removed."""

from __future__ import annotations

import pytest

from kvatlas.bridge.model.events import Tier
from kvatlas.scorer.scoring.walk import Fleet, Weights, walk

CPU, GPU = int(Tier.CPU), int(Tier.GPU)


def matched(w, tokens, **name):
    """Return the tokens that the pod matches."""
    keys = w.keys(tokens, **name)
    scene = Fleet(w.pods.values(), 16).scene("demo", Weights())
    matches, _ = walk([w.value(key) for key in keys], scene, len(tokens), whole_prompt=True)
    return matches[0].tokens if matches else 0


@pytest.mark.parametrize("announcements", ["auto", "copies", "presence"])
def test_a_copy_is_its_owners(world, make, announcements):
    """Removing one owner's copy leaves the others' on the same tier, whatever announcements mean."""
    w = world(announcements=announcements)
    [key] = w.keys(make.run(1, 16))
    w.send("p", make.stored([1], make.run(1, 16), 16))
    w.send("p", make.stored([1], [], 0, medium="CPU"), make.stored([1], [], 0, medium="CPU", ownership="kvcr"))
    w.send("p", make.removed([1], "CPU", ownership="kvcr"))
    assert w.where("p", key) == {(GPU, 0), (CPU, 0)}
    w.send("p", make.stored([1], [], 0, medium="CPU", ownership="kvcr"), make.removed([1], "CPU"))
    assert w.where("p", key) == {(GPU, 0), (CPU, 0)}
    w.send("p", make.removed([1], "CPU", ownership="kvcr"), make.removed([1]))
    assert w.where("p", key) == set()
    assert w.counts["removals_unknown"] == 0


def test_counts_that_an_engine_sends_are_believed(world, make):
    """What is left of a block is what the removal says; where it says nothing, announcements are counted."""
    w = world()
    w.send("p", make.stored([1, 2, 3], make.run(1, 48), 16), make.stored([3], make.run(33, 48), 16, parent=2))
    w.send("p", make.removed([3, 2, 1], remaining_copy_counts=[None, 2, 0]))
    assert w.held("p", w.keys(make.run(1, 48))) == [False, True, True]
    w.send("p", make.removed([3, 2], remaining_copy_counts=[None, 0]))
    assert not any(w.held("p", w.keys(make.run(1, 48))))


def test_a_chain_goes_on_over_tokens_that_were_never_announced(world, make):
    """Tokens since the last announced block name what follows; they themselves are not there."""
    w = world()
    w.send("p", make.stored([1], make.run(1, 16), 16))
    context = {"skipped_parent_block_hash": 1, "skipped_token_ids": make.run(17, 48), "skipped_extra_keys": None}
    w.send("p", make.stored([4, 5], make.run(49, 80), 16, parent=3, **context))
    assert w.held("p", w.keys(make.run(1, 80))) == [True, False, False, True, True]
    assert w.state("p").orphans == 0
    salted = {"skipped_parent_block_hash": None, "skipped_token_ids": make.run(1, 16), "skipped_extra_keys": [["s"]]}
    w.send("p", make.stored([12], make.run(17, 32), 16, parent=11, extra_keys=[None], **salted))
    assert w.held("p", w.keys(make.run(1, 32), salt="s")) == [False, True]
    assert w.held("p", w.keys(make.run(1, 32))) == [True, False]


def test_a_chunk_named_by_its_last_block_needs_to_be_told_how_long_it_is(world, make):
    """With blocks per chunk the whole chunk counts; without, only what the GPU prefix reaches, and the log is told."""
    w = world()
    blocks = make.stored([1, 2, 3, 4, 5, 6, 7, 8], make.run(1, 128), 16)
    chunks = [make.stored([4], [], 0, medium="CPU"), make.stored([8], [], 0, medium="CPU")]
    for pod, options in (("told", {"blocks_per_chunk": "4"}), ("silent", {})):
        w.send(pod, blocks, **options)
        w.send(pod, *chunks, make.removed([8, 7, 6, 5, 4, 3, 2, 1]), **options)
    scene = Fleet(w.pods.values(), 16).scene("demo", Weights())
    for tokens, expected in ((128, 128), (127, 64), (64, 64), (63, 0)):
        values = [w.value(key) for key in w.keys(make.run(1, tokens))]
        found = {match.pod.name: match.tokens for match in walk(values, scene, tokens, whole_prompt=True)[0]}
        assert found == ({"told": expected} if expected else {})
    assert w.counts["placeholders_unsized"] == 2
    assert [pod for pod, _ in w.notices] == ["silent"]


def test_chunks_are_learnt_from_events_that_describe_themselves(world, make):
    """An event per chunk tells how long chunks are; a chunk that a prompt holds in part counts nothing."""
    w = world()
    w.send("p", make.stored([1, 2, 3, 4, 5, 6, 7, 8], make.run(1, 128), 16, extra_keys=[None] * 8))
    cpu = {"medium": "CPU", "group_idx": 0}
    w.send("p", make.stored([5, 6, 7, 8], make.run(65, 128), 16, parent=4, **cpu))
    w.send("p", make.stored([1, 2, 3, 4], make.run(1, 64), 16, **cpu))
    w.send("p", make.removed([8, 7, 6, 5, 4, 3]))
    assert [matched(w, make.run(1, tokens)) for tokens in (128, 112, 64, 48, 32)] == [128, 64, 64, 32, 32]
    w.send("p", make.removed([1, 2, 3, 4], "CPU", group_idx=0))
    assert matched(w, make.run(1, 128)) == 32


def test_a_clear_of_vllm_leaves_the_offload_tiers(world, make):
    """The prefix cache's reset is the GPU's; SGLang's empties host memory too."""
    w = world()
    for pod, engine, medium in (("v", "vllm", "CPU"), ("s", "sglang", "CPU_PINNED")):
        w.send(pod, make.stored([1], make.run(1, 16), 16), engine=engine)
        w.send(pod, make.stored([1], make.run(1, 16), 16, medium=medium), make.cleared, engine=engine)
    [key] = w.keys(make.run(1, 16))
    assert (w.where("v", key), w.where("s", key)) == ({(CPU, 0)}, set())


def test_names_that_a_version_hides_are_said_once(world, make):
    """SGLang holds a block once: announced again, it has a salt or adapter that is not published."""
    w = world()
    for _ in range(2):
        w.send("p", make.stored([1, 2], make.run(1, 32), 16), make.stored([1, 2], make.run(1, 32), 16), engine="sglang")
    assert w.counts["names_hidden"] == 6
    assert len(w.notices) == 1


def test_an_adapter_loaded_anew_has_other_keys_for_the_same_blocks(world, make):
    """What left under the old keys is still there under the new ones."""
    w = world()
    tokens, size = make.run(1, 32), 16
    w.send("p", make.stored([1, 2], tokens, size, lora_name="sql"), engine="sglang")
    w.send("p", make.stored([3, 4], tokens, size, lora_name="sql"), make.removed([1, 2]), engine="sglang")
    assert w.held("p", w.keys(tokens, lora="sql")) == [True, True]
    w.send("p", make.removed([3, 4]), engine="sglang")
    assert w.held("p", w.keys(tokens, lora="sql")) == [False, False]


@pytest.mark.parametrize("page", [1, 4, 8, 32, 64, 128])
def test_pages_of_every_size(world, make, page):
    """A prompt matches whole pages, also those whose beginning another page took along when it left."""
    w = world()
    one, other = make.run(1, 256), [*make.run(1, 128 + 16), *make.run(901, 1012)]
    hashes = {
        id(prompt): [hash(tuple(prompt[: end + page])) & 0xFFFFFFFFFFFF for end in range(0, 256, page)]
        for prompt in (one, other)
    }
    w.send("p", make.stored(hashes[id(one)], one, page), engine="sglang")
    fresh = [key for key in hashes[id(other)] if key not in hashes[id(one)]]
    at = 256 - len(fresh) * page
    parent = hashes[id(other)][at // page - 1] if at else None
    w.send("p", make.stored(fresh, other[at:], page, parent), engine="sglang")
    unit = max(page, 16)
    assert matched(w, one) == matched(w, other) == 256
    own = [key for key in hashes[id(one)] if key not in hashes[id(other)]]
    w.send("p", make.removed(own[::-1]), engine="sglang")
    assert matched(w, other) == 256
    assert matched(w, one) == at // unit * unit
