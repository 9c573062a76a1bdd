"""Token ids of a request's ``repeated uint32`` field, decoded by numpy instead of number by number.

A parsed message hands its numbers out one Python object at a time: 5 ms for 131,072 of them. On the wire they are one
run of varints, which numpy takes apart in less than half of that. So the field is cut out of the request's bytes before
these are parsed, and put in its packed form (``tokens_packed``) instead::

    tag 0x12 | length | varint, varint, ...      field 2, packed

Any other shape (unpacked numbers, the field twice, numbers past 28 bits, both forms at once) is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from kvatlas.scorer.v1 import scorer_pb2 as pb

_TOKENS: Final = 2
#: Wire type of text, bytes, packed numbers and messages.
_BYTES: Final = 2
#: Fewer bytes than this are parsed as fast by protobuf.
_WORTH_BYTES: Final = 2_048
_MORE: Final = 0x80
#: Bytes of a number that fits into 28 bits; longer ones may not fit into 32.
_LONGEST: Final = 4
#: Fields of a message looked at one by one; more are left to protobuf.
_MOST_FIELDS: Final = 4_096
#: Fields of text, bytes and packed numbers: model, tokens, tokens_packed, prompt, request_json.
_FLAT_FIELDS: Final = frozenset({1, 2, 3, 4, 16})


def score_request(data: bytes) -> pb.ScoreRequest:
    """Parse a request; long token ids arrive as ``tokens_packed``.

    Raises:
        google.protobuf.message.DecodeError: the bytes are no such message.
    """
    if len(data) < _WORTH_BYTES:
        return pb.ScoreRequest.FromString(data)
    found = _field(data)
    packed = decode(data[found[1] : found[2]]) if found is not None and found[2] - found[1] >= _WORTH_BYTES else None
    if found is None or packed is None:
        return pb.ScoreRequest.FromString(data)
    request = pb.ScoreRequest.FromString(data[: found[0]] + data[found[2] :])
    if request.tokens or request.tokens_packed:  # numbers outside of the run, or both forms at once
        return pb.ScoreRequest.FromString(data)
    request.tokens_packed = packed
    return request


def decode(varints: bytes) -> bytes | None:
    """Return numbers as little-endian u32; None when they are not all varints of at most 28 bits."""
    raw = np.frombuffer(varints, dtype=np.uint8)
    ends = np.flatnonzero(raw < _MORE)
    if not len(ends) or ends[-1] != len(raw) - 1:
        return None
    lengths = np.diff(ends, prepend=-1)
    longest = int(lengths.max())
    if longest > _LONGEST:
        return None
    low = raw & 0x7F
    # From the last byte, which has the highest bits, backwards: all numbers at once.
    numbers = low.take(ends).astype("<u4")
    for back in range(1, longest):
        numbers = np.where(lengths > back, (numbers << np.uint32(7)) | low.take(ends - back, mode="clip"), numbers)
    return numbers.astype("<u4", copy=False).tobytes()


def is_quick(data: bytes) -> bool:
    """Whether protobuf parses a ``ScoreRequest`` at once, however long: few fields, none large with much inside."""
    try:
        return all(number in _FLAT_FIELDS or end - start <= _WORTH_BYTES for number, _, start, end in _fields(data))
    except ValueError:
        return False


def _field(data: bytes) -> tuple[int, int, int] | None:
    """Find field 2: where its tag, its content and what follows begin; None when it is not there exactly once."""
    try:
        found = [(head, start, end) for number, head, start, end in _fields(data) if number == _TOKENS]
    except ValueError:
        return None
    return found[0] if len(found) == 1 and found[0][1] < found[0][2] else None


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield the fields of a message: number, where the tag begins, where the content begins and ends.

    What is no text, bytes or message has no content to point at: it begins and ends behind itself.

    Raises:
        ValueError: there are more than a few, or bytes that make no sense.
    """
    at = 0
    for _ in range(_MOST_FIELDS):
        if at >= len(data):
            return
        head = at
        tag, at = _varint(data, at)
        length, start = _varint(data, at) if at >= 0 else (0, -1)
        if start < 0 or tag & 7 not in (0, _BYTES):
            raise ValueError("not a number, and not text, bytes or a message")
        at = start + length if tag & 7 == _BYTES else start
        if at > len(data):
            raise ValueError("cut off")
        yield tag >> 3, head, start, at
    raise ValueError("many fields")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a varint and where it ends; a negative place when it is broken."""
    number = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < _MORE:
            return number, at
        shift += 7
    return 0, -1
