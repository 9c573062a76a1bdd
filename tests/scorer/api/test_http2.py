"""HTTP/2 frames, blocks of headers and gRPC messages as bytes."""

from __future__ import annotations

import contextlib

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.scorer.api import http2

_NAMES = st.sampled_from([":path", "te", "content-type", "x-request-id", "x-tenant"])
_FIELDS = st.lists(st.tuples(_NAMES, st.sampled_from(["a", "bb", "é", "c" * 200])), max_size=6)


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 60))
def test_messages_come_whole_however_frames_cut_them(messages: list[bytes], step: int) -> None:
    data = b"".join(b"\x00" + len(one).to_bytes(4, "big") + one for one in messages)
    reader = http2.Messages(40)
    found = [one for at in range(0, len(data), step) for one in reader.feed(data[at : at + step])]
    assert found == messages
    assert reader.held == 0


@given(st.binary(max_size=200), st.integers(6, 64))
def test_frames_of_a_message_carry_all_of_it_in_pieces_of_the_agreed_size(message: bytes, most: int) -> None:
    data = b"".join(http2.message_frames(7, message, most))
    reader, at, found = http2.Messages(200), 0, []
    while at < len(data):
        length, kind, flags, stream = http2.read_head(data, at)
        assert (kind, flags, stream) == (http2.DATA, 0, 7)
        assert length <= most
        at += http2.FRAME_BYTES
        found += reader.feed(data[at : at + length])
        at += length
    assert found == [message]


@given(st.lists(_FIELDS, max_size=12))
def test_headers_are_those_that_were_sent_whatever_came_before(requests: list[list[tuple[str, str]]]) -> None:
    """A block that is decoded once must not be taken for one that means something else by now."""
    encoder, blocks = hpack.Encoder(), http2.HeaderBlocks()
    for number, fields in enumerate(requests):
        kind = hpack.NeverIndexedHeaderTuple if number % 3 else hpack.HeaderTuple
        for _ in range(2):
            block = encoder.encode([kind(*field) for field in fields])
            assert blocks.of(block) == {name.encode(): value.encode() for name, value in fields}


def test_headers_that_leave_the_table_are_decoded_once() -> None:
    """As Envoy sends them: from the table, and a path in full each time."""
    encoder, blocks = hpack.Encoder(), http2.HeaderBlocks()
    fields = [
        hpack.HeaderTuple("te", "trailers"),
        hpack.NeverIndexedHeaderTuple(":path", "/envoy.service.ext_proc.v3.ExternalProcessor/Process" * 4),
        hpack.NeverIndexedHeaderTuple("x-new", ""),
    ]
    first, second, third = (blocks.of(encoder.encode(fields)) for _ in range(3))
    assert first == second == third
    assert second is third
    assert first is not second
    with_entry = blocks.of(encoder.encode([*fields, hpack.HeaderTuple("x-other", "1")]))
    assert with_entry[b"x-other"] == b"1"
    assert blocks.of(encoder.encode(fields)) is not third


def test_answers_are_headers_that_others_read() -> None:
    decoded = hpack.Decoder().decode(http2.ANSWER_HEADERS + http2.trailers(8, "too much: 50 % \r\né"))
    assert decoded == [
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-status", "8"),
        ("grpc-message", "too much: 50 ? ???"),
    ]
    assert hpack.Decoder().decode(http2.trailers(0, "unused")) == [("grpc-status", "0")]


@pytest.mark.parametrize("data", [b"\x01\x00\x00\x00\x01x", b"\x00\x00\x00\x00\x0b", b"\x00\xff\xff\xff\xff"])
def test_messages_that_are_compressed_or_too_large_are_not_taken(data: bytes) -> None:
    with pytest.raises(http2.MessageError):
        http2.Messages(10).feed(data)


@pytest.mark.parametrize(
    ("payload", "flags", "expected"),
    [
        (b"abc", 0, b"abc"),
        (b"\x02abcPP", http2.PADDED, b"abc"),
        (b"PPPPPabc", http2.HAS_PRIORITY, b"abc"),
        (b"\x01PPPPPabcP", http2.PADDED | http2.HAS_PRIORITY, b"abc"),
    ],
)
def test_padding_and_priority_are_left_out(payload: bytes, flags: int, expected: bytes) -> None:
    assert http2.unpadded(payload, flags, priority=True) == expected


@pytest.mark.parametrize(
    ("payload", "flags"), [(b"", http2.PADDED), (b"\x03ab", http2.PADDED), (b"abc", http2.HAS_PRIORITY)]
)
def test_a_frame_shorter_than_it_says_is_an_error(payload: bytes, flags: int) -> None:
    with pytest.raises(http2.Http2Error):
        http2.unpadded(payload, flags, priority=True)


@given(st.binary(max_size=60))
def test_anything_for_headers_or_settings_is_read_or_an_error(data: bytes) -> None:
    for read in (http2.HeaderBlocks().of, lambda given: list(http2.read_settings(given)), http2.number_of):
        with contextlib.suppress(http2.Http2Error):
            read(data)
