"""Pieces of a body: framed by hand and read by protobuf, made by protobuf and read by hand."""

from __future__ import annotations

import contextlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from kvatlas.scorer.api.extproc_messages import body_pieces, request_of, serialized, served_of, subset_of
from kvatlas.scorer.picker import names
from kvatlas.scorer.v1 import extproc_pb2 as pb


@given(
    body=st.one_of(st.binary(max_size=300), st.sampled_from((16_383, 16_384, 62_001)).map(bytes)),
    piece_bytes=st.sampled_from((100, 127, 128, 16_384, 62_000)),
    ended=st.booleans(),
)
def test_pieces_are_the_whole_body_and_only_the_last_ends_it(body: bytes, piece_bytes: int, ended: bool) -> None:
    whole = b""
    count = -(-len(body) // piece_bytes) or 1
    for number, answer in enumerate(body_pieces(body, piece_bytes, ended=ended)):
        piece = pb.StreamedBodyResponse(
            body=body[number * piece_bytes : (number + 1) * piece_bytes], end_of_stream=ended and number == count - 1
        )
        mutation = pb.BodyMutation(streamed_response=piece)
        wanted = pb.ProcessingResponse(request_body=pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation)))
        assert pb.ProcessingResponse.FromString(serialized(answer)) == wanted
        whole += piece.body
    assert whole == body


@given(
    size=st.sampled_from((0, 1, 4_090, 4_096, 16_384, 1_000_000)),
    ended=st.booleans(),
    context=st.booleans(),
    kind=st.sampled_from(("request_body", "response_body")),
)
def test_a_large_piece_that_is_read_by_hand_is_what_protobuf_reads(
    size: int, ended: bool, context: bool, kind: str
) -> None:
    message = pb.ProcessingRequest(**{kind: pb.HttpBody(body=bytes(size), end_of_stream=ended)})
    if context:
        message.metadata_context.filter_metadata["envoy.lb"].fields["pod"].string_value = "a"
    read = request_of(message.SerializeToString())
    assert read.WhichOneof("request") == kind
    piece = getattr(read, kind)
    assert (bytes(piece.body), piece.end_of_stream) == (bytes(size), ended)
    assert not read.observability_mode


@given(head=st.binary(max_size=12), size=st.integers(4_080, 4_100), tail=st.binary(max_size=6))
@example(head=b"\x22\xff\xff", size=4_090, tail=b"")
@example(head=b"\x22\xff\xff\xff\xff\xff\x0a\x01", size=4_090, tail=b"")
def test_bytes_that_are_no_message_are_no_piece_either(head: bytes, size: int, tail: bytes) -> None:
    data = head + bytes(size) + tail
    read = expected = None
    with contextlib.suppress(DecodeError):
        expected = pb.ProcessingRequest.FromString(data)
    with contextlib.suppress(DecodeError):
        read = request_of(data)
    if expected is not None and read is not None and read.WhichOneof("request") == "request_body":
        assert bytes(read.request_body.body) == expected.request_body.body


HINT = {
    "list": (["10.0.0.1:8000", " 10.0.0.2 ", "[fd00::1]:8000"], {"10.0.0.1:8000", "10.0.0.2", "[fd00::1]:8000"}),
    "text": ("10.0.0.1:8000, 10.0.0.2,", {"10.0.0.1:8000", "10.0.0.2"}),
    "one": ("10.0.0.1:8000", {"10.0.0.1:8000"}),
    "empty list": ([], set()),
    "empty text": ("", set()),
    "null": (None, set()),
    "numbers": ([1, {}, "10.0.0.1"], {"10.0.0.1"}),
    "object": ({"a": "10.0.0.1"}, set()),
}


@pytest.mark.parametrize(("value", "wanted"), HINT.values(), ids=HINT)
def test_subset_hint_in_every_form(value: object, wanted: set[str]) -> None:
    """A hint that names nobody is a hint: nobody may be picked; only its absence allows all."""
    message = pb.ProcessingRequest()
    message.metadata_context.filter_metadata[names.SUBSET_NAMESPACE].update({names.SUBSET: value})
    assert subset_of(message) == frozenset(wanted)


def test_without_a_hint_all_may_be_picked() -> None:
    message = pb.ProcessingRequest()
    assert subset_of(message) is None
    message.metadata_context.filter_metadata[names.LB_NAMESPACE].update({names.SUBSET: ["10.0.0.1"]})
    message.metadata_context.filter_metadata[names.SUBSET_NAMESPACE].update({"another": ["10.0.0.1"]})
    assert subset_of(message) is None


def test_the_pod_that_answered_is_what_the_data_plane_says_else_the_address_it_dialled() -> None:
    message = pb.ProcessingRequest()
    assert served_of(message) == ""
    message.attributes[names.ATTRIBUTES].update({names.UPSTREAM_ADDRESS: "10.0.0.2:8000"})
    assert served_of(message) == "10.0.0.2:8000"
    message.metadata_context.filter_metadata[names.LB_NAMESPACE].update({names.SERVED: "10.0.0.1:8000"})
    assert served_of(message) == "10.0.0.1:8000"
