"""LMCache's cache events (Kafka, version 0.5.6) into frozen batches: which chunks a cache server has, and where.

A record's key is the server's instance id, its value JSON ``{"batches": [batch]}``. Unknown fields are ignored, other
event types than :data:`STORE` and :data:`DELETE` move nothing.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from kvatlas.bridge.errors import WireError

STORE: Final = "store"
DELETE: Final = "delete"
#: The tier of a server's own memory, which its restart empties.
HOST: Final = "l1"

_ENTRIES_MAX: Final = 20_000
_TEXT_MAX: Final = 1024
_Text = Annotated[str, Meta(max_length=_TEXT_MAX)]
_Hash = Annotated[str, Meta(max_length=128, pattern="^([0-9a-f]{2})+$")]
_Token = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Number = Annotated[int, Meta(ge=0, lt=1 << 62)]


class ChunkKey(msgspec.Struct, frozen=True, gc=False):
    """What a server calls one rank's part of a chunk.

    Attributes:
        kv_rank: ``world size << 24 | rank << 16 | local world size << 8 | local rank``.
        object_group_id: part of a hybrid model's cache.
        cache_salt: the request's, empty for none. An adapter is nowhere.
    """

    chunk_hash_hex: _Hash
    model_name: _Text
    kv_rank: Annotated[int, Meta(ge=0, lt=1 << 32)] = 1 << 24
    object_group_id: Annotated[int, Meta(ge=0, lt=1 << 16)] = 0
    cache_salt: _Text = ""

    @property
    def chunk(self) -> bytes:
        """The chunk's hash."""
        return bytes.fromhex(self.chunk_hash_hex)

    @property
    def part(self) -> tuple[int, int, int]:
        """World size, rank and group."""
        return self.kv_rank >> 24, self.kv_rank >> 16 & 0xFF, self.object_group_id


class ChunkEntry(msgspec.Struct, frozen=True, gc=False):
    """One part of a chunk in an event; ``token_offset`` is -1 where the server no longer knows the tokens."""

    key: ChunkKey
    token_ids: Annotated[list[_Token], Meta(max_length=1 << 16)] = []
    token_offset: Annotated[int, Meta(ge=-1, lt=1 << 40)] = -1


class CacheBatch(msgspec.Struct, frozen=True, gc=False):
    """One event of one server.

    Attributes:
        incarnation: when the server began, seconds.
        seq: counts its batches from 1.
        tier: ``l1`` or ``l2``.
        backend: what keeps it: ``dram``, ``fs``, ``s3``, ...
        shared: several servers mount that pool.
        ts: the server's clock, seconds.
    """

    instance_id: Annotated[str, Meta(min_length=1, max_length=_TEXT_MAX)]
    incarnation: _Number
    seq: _Number
    event_type: str
    tier: str = ""
    backend: _Text = ""
    entries: Annotated[list[ChunkEntry], Meta(max_length=_ENTRIES_MAX)] = []
    shared: bool = False
    ts: float = 0.0


class _Envelope(msgspec.Struct, frozen=True):
    batches: Annotated[list[CacheBatch], Meta(max_length=_ENTRIES_MAX)]


_decoder: Final = msgspec.json.Decoder(_Envelope)


def decode_cache_events(value: bytes) -> list[CacheBatch]:
    """Read a record's value.

    Raises:
        WireError: it is none; the field is named.
    """
    try:
        return _decoder.decode(value).batches
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not an LMCache cache event: {error}") from error
