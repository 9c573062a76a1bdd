"""Messages of Envoy's external processing: reads what Envoy sends, builds what it gets. No I/O, no decisions.

Envoy takes header values from ``raw_value`` alone: those in ``value`` are dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from kvatlas.scorer.picker import names
from kvatlas.scorer.picker.route import Destination, Refusal
from kvatlas.scorer.v1 import extproc_pb2 as pb

# Body modes, as ``protocol_config`` announces them.
NONE: Final = 0
STREAMED: Final = 1
BUFFERED: Final = 2
BUFFERED_PARTIAL: Final = 3
FULL_DUPLEX: Final = 4

_OVERWRITE: Final = 2

# Field numbers of a piece and of the messages around it, from the inside: a piece of type bytes, its end of type bool.
_PIECE_FIELD: Final = bytes((pb.StreamedBodyResponse.BODY_FIELD_NUMBER << 3 | 2,))
_END: Final = bytes((pb.StreamedBodyResponse.END_OF_STREAM_FIELD_NUMBER << 3, 1))
_PIECE_PATH: Final = tuple(
    bytes((number << 3 | 2,))
    for number in (
        pb.BodyMutation.STREAMED_RESPONSE_FIELD_NUMBER,
        pb.CommonResponse.BODY_MUTATION_FIELD_NUMBER,
        pb.BodyResponse.RESPONSE_FIELD_NUMBER,
        pb.ProcessingResponse.REQUEST_BODY_FIELD_NUMBER,
    )
)
#: Smaller messages are read as fast by protobuf.
_LARGE_BYTES: Final = 4_096
_REQUEST_BODY: Final = pb.ProcessingRequest.REQUEST_BODY_FIELD_NUMBER << 3 | 2
_METADATA_CONTEXT: Final = pb.ProcessingRequest.METADATA_CONTEXT_FIELD_NUMBER << 3 | 2
_BODY: Final = pb.HttpBody.BODY_FIELD_NUMBER << 3 | 2
_CONTENT_LENGTH: Final = "content-length"
_JSON: Final = "application/json"
_TOO_MANY: Final = 429


class RequestBody(NamedTuple):
    """A piece of a request's body, where it lies in the message that brought it."""

    body: memoryview
    end_of_stream: bool


class BodyMessage(NamedTuple):
    """What Envoy sends with a large piece of a request's body: read here, since protobuf copies it several times."""

    request_body: RequestBody
    observability_mode: bool = False

    def WhichOneof(self, _group: str) -> str:  # noqa: N802 - as messages of protobuf
        """Return which message it is."""
        return "request_body"


def request_of(data: bytes) -> pb.ProcessingRequest | BodyMessage:
    """Read a message of Envoy's."""
    if len(data) > _LARGE_BYTES and data[0] == _REQUEST_BODY:
        try:
            length, at = _read_varint(data, 1)
            end = at + length
            size, begin = _read_varint(data, at + 1)
        except IndexError:
            return pb.ProcessingRequest.FromString(data)
        tail = data[begin + size : end]
        known = data[at] == _BODY and end <= len(data) and tail in (b"", _END)
        if known and (end == len(data) or data[end] >= _METADATA_CONTEXT):
            return BodyMessage(RequestBody(memoryview(data)[begin : begin + size], tail == _END))
    return pb.ProcessingRequest.FromString(data)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and the place behind it."""
    number = shift = 0
    while (byte := data[at]) & 0x80:
        number |= (byte & 0x7F) << shift
        shift += 7
        at += 1
    return number | byte << shift, at + 1


def headers_of(message: pb.HttpHeaders) -> dict[str, str]:
    """Return headers by name; repeated ones are joined with commas, as HTTP means them."""
    found: dict[str, str] = {}
    for header in message.headers.headers:
        value = (header.raw_value or header.value.encode()).decode("utf-8", "replace")
        found[header.key] = f"{found[header.key]},{value}" if header.key in found else value
    return found


def subset_of(message: pb.ProcessingRequest) -> frozenset[str] | None:
    """Return the addresses of the subset hint, None without one.

    The value is a list, or one string with commas where Envoy's header_to_metadata filter made it.
    """
    if not message.HasField("metadata_context"):
        return None
    spaces = message.metadata_context.filter_metadata
    if names.SUBSET_NAMESPACE not in spaces:
        return None
    fields = spaces[names.SUBSET_NAMESPACE].fields
    if names.SUBSET not in fields:
        return None
    value = fields[names.SUBSET]
    if value.HasField("list_value"):
        parts = [item.string_value for item in value.list_value.values]
    else:
        parts = value.string_value.split(",")
    return frozenset(part.strip() for part in parts if part.strip())


def served_of(message: pb.ProcessingRequest) -> str:
    """Return the address of the pod that answered, empty where the data plane does not tell."""
    spaces = message.metadata_context.filter_metadata
    if names.LB_NAMESPACE in spaces:
        fields = spaces[names.LB_NAMESPACE].fields
        if names.SERVED in fields and fields[names.SERVED].string_value:
            return fields[names.SERVED].string_value
    return attribute_of(message, names.UPSTREAM_ADDRESS)


def attribute_of(message: pb.ProcessingRequest, name: str) -> str:
    """Return an attribute that Envoy sent, empty for none."""
    if names.ATTRIBUTES not in message.attributes:
        return ""
    fields = message.attributes[names.ATTRIBUTES].fields
    return fields[name].string_value if name in fields else ""


def common(route: Destination) -> pb.CommonResponse:
    """Return the mutation that names the pod; body left as it is."""
    mutation = pb.HeaderMutation(remove_headers=names.CONTROL)
    if route.addresses:
        _set(mutation, names.DESTINATION, ",".join(route.addresses))
    else:
        mutation.remove_headers.append(names.DESTINATION)
    if route.request_id:
        _set(mutation, names.REQUEST_ID, route.request_id)
    for name, value in route.headers:
        _set(mutation, name, value)
    set_now = {option.header.key for option in mutation.set_headers}
    kept = [name for name in mutation.remove_headers if name not in set_now]
    del mutation.remove_headers[:]
    mutation.remove_headers.extend(kept)
    return pb.CommonResponse(header_mutation=mutation, clear_route_cache=True)


def _set(mutation: pb.HeaderMutation, name: str, value: str) -> None:
    mutation.set_headers.add(header=pb.HeaderValue(key=name, raw_value=value.encode()), append_action=_OVERWRITE)


def name_pod(response: pb.ProcessingResponse, route: Destination) -> pb.ProcessingResponse:
    """Put the chosen pod into an answer's metadata, equal to the header, as the protocol demands."""
    if route.addresses:
        space = response.dynamic_metadata.fields[names.LB_NAMESPACE].struct_value
        space.fields[names.DESTINATION].string_value = ",".join(route.addresses)
    return response


def headers_answer(route: Destination) -> pb.ProcessingResponse:
    """Return the answer to request headers that names the pod."""
    answer = pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common(route)))
    return name_pod(answer, route)


def body_answer(route: Destination) -> pb.ProcessingResponse:
    """Return the answer to a buffered body that names the pod, and replaces the body where the route has another."""
    response = common(route)
    if route.body is not None:
        response.body_mutation.body = route.body
        # Only together with a new body: a wrong length for the old one would break the connection to the pod.
        _set(response.header_mutation, _CONTENT_LENGTH, str(len(route.body)))
    return name_pod(pb.ProcessingResponse(request_body=pb.BodyResponse(response=response)), route)


def body_pieces(body: bytes, piece_bytes: int, *, ended: bool) -> Iterator[bytes]:
    """Yield a whole body for full duplex, as serialized answers; ``ended`` marks its last piece as the end.

    Framed here: protobuf copies a piece at each of the five levels, which costs ten times as much for a large body.
    """
    view = memoryview(body)
    last = max(len(body) - 1, 0) // piece_bytes
    for number in range(last + 1):
        piece = view[number * piece_bytes : (number + 1) * piece_bytes]
        tail = _END if ended and number == last else b""
        head = _PIECE_FIELD + _varint(len(piece))
        for field in _PIECE_PATH:
            head = field + _varint(len(head) + len(piece) + len(tail)) + head
        yield b"".join((head, piece, tail))


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def serialized(answer: pb.ProcessingResponse | bytes) -> bytes:
    """Return an answer as bytes; those of :func:`body_pieces` are so already."""
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


def refusal(refused: Refusal) -> pb.ProcessingResponse:
    """Return the answer that Envoy gives the client in the pod's place, as clients of OpenAI and Anthropic read it."""
    error = {"message": refused.text, "type": refused.reason, "param": None, "code": refused.status}
    headers = pb.HeaderMutation()
    _set(headers, "content-type", _JSON)
    _set(headers, names.DROPPED_REASON, refused.reason)
    if refused.status == _TOO_MANY:
        _set(headers, "retry-after", "1")
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=refused.status),
            headers=headers,
            body=msgspec.json.encode({"type": "error", "error": error}),
            details=f"kvatlas_{refused.reason.replace('-', '_')}",
        )
    )


def same_body(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
    """Return the answer that hands a response chunk on in full duplex."""
    piece = pb.StreamedBodyResponse(body=message.response_body.body, end_of_stream=message.response_body.end_of_stream)
    return pb.ProcessingResponse(
        response_body=pb.BodyResponse(
            response=pb.CommonResponse(body_mutation=pb.BodyMutation(streamed_response=piece))
        )
    )


EMPTY_HEADERS: Final = pb.ProcessingResponse(request_headers=pb.HeadersResponse())
EMPTY_BODY: Final = pb.ProcessingResponse(request_body=pb.BodyResponse())
EMPTY_TRAILERS: Final = pb.ProcessingResponse(request_trailers=pb.TrailersResponse())
EMPTY_RESPONSE_HEADERS: Final = pb.ProcessingResponse(response_headers=pb.HeadersResponse())
EMPTY_RESPONSE_BODY: Final = pb.ProcessingResponse(response_body=pb.BodyResponse())
EMPTY_RESPONSE_TRAILERS: Final = pb.ProcessingResponse(response_trailers=pb.TrailersResponse())
