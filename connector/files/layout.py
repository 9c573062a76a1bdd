"""Names and bytes on disk, without any I/O.

A root holds one directory per *fingerprint*: everything that decides whether a block's bytes mean the same thing.
Two engines that differ in any of it never see each other's files::

    <root>/<model>-<digest>/manifest.json          the fingerprint, for people and for the check at start
                            blocks/<hhh>/<key>.kv  one name per block; hhh is a hash of the key
                            staging/*.tmp          being written; never read
                            quarantine/            files that did not verify
                            usage/*.use            when blocks were last used (see usage.py)

A *segment* is a file with a header and slots of equal size, one block per slot. Each block has a name of its own;
the names of one segment's blocks are hard links of one file, so a key alone leads to its file. All integers are
little-endian; a header is a whole number of 4096-byte pages, a slot starts on a page::

    0   8  magic "KVATLAS" 01         24 16  fingerprint digest
    8   2  layout version             40 16  segment id (random)
    10  2  slots                      56  8  XXH3-64 of the header with these 8 bytes zero
    12  4  header bytes               64     entries, 80 bytes each
    16  8  slot bytes

    entry:  0 2 key length   2 62 key, zero padded   64 8 payload bytes   72 8 XXH3-64 of the payload
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple

import xxhash

from kvatlas.connector.errors import LayoutError

#: Alignment of addresses, offsets and lengths that direct I/O needs everywhere we know of (bytes).
ALIGNMENT: Final = 4096
LAYOUT_VERSION: Final = 1
MAGIC: Final = b"KVATLAS\x01"
KEY_MAX_BYTES: Final = 62
DIGEST_BYTES: Final = 16
MANIFEST_NAME: Final = "manifest.json"
BLOCKS: Final = "blocks"
STAGING: Final = "staging"
QUARANTINE: Final = "quarantine"
USAGE: Final = "usage"
BLOCK_SUFFIX: Final = ".kv"

_HEAD: Final = struct.Struct("<8sHHIQ16s16sQ")
_ENTRY: Final = struct.Struct("<H62sQQ")
_SUM_OFFSET: Final = 56

checksum = xxhash.xxh3_64_intdigest


def round_up(size: int, unit: int = ALIGNMENT) -> int:
    """Return the smallest multiple of ``unit`` that is not below ``size``."""
    return -(-size // unit) * unit


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Everything that decides whether stored bytes mean the same thing to another engine.

    Attributes:
        engine: name of the inference engine, for example ``vllm``.
        engine_version: its full version.
        model: the model's name.
        hash_algorithm: how the engine computes block hashes.
        hash_seed: the seed of those hashes; empty for the engine's fixed default.
        dtype: element type of the KV cache.
        block_size_tokens: tokens per block, one entry per KV-cache group.
        layers: per KV-cache group the layer names, in order.
        tensor_parallel, pipeline_parallel, prefill_context_parallel, decode_context_parallel: sizes.
        rank: which worker's bytes a block holds; ``all`` when it holds those of every worker.
        block_bytes: bytes of one stored block.
        memory_layout: the engine's name for the order of bytes inside a page.
        extra: anything else that the adapter knows to matter.
    """

    engine: str
    engine_version: str
    model: str
    hash_algorithm: str
    hash_seed: str
    dtype: str
    block_size_tokens: tuple[int, ...]
    layers: tuple[tuple[str, ...], ...]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    prefill_context_parallel: int = 1
    decode_context_parallel: int = 1
    rank: str = "0"
    block_bytes: int = 0
    memory_layout: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """Return the fingerprint as the manifest holds it (plain JSON values)."""
        return json.loads(json.dumps({"layout_version": LAYOUT_VERSION, **asdict(self)}))  # type: ignore[no-any-return]

    def digest(self) -> bytes:
        """Return the 16 bytes that stand for this fingerprint in names and headers."""
        canonical = json.dumps(self.manifest(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).digest()[:DIGEST_BYTES]

    def directory(self) -> str:
        """Return the name of the fingerprint's directory below the root."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "_", self.model).strip("._")[-64:] or "model"
        return f"{slug}-{self.digest().hex()}"


def encode_manifest(fingerprint: Fingerprint) -> bytes:
    """Return the manifest file's bytes."""
    return (json.dumps(fingerprint.manifest(), sort_keys=True, indent=2) + "\n").encode()


def check_manifest(data: bytes, fingerprint: Fingerprint, where: str) -> None:
    """Accept a manifest that says exactly this fingerprint.

    Raises:
        LayoutError: it is not JSON or says anything else; the text names the fields that differ.
    """
    try:
        found = json.loads(data)
    except ValueError as error:
        raise LayoutError(f"{where}: not a manifest ({error}); move the directory away") from error
    wanted = fingerprint.manifest()
    if found != wanted:
        names = sorted(set(wanted) | set(found)) if isinstance(found, dict) else ["the whole document"]
        differing = [name for name in names if not isinstance(found, dict) or found.get(name) != wanted.get(name)]
        raise LayoutError(f"{where}: written for another engine set-up, differs in {', '.join(differing)}")


def block_path(key: bytes) -> str:
    """Return a block's path below the fingerprint's directory.

    Raises:
        LayoutError: the key is empty or longer than 62 bytes.
    """
    if not 0 < len(key) <= KEY_MAX_BYTES:
        raise LayoutError(f"block key has {len(key)} bytes; 1 to {KEY_MAX_BYTES} can be stored")
    return f"{BLOCKS}/{xxhash.xxh3_64_intdigest(key) & 0xFFF:03x}/{key.hex()}{BLOCK_SUFFIX}"


def key_of(name: str) -> bytes | None:
    """Return the key that a file name stands for; None for a name that is not a block's."""
    stem = name.removesuffix(BLOCK_SUFFIX)
    if stem == name:
        return None
    try:
        key = bytes.fromhex(stem)
    except ValueError:
        return None
    return key if 0 < len(key) <= KEY_MAX_BYTES else None


class Slot(NamedTuple):
    """One block in a segment: its key, its payload's size in bytes and checksum."""

    key: bytes
    length: int
    sum: int


class Header(NamedTuple):
    """A decoded segment header."""

    fingerprint: bytes
    segment_id: bytes
    header_bytes: int
    slot_bytes: int
    slots: tuple[Slot, ...]

    @property
    def file_bytes(self) -> int:
        """The exact size that a complete segment has."""
        return self.header_bytes + self.slot_bytes * len(self.slots)

    def find(self, key: bytes) -> int | None:
        """Return the number of the slot that holds ``key``."""
        return next((number for number, slot in enumerate(self.slots) if slot.key == key), None)


def header_bytes(slots: int) -> int:
    """Return the header's size in bytes for a number of slots."""
    return round_up(_HEAD.size + slots * _ENTRY.size)


def encode_header(fingerprint: bytes, segment_id: bytes, slot_bytes: int, slots: Sequence[Slot]) -> bytes:
    """Return a segment's header.

    Args:
        fingerprint: 16 bytes, :meth:`Fingerprint.digest`.
        segment_id: 16 random bytes.
        slot_bytes: size of every slot, a multiple of 4096.
        slots: what the slots hold, in order.
    """
    size = header_bytes(len(slots))
    data = bytearray(size)
    _HEAD.pack_into(data, 0, MAGIC, LAYOUT_VERSION, len(slots), size, slot_bytes, fingerprint, segment_id, 0)
    for number, slot in enumerate(slots):
        _ENTRY.pack_into(data, _HEAD.size + number * _ENTRY.size, len(slot.key), slot.key, slot.length, slot.sum)
    struct.pack_into("<Q", data, _SUM_OFFSET, checksum(data))
    return bytes(data)


def peek_header_bytes(page: bytes | bytearray | memoryview) -> int:
    """Return how many bytes the header that starts with ``page`` has.

    Raises:
        LayoutError: the page does not start a segment.
    """
    if len(page) < _HEAD.size:
        raise LayoutError(f"header cut off after {len(page)} bytes")
    magic, version, slots, size, *_ = _HEAD.unpack_from(page)
    if magic != MAGIC:
        raise LayoutError("not a segment (magic)")
    if version != LAYOUT_VERSION:
        raise LayoutError(f"layout version {version}; this build reads {LAYOUT_VERSION}")
    if not slots or size != header_bytes(slots):
        raise LayoutError(f"header says {slots} slots in {size} bytes")
    return int(size)


def decode_header(data: bytes | bytearray | memoryview, fingerprint: bytes) -> Header:
    """Return a header after checking everything it says about itself.

    Raises:
        LayoutError: cut off, foreign, of another fingerprint or corrupt; the text says which.
    """
    size = peek_header_bytes(data)
    if len(data) < size:
        raise LayoutError(f"header cut off after {len(data)} of {size} bytes")
    blank = bytearray(data[:size])
    _, _, count, _, slot_bytes, found, segment_id, expected = _HEAD.unpack_from(blank)
    struct.pack_into("<Q", blank, _SUM_OFFSET, 0)
    if checksum(blank) != expected:
        raise LayoutError("header checksum is wrong")
    if found != fingerprint:
        raise LayoutError(f"belongs to fingerprint {found.hex()}")
    if slot_bytes % ALIGNMENT:
        raise LayoutError(f"slot of {slot_bytes} bytes is not a whole number of pages")
    slots = []
    for number in range(count):
        key_length, key, length, total = _ENTRY.unpack_from(blank, _HEAD.size + number * _ENTRY.size)
        if not 0 < key_length <= KEY_MAX_BYTES or length > slot_bytes:
            raise LayoutError(f"slot {number} says key of {key_length} bytes, payload of {length}")
        slots.append(Slot(key[:key_length], length, total))
    return Header(found, segment_id, size, slot_bytes, tuple(slots))
