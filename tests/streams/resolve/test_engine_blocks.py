"""Bytes of the engine_blocks table, and its sweep."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import VersionError, WireError
from kvatlas.bridge.model.chain import Tail
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.validity import Validity
from kvatlas.streams.resolve import engine_blocks as eb
from kvatlas.streams.resolve.engine_blocks import Block, Link, Owner, Pending, PodState, WaitingChildren
from kvatlas.streams.resolve.sweep import sweep_engine_blocks

REF = (5).to_bytes(8, "big")
KEY = b"k" * 16
OLD, NEW = epoch_of(1), epoch_of(1, 1)


def test_keys_have_these_bytes():
    """Pod reference, kind, group, then the engine key or block key."""
    assert eb.state_key(REF) == bytes(7) + b"\x05\x00"
    assert eb.block_prefix(REF, 0x0102) == bytes(7) + b"\x05\x01\x01\x02"
    assert eb.owners_prefix(REF, 1) == bytes(7) + b"\x05\x02\x00\x01"
    assert eb.waiting_prefix(REF, 1) == bytes(7) + b"\x05\x03\x00\x01"
    assert len(eb.block_prefix(REF, 1)) == eb.PREFIX_BYTES


def test_a_plain_block_has_these_bytes():
    """Form, tier count, (tier, announcements, epoch) per tier, block keys: 29 bytes on one tier."""
    block = Block({2: (3, 9), 1: (1, 7)}, Link(KEY * 2, [], Tail(KEY)))
    assert eb.encode_block(block) == bytes.fromhex("0102 01 0001 0000000000000007 02 0003 0000000000000009") + KEY * 2
    single = Block({1: (1, 7)}, Link(KEY, [], Tail(KEY)))
    assert eb.encode_block(single) == eb.HEAD.pack(eb.PLAIN, 1, 1, 1, 7) + KEY
    assert len(eb.encode_block(single)) == 29


def test_a_pods_state_has_these_bytes():
    """An array with the version first; these bytes are on disks and in changelogs."""
    value = eb.encode_state(PodState(1, "p", incarnation=2, clears=1, last_sequence=9, valid_from=3))
    assert msgspec.msgpack.decode(value)[:6] == [1, "p", 2, 1, 9, 3]
    assert eb.decode_state(value).epoch == epoch_of(2, 1)


keys = st.binary(min_size=1, max_size=33)
tails = st.builds(
    Tail,
    key=st.just(KEY),
    tokens=st.binary(max_size=8),
    extra=st.lists(st.just(["mm", "x", -3]), max_size=1),
    members=st.lists(keys, max_size=2),
)
links = st.builds(
    Link,
    keys=st.sampled_from([b"", KEY, KEY * 3]),
    members=st.lists(keys, max_size=3),
    tail=st.one_of(st.none(), tails),
    finals=st.lists(keys, max_size=3),
    pending=st.one_of(st.none(), st.builds(Pending, keys, st.binary(max_size=9), st.just([]), st.integers(0, 1 << 63))),
)
tiers = st.dictionaries(st.integers(0, 4), st.tuples(st.integers(1, 65535), st.integers(0, (1 << 64) - 1)))


@given(tiers, links)
def test_a_block_comes_back_as_it_was(held, link):
    """Plain or linked, the same tiers and meaning are read again."""
    value = eb.encode_block(Block(held, link))
    again = eb.decode_block(value)
    assert again.tiers == held
    assert (again.link.keys, again.link.members, again.link.finals) == (link.keys, link.members, link.finals)
    assert again.link.pending == link.pending
    if value[0] == eb.LINKED:
        assert again.link.tail == link.tail
    else:
        assert again.link.tail == Tail(link.keys[-16:])


@given(st.binary(max_size=60))
def test_any_bytes_are_a_block_or_a_wire_error(value):
    """Damage is named, never taken for a block of another shape."""
    with contextlib.suppress(WireError):
        eb.decode_block(value)


def test_unknown_versions_are_named():
    """Forms and versions of a later build are version errors."""
    with pytest.raises(VersionError, match="form 9"):
        eb.decode_block(b"\x09\x00")
    with pytest.raises(VersionError, match="version 4"):
        eb.decode_state(eb.encode_state(PodState(4, "p")))


def _plain(tier, epoch):
    return eb.encode_block(Block({int(tier): (1, epoch)}, Link(KEY, [], Tail(KEY))))


def test_the_sweep_takes_what_ended_and_leaves_the_rest():
    """Dead tiers, blocks, owners and waiting lists go; states, live tiers and other pods' entries stay."""
    prefix, other = eb.block_prefix(REF, 0), eb.block_prefix(bytes(8), 0)
    both = eb.encode_block(Block({int(Tier.GPU): (1, OLD), int(Tier.SHARED): (2, 0)}, Link(KEY, [], Tail(KEY))))
    shared = eb.encode_block(Block({int(Tier.SHARED): (2, 0)}, Link(KEY, [], Tail(KEY))))
    owners = [Owner(1, OLD, b"a"), Owner(1, NEW, b"b")]
    items = [
        (eb.state_key(REF), b"state"),
        (prefix + b"dead", _plain(Tier.GPU, OLD)),
        (prefix + b"live", _plain(Tier.GPU, NEW)),
        (prefix + b"both", both),
        (prefix + b"damaged", b"\x09"),
        (eb.owners_prefix(REF, 0) + KEY, eb.encode_record(owners)),
        (eb.owners_prefix(REF, 1) + KEY, eb.encode_record(owners[:1])),
        (eb.waiting_prefix(REF, 0) + b"old", eb.encode_record(WaitingChildren(OLD, [b"c"]))),
        (eb.waiting_prefix(REF, 0) + b"new", eb.encode_record(WaitingChildren(NEW, [b"c"]))),
        (other + b"x", _plain(Tier.GPU, OLD)),
    ]
    swept = sweep_engine_blocks(items, {5: Validity(NEW)})
    assert swept.puts == {
        prefix + b"both": shared,
        eb.owners_prefix(REF, 0) + KEY: eb.encode_record(owners[1:]),
    }
    assert swept.deletes == [
        prefix + b"dead",
        eb.owners_prefix(REF, 1) + KEY,
        eb.waiting_prefix(REF, 0) + b"old",
    ]
    assert (swept.seen, swept.dropped) == (9, 5)


def test_the_sweep_of_a_removed_pod_leaves_its_state_alone():
    """What is late of a removed pod must still be known to be late."""
    items = [(eb.state_key(REF), b"state"), (eb.block_prefix(REF, 0) + b"x", _plain(Tier.GPU, 9))]
    assert sweep_engine_blocks(items, {5: Validity(gone=True)}).deletes == [eb.block_prefix(REF, 0) + b"x"]


def test_the_sweep_forgets_a_pod_that_is_gone_for_long():
    """State, parked events and what it knew of shared tiers go; but nothing of a pod that came back since."""
    prefix = eb.block_prefix(REF, 0)
    gone = PodState(eb.SCHEMA_VERSION, "p", incarnation=3, state="gone")
    items = [
        (eb.state_key(REF), eb.encode_state(gone)),
        (prefix + b"shared", _plain(Tier.SHARED, 0)),
        (prefix + b"old", _plain(Tier.GPU, epoch_of(3, 9))),
        (prefix + b"new", _plain(Tier.GPU, epoch_of(4))),
    ]
    swept = sweep_engine_blocks(items, {5: Validity(epoch_of(3))}, forget={5: 3})
    assert swept.deletes == [eb.state_key(REF), prefix + b"shared", prefix + b"old"]
    assert swept.dropped == 3
    for back in (
        PodState(eb.SCHEMA_VERSION, "p", incarnation=4, state="gone"),
        PodState(eb.SCHEMA_VERSION, "p", incarnation=3),
    ):
        kept = sweep_engine_blocks([(eb.state_key(REF), eb.encode_state(back))], {}, forget={5: 3})
        assert kept.deletes == []


def test_the_sweep_keeps_a_removed_member_while_its_epoch_lives(world, make):
    """A member that was removed is remembered for the block it belongs to, until the epoch ends."""
    w = world(block_size_tokens=32)
    w.send("p", make.stored([1, 2], make.run(1, 32), 16), make.removed([1]))

    def sweep():
        state = w.state("p")
        ref = int.from_bytes(next(iter(w.engine.values))[:8], "big")
        swept = sweep_engine_blocks(
            list(w.engine.values.items()), {ref: Validity(state.valid_from, state.gpu_valid_from)}
        )
        for key, value in swept.puts.items():
            w.engine.put(key, value)
        for key in swept.deletes:
            w.engine.delete(key)
        return len(swept.deletes)

    assert sweep() == 0
    w.send("p", make.stored([1], make.run(1, 16), 16))
    assert w.held("p", w.keys(make.run(1, 32))) == [True]
    w.send("p", make.removed([1]), make.cleared)
    assert sweep() == 2
    assert len(w.engine.values) == 1
