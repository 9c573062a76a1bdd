"""Blocks on their way between memory and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from kvatlas.connector.files import layout
from kvatlas.connector.files.fs import Buffer


class BlockBuffers(NamedTuple):
    """A block's key and where its bytes are, or are to go: buffers that follow each other."""

    key: bytes
    parts: Sequence[Buffer]

    @property
    def size_bytes(self) -> int:
        """Payload bytes."""
        return sum(len(part) for part in self.parts)


class Written(NamedTuple):
    """A published segment: its inode and size, and the keys whose names lead to it."""

    inode: int
    size_bytes: int
    keys: tuple[bytes, ...]


class Missing(Exception):  # noqa: N818 - an answer, not an error
    """No file has the block's name, or the block in it has another size than was asked for."""


class Corrupt(Exception):  # noqa: N818 - an answer, not an error
    """A file has the block's name and is not the block; ``inode`` is that file."""

    def __init__(self, reason: str, inode: int) -> None:
        super().__init__(reason)
        self.inode = inode


def payload_sum(parts: Sequence[Buffer]) -> int:
    """Return the XXH3-64 over buffers that follow each other."""
    if len(parts) == 1:
        return layout.checksum(parts[0])
    total = xxhash.xxh3_64()
    for part in parts:
        total.update(part)
    return total.intdigest()


def copy_in(target: Buffer, parts: Sequence[Buffer]) -> None:
    """Lay ``parts`` one after the other into ``target`` and clear what is left of it."""
    at = 0
    for part in parts:
        target[at : at + len(part)] = part
        at += len(part)
    if at < len(target):
        target[at:] = bytes(len(target) - at)


def copy_out(source: Buffer, parts: Sequence[Buffer]) -> None:
    """Fill ``parts`` one after the other from ``source``."""
    at = 0
    for part in parts:
        part[:] = source[at : at + len(part)]
        at += len(part)
