"""Pieces of a body in full duplex: framed by hand, read by protobuf."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.scorer.api.extproc_messages import body_pieces, serialized
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
