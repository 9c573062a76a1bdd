"""Tests of decoding the repeated field of token ids by hand."""

from __future__ import annotations

from array import array

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.scorer.api.varints import decode, score_request
from kvatlas.scorer.v1 import scorer_pb2 as pb

_ANY = st.integers(0, 2**32 - 1) | st.integers(0, 200_000)


def ids(request: pb.ScoreRequest) -> list[int]:
    return list(request.tokens) or list(array("I", request.tokens_packed))


@settings(deadline=None)
@given(
    st.lists(_ANY, max_size=60) | st.lists(st.integers(0, 2**28), min_size=600, max_size=900),
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.text(max_size=8),
            "cache_salt": st.text(max_size=300),
            "pods": st.lists(st.text(max_size=5), max_size=3),
            "truncate_tokens": st.integers(0, 2**32 - 1),
            "add_special_tokens": st.booleans(),
            "usable_only": st.booleans(),
        },
    ),
)
def test_a_request_says_the_same_as_protobuf_s_own(tokens, fields):
    """All fields arrive, and the same token ids in one of the two forms."""
    data = pb.ScoreRequest(tokens=tokens, **fields).SerializeToString()
    found, plain = score_request(data), pb.ScoreRequest.FromString(data)
    assert ids(found) == tokens
    for request in (found, plain):
        request.ClearField("tokens")
        request.ClearField("tokens_packed")
    assert found == plain


def test_long_prompts_take_the_fast_way():
    """Numbers of one to four bytes come packed; a number past 28 bits leaves the message to protobuf."""
    tokens = [0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 2**28 - 1] * 200
    found = score_request(pb.ScoreRequest(model="m", tokens=tokens).SerializeToString())
    assert not found.tokens
    assert list(array("I", found.tokens_packed)) == tokens
    found = score_request(pb.ScoreRequest(model="m", tokens=[*tokens, 2**28]).SerializeToString())
    assert list(found.tokens) == [*tokens, 2**28]


def test_both_forms_stay_both_forms():
    """A request with tokens in both forms still has both, so that it is refused as ambiguous."""
    data = pb.ScoreRequest(model="m", tokens=[5] * 1000, tokens_packed=b"\x01\x00\x00\x00").SerializeToString()
    found = score_request(data)
    assert len(found.tokens) == 1000
    assert found.tokens_packed


def test_a_field_in_pieces_is_joined():
    """Senders may split a repeated field, packed or not; all of it counts, in order."""
    part = pb.ScoreRequest(tokens=range(2000)).SerializeToString()
    single = b"\x10\x07" * 200  # the unpacked form of the number 7
    assert ids(score_request(part + part)) == [*range(2000), *range(2000)]
    assert ids(score_request(single)) == [7] * 200
    assert ids(score_request(single + part)) == [*[7] * 200, *range(2000)]


@settings(deadline=None)
@given(st.binary(min_size=2048, max_size=2600))
def test_bytes_that_are_no_request_end_as_protobuf_says(data):
    """Whatever arrives, the outcome is protobuf's: its message or its error."""
    try:
        plain = pb.ScoreRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            score_request(data)
        return
    assert ids(score_request(data)) == ids(plain)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_broken_varints_are_refused(data):
    """What decodes is the numbers that protobuf reads; all else is None."""
    found = decode(data)
    if found is not None:
        head = bytes([0x12, len(data)])
        assert list(array("I", found)) == list(pb.ScoreRequest.FromString(head + data).tokens)
    assert decode(b"") is None
    assert decode(b"\x05\x80") is None
