"""Object format: a block as the one-slot segment that the file tier writes. Pure.

So the files of a folder, one block each, can be copied to a bucket and back.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout
from kvatlas.connector.files.blocks import BlockBuffers, Missing, payload_sum
from kvatlas.connector.files.fs import Buffer
from kvatlas.connector.files.layout import Header, Slot

#: Bytes of the header of a segment with one slot.
HEAD_BYTES = layout.header_bytes(1)


class Damaged(Exception):  # noqa: N818 - an answer, not an error
    """An object has the block's name and is not the block."""


def object_bytes(payload_bytes: int) -> int:
    """Return the size of the object that holds a payload."""
    return HEAD_BYTES + layout.round_up(payload_bytes)


def encode(fingerprint: bytes, block: BlockBuffers, random_bytes: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return the object of a block. The copy is the request's own: a block's memory may change once its store ended."""
    size = block.size_bytes
    slot_bytes = layout.round_up(size)
    slot = Slot(block.key, size, payload_sum(block.parts))
    header = layout.encode_header(fingerprint, random_bytes(16), slot_bytes, [slot])
    return b"".join((header, *block.parts, bytes(slot_bytes - size)))


def check_header(head: Buffer, size_bytes: int, fingerprint: bytes, key: bytes) -> Slot:
    """Return what a header says of a block, after checking that the object is exactly that block's.

    Raises:
        Damaged: cut off, foreign, of another fingerprint or another block, or of another size than it says.
        Missing: a good segment that holds more than this block.
    """
    try:
        header: Header = layout.decode_header(head, fingerprint)
    except LayoutError as error:
        raise Damaged(str(error)) from error
    if header.file_bytes != size_bytes:
        raise Damaged(f"object has {size_bytes} bytes, its header says {header.file_bytes}")
    if header.find(key) is None:
        raise Damaged("the object holds other blocks")
    if len(header.slots) > 1:
        raise Missing("a segment of several blocks, copied from a folder; one block an object is read")
    return header.slots[0]


def check_length(slot: Slot, wanted_bytes: int) -> None:
    """Accept a block of the size that is wanted.

    Raises:
        Missing: it is a good block of another size.
    """
    if slot.length != wanted_bytes:
        raise Missing(f"the stored block has {slot.length} bytes, {wanted_bytes} are wanted")


def check_payload(slot: Slot, pieces: list[Buffer]) -> list[Buffer]:
    """Return a slot's payload, in pieces that follow each other, after checking its checksum.

    Raises:
        Damaged: it is wrong.
    """
    payload: list[Buffer] = []
    left = slot.length
    for piece in pieces:
        payload.append(piece[:left])
        left -= len(payload[-1])
    if left or payload_sum(payload) != slot.sum:
        raise Damaged("payload checksum is wrong")
    return payload


def fill(block: BlockBuffers, payload: list[Buffer]) -> None:
    """Copy a verified payload to where its block wants it."""
    at = 0
    target = list(block.parts)
    for piece in payload:
        rest = piece
        while len(rest):
            free = target[0][at:]
            step = min(len(free), len(rest))
            free[:step] = rest[:step]
            rest = rest[step:]
            at += step
            if at == len(target[0]):
                target.pop(0)
                at = 0
