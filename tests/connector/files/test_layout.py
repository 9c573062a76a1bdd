"""Names and headers: golden bytes, round trips, and every damage noticed."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout
from kvatlas.connector.files.layout import Fingerprint, Slot
from tests.connector.conftest import FINGERPRINT

DIGEST = bytes(range(16))
SEGMENT_ID = bytes(range(16, 32))

_KEYS = st.binary(min_size=1, max_size=layout.KEY_MAX_BYTES)
_SLOTS = st.lists(st.builds(Slot, _KEYS, st.integers(0, 3 * 4096), st.integers(0, 2**64 - 1)), min_size=1, max_size=120)


def test_golden_header() -> None:
    """The header's bytes are fixed: an older file stays readable or is refused by its version."""
    slots = [Slot(b"\x01\x02\x03", 5000, 0x1122334455667788), Slot(b"k" * 62, 8192, 2)]
    data = layout.encode_header(DIGEST, SEGMENT_ID, 8192, slots)
    assert len(data) == 4096
    assert data[:64].hex() == (
        "4b5641544c415301"  # magic
        "01000200"  # version, slots
        "00100000"  # header bytes
        "0020000000000000"  # slot bytes
        "000102030405060708090a0b0c0d0e0f"  # fingerprint
        "101112131415161718191a1b1c1d1e1f"  # segment id
        "a441ac9a67a7bc62"  # checksum
    )
    assert data[64:144] == struct.pack("<H62sQQ", 3, b"\x01\x02\x03", 5000, 0x1122334455667788)
    assert data[144:224] == struct.pack("<H62sQQ", 62, b"k" * 62, 8192, 2)
    assert not any(data[224:])


def test_golden_names() -> None:
    """Directory, digest and path of a block are fixed: a changed rule would orphan every file."""
    assert FINGERPRINT.directory() == "org_model-8a791bd64331738d2c5dac6396f908f3"
    assert FINGERPRINT.digest().hex() == "8a791bd64331738d2c5dac6396f908f3"
    key = bytes(range(36))
    assert layout.block_path(key) == f"blocks/b1e/{key.hex()}.kv"


@given(slots=_SLOTS, pages=st.integers(3, 8))
def test_a_header_comes_back(slots: list[Slot], pages: int) -> None:
    """What was encoded is decoded, and sizes add up to whole pages."""
    data = layout.encode_header(DIGEST, SEGMENT_ID, pages * 4096, slots)
    header = layout.decode_header(data, DIGEST)
    assert header.slots == tuple(slots)
    assert (header.fingerprint, header.segment_id) == (DIGEST, SEGMENT_ID)
    assert header.header_bytes == len(data) == layout.header_bytes(len(slots)) == layout.peek_header_bytes(data)
    assert header.file_bytes == len(data) + pages * 4096 * len(slots)
    assert header.file_bytes % 4096 == 0
    number = header.find(slots[-1].key)
    assert number is not None
    assert header.slots[number].key == slots[-1].key
    assert header.find(b"\xff" * 63) is None


@given(slots=_SLOTS, position=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=200)
def test_any_flipped_bit_of_a_header_is_noticed(slots: list[Slot], position: int, bit: int) -> None:
    """No single bit can change without the header being refused."""
    data = bytearray(layout.encode_header(DIGEST, SEGMENT_ID, 3 * 4096, slots))
    data[position % len(data)] ^= 1 << bit
    with pytest.raises(LayoutError):
        layout.decode_header(data, DIGEST)


@given(data=st.binary(max_size=5000))
def test_other_bytes_are_no_header(data: bytes) -> None:
    """Arbitrary bytes, also behind our magic, are refused and never crash the decoder."""
    for candidate in (data, layout.MAGIC + data, layout.MAGIC + struct.pack("<HHI", 1, 1, 4096) + data):
        with pytest.raises(LayoutError):
            layout.decode_header(candidate, DIGEST)


@given(cut=st.integers(0, 4095))
def test_a_cut_header_is_refused(cut: int) -> None:
    """A header that ends early is an error that says so."""
    data = layout.encode_header(DIGEST, SEGMENT_ID, 4096, [Slot(b"k", 1, 1)])
    with pytest.raises(LayoutError, match="cut off"):
        layout.decode_header(data[:cut], DIGEST)


def test_another_fingerprint_is_refused_by_name() -> None:
    """A whole header of another set-up is not ours."""
    data = layout.encode_header(DIGEST, SEGMENT_ID, 4096, [Slot(b"k", 1, 1)])
    with pytest.raises(LayoutError, match="belongs to fingerprint 0001"):
        layout.decode_header(data, bytes(16))


def test_another_version_is_refused_by_name() -> None:
    """A header of a later layout is refused with both versions in the text."""
    data = bytearray(layout.encode_header(DIGEST, SEGMENT_ID, 4096, [Slot(b"k", 1, 1)]))
    data[8] = 9
    with pytest.raises(LayoutError, match="version 9; this build reads 1"):
        layout.decode_header(data, DIGEST)


@given(key=_KEYS)
def test_a_name_leads_back_to_its_key(key: bytes) -> None:
    """A block's file name says its key."""
    folder, fan, name = layout.block_path(key).split("/")
    assert (folder, len(fan)) == ("blocks", 3)
    assert layout.key_of(name) == key


@pytest.mark.parametrize("name", ["", ".kv", "zz.kv", "0102", "0102.tmp", "ab" * 63 + ".kv", "0.kv"])
def test_other_names_are_nobodys(name: str) -> None:
    """What is not a block's name is left alone."""
    assert layout.key_of(name) is None


@pytest.mark.parametrize("key", [b"", b"k" * 63])
def test_a_key_that_does_not_fit_is_an_error(key: bytes) -> None:
    """A key that a slot cannot hold is refused before anything is written."""
    with pytest.raises(LayoutError, match="1 to 62"):
        layout.block_path(key)


_CHANGES = {
    "engine": "other", "engine_version": "2", "model": "org/other", "hash_algorithm": "xxhash", "hash_seed": "1",
    "dtype": "float8", "block_size_tokens": (32,), "layers": (("layer.0",),), "tensor_parallel": 2,
    "pipeline_parallel": 2, "prefill_context_parallel": 2, "decode_context_parallel": 2, "rank": "1",
    "block_bytes": 1, "memory_layout": "HND", "extra": {"a": "b"},
}  # fmt: skip


def test_every_field_of_the_fingerprint_counts() -> None:
    """No two set-ups that differ in any field share a directory, and the manifest check names the field."""
    assert set(_CHANGES) == set(FINGERPRINT.__dataclass_fields__)
    others = {
        name: Fingerprint(**{**{f: getattr(FINGERPRINT, f) for f in _CHANGES}, name: value})
        for name, value in _CHANGES.items()
    }
    assert len({FINGERPRINT.digest(), *(other.digest() for other in others.values())}) == len(_CHANGES) + 1
    assert len({FINGERPRINT.directory(), *(other.directory() for other in others.values())}) == len(_CHANGES) + 1
    for name, other in others.items():
        with pytest.raises(LayoutError, match=rf"m: .* differs in {name}$"):
            layout.check_manifest(layout.encode_manifest(other), FINGERPRINT, "m")
    layout.check_manifest(layout.encode_manifest(FINGERPRINT), FINGERPRINT, "m")


def test_the_manifest_is_for_people() -> None:
    """The manifest is indented JSON that says every field and the layout's version."""
    text = layout.encode_manifest(FINGERPRINT).decode()
    found = json.loads(text)
    assert text.count("\n") > len(_CHANGES)
    assert set(found) == {*_CHANGES, "layout_version"}


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null"])
def test_a_broken_manifest_is_an_error(data: bytes) -> None:
    """A manifest that is not one refuses the directory."""
    with pytest.raises(LayoutError, match="m: "):
        layout.check_manifest(data, FINGERPRINT, "m")
