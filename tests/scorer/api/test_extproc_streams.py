"""Streams of the external processor as no gateway should send them: wrong order, cut short, garbage, no end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.scorer.api import extproc_messages as messages
from kvatlas.scorer.api.extproc import RESPONSES, SERVICE, ExternalProcessor, ProcessorOptions
from kvatlas.scorer.api.http2_server import Http2Server
from kvatlas.scorer.gateway import metrics
from kvatlas.scorer.picker import names
from kvatlas.scorer.picker.route import Destination
from kvatlas.scorer.v1 import extproc_pb2 as pb
from tests.scorer.gateway_rig import FakeDecider, Seen

POD = "10.0.0.1:8000"
MODES = [messages.NONE, messages.STREAMED, messages.BUFFERED, messages.BUFFERED_PARTIAL, messages.FULL_DUPLEX, 5]


class Wire:
    """A stream's two directions: what the gateway sends, and what it gets."""

    def __init__(self, sent: Sequence[pb.ProcessingRequest]) -> None:
        self._sent = list(sent)
        self.got: list[pb.ProcessingResponse] = []

    async def read(self) -> Any:
        return self._sent.pop(0) if self._sent else grpc.aio.EOF

    async def write(self, answer: Any) -> None:
        self.got.append(pb.ProcessingResponse.FromString(messages.serialized(answer)))


def processor(decider: FakeDecider, response: str = "headers", most: int = 1_000) -> ExternalProcessor:
    decider.decision = lambda _incoming: Destination((POD,))
    return ExternalProcessor(decider, ProcessorOptions(max_body_bytes=most, piece_bytes=64, response=response))


def exchange(sent: Sequence[pb.ProcessingRequest], response: str = "headers") -> tuple[FakeDecider, list[Any]]:
    """Let a stream run to its end; returns who decided and what the gateway got."""
    decider, wire = FakeDecider(), Wire(sent)

    async def run() -> None:
        made = processor(decider, response)
        async with asyncio.timeout(90):
            await made.process(None, wire)
        assert made.open == 0

    asyncio.run(run())
    return decider, wire.got


def headers(mode: int, *, ended: bool = False, named: dict[str, bytes] | None = None) -> pb.ProcessingRequest:
    config = pb.ProtocolConfiguration(request_body_mode=mode, response_body_mode=messages.NONE)  # type: ignore[arg-type]
    made = pb.ProcessingRequest(request_headers=pb.HttpHeaders(end_of_stream=ended), protocol_config=config)
    for name, value in {":path": b"/v1/completions", **(named or {})}.items():
        made.request_headers.headers.headers.add(key=name, raw_value=value)
    return made


def body(data: bytes, *, ended: bool = False) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=ended))


TRAILERS = pb.ProcessingRequest(request_trailers=pb.HttpTrailers())
REPLY = pb.ProcessingRequest(response_headers=pb.HttpHeaders(end_of_stream=True))
MESSAGE = st.one_of(
    st.builds(headers, st.sampled_from(MODES), ended=st.booleans()),
    st.builds(body, st.binary(max_size=300), ended=st.booleans()),
    st.just(TRAILERS),
    st.just(REPLY),
    st.builds(lambda data: pb.ProcessingRequest(response_body=pb.HttpBody(body=data)), st.binary(max_size=100)),
    st.just(pb.ProcessingRequest(response_trailers=pb.HttpTrailers())),
    st.just(pb.ProcessingRequest()),  # of a kind that this build does not know
    st.just(pb.ProcessingRequest(observability_mode=True)),
)


@given(sent=st.lists(MESSAGE, max_size=8), response=st.sampled_from(RESPONSES))
def test_whatever_comes_ends_and_is_decided_once_at_most(sent: list[pb.ProcessingRequest], response: str) -> None:
    """Nothing is said that was not asked for, and a pod is named once."""
    decider, got = exchange(sent, response)
    assert len(decider.asked) <= 1
    kinds = [one.WhichOneof("response") for one in got]
    came = [one.WhichOneof("request") for one in sent]
    for kind in set(kinds) - {"immediate_response", "request_body"}:
        assert kinds.count(kind) <= came.count(kind)
    assert sum(POD in str(one) for one in got) <= 1
    if "immediate_response" in kinds:
        assert kinds[-1] == "immediate_response"


@given(pieces=st.lists(st.binary(max_size=200), min_size=1, max_size=5), trailers=st.booleans(), unknown=st.booleans())
def test_full_duplex_gives_the_body_back_however_it_was_cut(pieces: list[bytes], trailers: bool, unknown: bool) -> None:
    """Cut in the middle of a character or empty, ended by its last piece or by trailers: headers first, all of it."""
    sent = [headers(messages.FULL_DUPLEX), *(body(one) for one in pieces[:-1])]
    sent.append(body(pieces[-1], ended=not trailers))
    if unknown:
        sent.insert(1, pb.ProcessingRequest())
    decider, got = exchange([*sent, TRAILERS] if trailers else sent)
    assert decider.asked[0].body == b"".join(pieces)
    kinds = [one.WhichOneof("response") for one in got]
    assert kinds[0] == "request_headers"
    assert kinds[1:] == ["request_body"] * (len(kinds) - 1 - trailers) + ["request_trailers"] * trailers
    parts = [one.request_body.response.body_mutation.streamed_response for one in got if one.HasField("request_body")]
    assert b"".join(part.body for part in parts) == b"".join(pieces)
    assert [part.end_of_stream for part in parts] == [False] * (len(parts) - 1) + [not trailers]


def test_trailers_alone_are_a_request_without_a_body() -> None:
    for mode in (messages.FULL_DUPLEX, messages.BUFFERED, messages.STREAMED):
        _, got = exchange([headers(mode), TRAILERS])
        assert got[0].WhichOneof("response") == "request_headers"
        assert got[-1].WhichOneof("response") == "request_trailers" or mode == messages.STREAMED


@pytest.mark.parametrize("first", [body(b"{}"), TRAILERS, REPLY, pb.ProcessingRequest()])
def test_stream_that_does_not_begin_with_headers_is_left_alone(first: pb.ProcessingRequest) -> None:
    """Nothing was announced, so there is nothing that an answer could be for: the gateway goes on by itself."""
    decider, got = exchange([first, headers(messages.FULL_DUPLEX), body(b"{}", ended=True)])
    assert (decider.asked, got) == ([], [])


def test_what_is_no_text_in_headers_is_replaced_and_ids_without_end_are_not_kept() -> None:
    named = {"x-kept": b"\xff\xc3", names.REQUEST_ID: b"i" * 60_000, "x-long": b"v" * 5_000_000}
    decider, got = exchange([headers(messages.FULL_DUPLEX, ended=True, named=named)])
    asked = decider.asked[0]
    assert (asked.headers["x-kept"], len(asked.headers["x-long"])) == ("��", 5_000_000)
    assert asked.request_id == ""  # the decision makes one, which goes on in its place
    assert got[0].request_headers.response.HasField("header_mutation")


def test_body_past_the_limit_is_refused_before_it_has_all_come() -> None:
    counted = metrics.REFUSED.labels("rejected-too-large")
    before = counted._value.get()
    _, got = exchange([headers(messages.FULL_DUPLEX), body(bytes(900)), body(bytes(900)), body(b"", ended=True)])
    assert [one.immediate_response.status.code for one in got] == [413]
    assert counted._value.get() == before + 1


@pytest.mark.parametrize("broken", ["headers", "chunk", "ended"])
def test_fault_in_what_is_made_of_a_response_cuts_none(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Seen):
        def __getattribute__(self, name: str) -> Any:
            def fail(*_: object, **_more: object) -> None:
                raise ValueError("SECRET")

            return fail if name == broken else super().__getattribute__(name)

    decider = FakeDecider()
    decider.exchange = lambda _request_id: Broken()  # type: ignore[method-assign]
    first = headers(messages.FULL_DUPLEX, ended=True)
    first.protocol_config.response_body_mode = messages.FULL_DUPLEX  # type: ignore[assignment]
    chunk = pb.ProcessingRequest(response_body=pb.HttpBody(body=b"data", end_of_stream=True))
    wire = Wire([first, pb.ProcessingRequest(response_headers=pb.HttpHeaders()), chunk])
    asyncio.run(processor(decider, "body").process(None, wire))
    kinds = [one.WhichOneof("response") for one in wire.got]
    assert kinds == ["request_headers", "response_headers", "response_body"]
    assert "ValueError < test_extproc_streams.py" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.fixture
async def served() -> AsyncIterator[str]:
    server = Http2Server(1_000_000)
    processor(FakeDecider()).add_to(server)
    yield f"127.0.0.1:{await server.listen('127.0.0.1:0')}"
    await server.stop(0)


async def test_bytes_that_are_no_message_end_their_own_stream_alone(served: str) -> None:
    async with grpc.aio.insecure_channel(served) as channel:
        method = channel.stream_stream(f"/{SERVICE}/Process")
        others = [method(), method()]
        for call in others:
            await call.write(headers(messages.FULL_DUPLEX).SerializeToString())
        bad = method()
        await bad.write(b"\x12\xff\xff\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError):
            assert await bad.read() is not grpc.aio.EOF
        cut = method()
        await cut.write(headers(messages.BUFFERED).SerializeToString())
        await cut.read()
        await cut.done_writing()
        assert await cut.read() is grpc.aio.EOF
        for call in others:
            await call.write(body("é".encode()[:1]).SerializeToString())
            await call.write(body("é".encode()[1:], ended=True).SerializeToString())
            got = pb.ProcessingResponse.FromString(await call.read())
            assert POD in str(got.dynamic_metadata)
            await call.done_writing()
