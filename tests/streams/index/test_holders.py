"""Bytes of holders, table values and kv-blocks records."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import VersionError, WireError
from kvatlas.bridge.model.events import Tier
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, Run, decode_blocks, encode_blocks
from kvatlas.streams.index.holders import Holder, add_holder, holders, pack_holder, remove_holder

TIERS = [int(tier) for tier in Tier]
# Few and repetitive byte patterns, so that an identity also occurs across the border of two holders.
refs = st.sampled_from([0, 1, 256, 0x0101010101010101, (1 << 64) - 1])
packed = st.builds(
    pack_holder,
    refs,
    st.sampled_from([0, 1, 257, 65535]),
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from([0, 1, 0x01010101, (1 << 32) - 1]),
    st.sampled_from([0, 1, 2, 0x0101010101010101, (1 << 64) - 1]),
)


def test_a_holder_has_these_bytes():
    """24 bytes, big-endian, in the order of the drawing."""
    value = pack_holder(0x0102030405060708, 0x090A, 0x0B, 0x0C, 0x0D0E0F10, 0x1112131415161718)
    assert value == bytes(range(1, 25))
    assert list(holders(value * 2)) == [Holder(0x0102030405060708, 0x090A, 11, 12, 0x0D0E0F10, 0x1112131415161718)] * 2


def test_a_record_has_these_bytes():
    """One array: version, runs of 36 bytes, keys, operations, holders, receive time."""
    holder = pack_holder(1, 0, 1, 0, 0, 5)
    value = encode_blocks([Run(1, 5, 2, 3, 1)], b"k" * 16, bytes([OP_ADD]), holder, 9)
    run = bytes.fromhex("0000000000000001 0000000000000005 0000000000000002 0000000000000003 00000001")
    assert value == b"\x96\x01\xc4\x24" + run + b"\xc4\x10" + b"k" * 16 + b"\xc4\x01\x01\xc4\x18" + holder + b"\x09"


@given(st.lists(st.tuples(st.booleans(), packed), max_size=30))
def test_a_value_is_the_sorted_set_of_its_holders(changes):
    """Adding keeps the newer epoch, removing leaves a newer one alone, and equal sets are equal bytes."""
    value = b""
    model: dict[bytes, bytes] = {}
    for adds, holder in changes:
        old = model.get(holder[:11])
        newer = old is not None and old[16:] > holder[16:]
        if adds:
            value = add_holder(value, holder)
            model[holder[:11]] = old if newer and old else holder
        else:
            value = remove_holder(value, holder)
            if not newer:
                model.pop(holder[:11], None)
        assert value == b"".join(sorted(model.values()))


@given(
    st.lists(st.tuples(refs, st.integers(0, 1 << 60), st.integers(0, 5)), max_size=5),
    st.integers(0, 1 << 62),
    st.randoms(),
)
def test_records_come_back_as_they_were(runs, receive_ns, chance):
    """What is encoded is decoded."""
    columns = [Run(ref, epoch, 3, 7, updates) for ref, epoch, updates in runs]
    count = sum(run.updates for run in columns)
    keys, ops = chance.randbytes(16 * count), bytes(chance.choice((OP_ADD, OP_REMOVE)) for _ in range(count))
    packed_holders = b"".join(chance.randbytes(10) + bytes((chance.choice(TIERS),)) + chance.randbytes(13) for _ in ops)
    record = decode_blocks(encode_blocks(columns, keys, ops, packed_holders, receive_ns))
    assert record == (tuple(columns), keys, ops, packed_holders, receive_ns)


@pytest.mark.parametrize("at", range(1, 5))
def test_a_record_whose_columns_disagree_is_refused(at):
    """A column that is a byte short is an error, never a wrong update."""
    fields = list(msgspec.msgpack.decode(encode_blocks([Run(1, 1, 1, 1, 1)], b"k" * 16, b"\x01", b"h" * 24, 0)))
    fields[at] = fields[at][:-1]
    with pytest.raises(WireError):
        decode_blocks(msgspec.msgpack.encode(fields))


def test_a_record_of_an_unknown_version_is_named():
    """A later schema is a version error, so that the reader can dead-letter it."""
    with pytest.raises(VersionError, match="version 2"):
        decode_blocks(msgspec.msgpack.encode([2, b"", b"", b"", b"", 0]))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_record_or_a_wire_error(value):
    """Garbage raises nothing else."""
    with contextlib.suppress(WireError):
        decode_blocks(value)
