"""HTTP/2 frames and gRPC messages as bytes: what one connection of a gRPC server reads and writes. Pure.

A frame is a head of nine bytes and what it carries (RFC 9113)::

    length 3 | type 1 | flags 1 | stream 4 (highest bit ignored) | payload

A gRPC message is five bytes (compressed 1 | length 4) and the message; messages ignore the borders of frames.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

import hpack

Bytes = bytes | memoryview

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_BYTES: Final = 9
#: Payload of a frame that every peer takes, and the most that is taken here: RFC 9113's default.
PAYLOAD_BYTES: Final = 16_384
#: A window that nobody has said anything about.
WINDOW_BYTES: Final = 65_535
LARGEST_WINDOW: Final = 2**31 - 1
#: Before each gRPC message.
PREFIX_BYTES: Final = 5
#: Largest block of headers that is taken, as it comes and decoded.
HEADERS_BYTES: Final = 65_536

# Types of frames.
DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

# Flags.
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
HAS_PRIORITY: Final = 0x20

# Settings.
MAX_STREAMS: Final = 3
INITIAL_WINDOW: Final = 4
MAX_FRAME: Final = 5
MAX_HEADERS: Final = 6

# Error codes.
NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
FLOW_CONTROL_ERROR: Final = 3
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
COMPRESSION_ERROR: Final = 9
ENHANCE_YOUR_CALM: Final = 11

_HEAD: Final = struct.Struct(">BHBBL")
#: Blocks of headers remembered; a gateway has one, as a rule.
_MOST_BLOCKS: Final = 64


class Http2Error(Exception):
    """The peer breaks the protocol: the connection ends with this code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class MessageError(Exception):
    """A message that is not taken, by its size or form."""


def head(length: int, kind: int, flags: int, stream: int) -> bytes:
    """Return a frame's head."""
    return _HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame."""
    return head(len(payload), kind, flags, stream) + payload


def numbered(kind: int, stream: int, number: int) -> bytes:
    """Return a frame that carries a number: a WINDOW_UPDATE or RST_STREAM."""
    return frame(kind, 0, stream, number.to_bytes(4, "big"))


def read_head(data: bytes, at: int) -> tuple[int, int, int, int]:
    """Return length, type, flags and stream of the frame whose head begins at a place.

    Raises:
        Http2Error: it is larger than what was agreed on.
    """
    high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
    if high or low > PAYLOAD_BYTES:
        raise Http2Error(FRAME_SIZE_ERROR, f"a frame of {high << 16 | low} bytes")
    return low, kind, flags, stream & 0x7FFFFFFF


def settings(values: Mapping[int, int]) -> bytes:
    """Return a frame of settings."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HL", name, value) for name, value in values.items()))


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """Yield settings by number.

    Raises:
        Http2Error: it is no list of settings, or a value is not allowed.
    """
    if len(payload) % 6:
        raise Http2Error(FRAME_SIZE_ERROR, f"settings of {len(payload)} bytes")
    for name, value in struct.iter_unpack(">HL", payload):
        if name == INITIAL_WINDOW and value > LARGEST_WINDOW:
            raise Http2Error(FLOW_CONTROL_ERROR, f"an initial window of {value} bytes")
        if name == MAX_FRAME and not PAYLOAD_BYTES <= value < 1 << 24:
            raise Http2Error(PROTOCOL_ERROR, f"frames of {value} bytes")
        yield name, value


def number_of(payload: bytes) -> int:
    """Return the number that a WINDOW_UPDATE or RST_STREAM carries.

    Raises:
        Http2Error: it carries something else.
    """
    if len(payload) != 4:
        raise Http2Error(FRAME_SIZE_ERROR, f"{len(payload)} bytes instead of a number")
    return int.from_bytes(payload, "big") & 0x7FFFFFFF


def unpadded(payload: bytes, flags: int, *, priority: bool = False) -> bytes:
    """Return a payload without padding and priority.

    Raises:
        Http2Error: it is shorter than it says.
    """
    begin, end = 0, len(payload)
    if flags & PADDED:
        begin, end = 1, end - (payload[0] if payload else 1)
    if priority and flags & HAS_PRIORITY:
        begin += 5
    if begin > end:
        raise Http2Error(PROTOCOL_ERROR, "a frame shorter than its padding")
    return payload[begin:end]


class HeaderBlocks:
    """Decodes the blocks of headers of one connection.

    A block that puts nothing into the table is decoded once: a gateway's calls to a picker differ in nothing but their
    messages.
    """

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=HEADERS_BYTES)
        self._known: dict[bytes, Mapping[bytes, bytes]] = {}

    def of(self, block: bytes) -> Mapping[bytes, bytes]:
        """Return headers by name; of repeated ones the last.

        Raises:
            Http2Error: it is no block of headers, or a very large one.
        """
        if (known := self._known.get(block)) is not None:
            return known
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.HPACKError as error:
            raise Http2Error(COMPRESSION_ERROR, f"headers that cannot be read: {error}") from error
        found = MappingProxyType({bytes(field[0]): bytes(field[1]) for field in fields})
        kept = _leaves_table(block)
        if not kept or len(self._known) >= _MOST_BLOCKS:
            self._known.clear()
        if kept:
            self._known[block] = found
        return found


def _leaves_table(block: bytes) -> bool:
    """Whether a block that was decoded has nothing that goes into the table, or makes it smaller."""
    at = 0
    while at < len(block):
        if block[at] & 0x80:
            _, at = _integer(block, at, 0x7F)
            continue
        if block[at] & 0x60:
            return False
        name, at = _integer(block, at, 0x0F)
        for _ in range(1 if name else 2):
            length, at = _integer(block, at, 0x7F)
            at += length
    return True


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """Return a number that begins in the bits of a mask, and the place behind it (RFC 7541, 5.1)."""
    value, at = block[at] & mask, at + 1
    if value < mask:
        return value, at
    for shift in range(0, 64, 7):
        byte = block[at + shift // 7]
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + shift // 7 + 1
    return value, len(block)


def _literal(name: bytes, value: bytes) -> bytes:
    """Return a header that leaves the peer's table as it is; name and value shorter than 127 bytes."""
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


#: ``:status: 200`` of the static table, and what gRPC wants beside it.
ANSWER_HEADERS: Final = b"\x88" + _literal(b"content-type", b"application/grpc")
_OK: Final = _literal(b"grpc-status", b"0")


def trailers(status: int, text: str) -> bytes:
    """Return the block of headers that ends a call."""
    if not status:
        return _OK
    safe = "".join(each if " " <= each <= "~" and each != "%" else "?" for each in text)[:120]
    return _literal(b"grpc-status", b"%d" % status) + _literal(b"grpc-message", safe.encode())


def message_frames(stream: int, message: bytes, most_bytes: int) -> list[Bytes]:
    """Return a gRPC message as frames of a stream: heads and pieces in turn."""
    size = len(message) + PREFIX_BYTES
    start = b"\x00" + len(message).to_bytes(4, "big")
    if size <= most_bytes:
        return [head(size, DATA, 0, stream) + start, message]
    view = memoryview(message)
    first = most_bytes - PREFIX_BYTES
    found: list[Bytes] = [head(most_bytes, DATA, 0, stream) + start, view[:first]]
    for at in range(first, len(message), most_bytes):
        piece = view[at : at + most_bytes]
        found += (head(len(piece), DATA, 0, stream), piece)
    return found


class Messages:
    """Puts the messages of one call together from what its frames carry.

    Args:
        most_bytes: larger messages are not taken.

    Attributes:
        held: bytes of a message that is not whole.
    """

    def __init__(self, most_bytes: int) -> None:
        self.held = 0
        self._most = most_bytes
        self._parts: list[bytes] = []
        self._need = 0  # of the message that is coming; 0 before its five bytes are here

    def feed(self, piece: bytes) -> list[bytes]:
        """Take what a frame carries; returns the messages that are whole now.

        Raises:
            MessageError: a message is too large or compressed.
        """
        found: list[bytes] = []
        self._parts.append(piece)
        self.held += len(piece)
        while self.held >= (self._need or PREFIX_BYTES):
            if not self._need:
                data = b"".join(self._parts)
                self._need = self._length(data)
                data = data[PREFIX_BYTES:]
                self._parts, self.held = [data], len(data)
                if self.held < self._need:
                    break
            else:
                data = b"".join(self._parts)
            found.append(data[: self._need])
            data = data[self._need :]
            self._parts, self.held, self._need = [data], len(data), 0
        return found

    def _length(self, data: bytes) -> int:
        length = int.from_bytes(data[1:PREFIX_BYTES], "big")
        if data[0]:
            raise MessageError("messages are not taken compressed")
        if length > self._most:
            raise MessageError(f"a message of {length} bytes; at most {self._most}")
        return length
