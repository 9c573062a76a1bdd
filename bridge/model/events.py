"""Engine events as kvatlas sees them, whatever engine and version sent them.

Adapters (``kvatlas.bridge.model.adapters``) turn payload bytes into these frozen values; everything after them is
engine-independent. An engine key (the hash an engine publishes) is an int or bytes on the wire and bytes here:
an int becomes its 8 big-endian bytes modulo 2**64, bytes stay as they are and are never truncated.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final

import msgspec

from kvatlas.bridge.model.block_key import ExtraKey


class Tier(IntEnum):
    """Where a block lives; the number is the wire value in our records, the name is what people read."""

    UNKNOWN = 0
    GPU = 1
    CPU = 2
    DISK = 3
    SHARED = 4


class Kind(IntEnum):
    """What attention a group of layers does, as far as it decides which blocks a hit needs."""

    FULL = 0
    SLIDING_WINDOW = 1
    MAMBA = 2
    CHUNKED_LOCAL = 3
    CROSS = 4
    """Encoder-only and cross attention: a prefix hit does not need this group."""


#: vLLM's ``kv_cache_spec_kind`` -> kind; another text counts as full attention (never over-credits).
KINDS: Final[Mapping[str, Kind | None]] = {
    "unknown": None,
    "full_attention": Kind.FULL,
    "mla_attention": Kind.FULL,
    "sink_full_attention": Kind.FULL,
    "sliding_window": Kind.SLIDING_WINDOW,
    "sliding_window_mla": Kind.SLIDING_WINDOW,
    "mamba": Kind.MAMBA,
    "chunked_local_attention": Kind.CHUNKED_LOCAL,
    "encoder_only_attention": Kind.CROSS,
    "cross_attention": Kind.CROSS,
}

_STORAGE_REMOTE: Final = frozenset({"REMOTE"})
_TIERS: Final = {
    "": Tier.GPU,
    "gpu": Tier.GPU,
    "cuda": Tier.GPU,
    "hbm": Tier.GPU,
    "cpu": Tier.CPU,
    "cpu_pinned": Tier.CPU,
    "cpu_tier1": Tier.CPU,
    "cpu_tier2": Tier.DISK,
    "disk": Tier.DISK,
    "nvme": Tier.DISK,
    "fs": Tier.DISK,
    "obj": Tier.SHARED,
    "object_store": Tier.SHARED,
    "shared_storage": Tier.SHARED,
    "external": Tier.SHARED,
    "network": Tier.SHARED,
    "remote": Tier.SHARED,
    "shared": Tier.SHARED,
}


def tier_of(medium: str | None, locality: str | None = None) -> Tier:
    """Return the tier of a wire *medium*; an unknown medium is ``UNKNOWN``, never the GPU."""
    name = (medium or "").lower()
    if name == "storage":
        return Tier.SHARED if (locality or "").upper() in _STORAGE_REMOTE else Tier.DISK
    return _TIERS.get(name, Tier.UNKNOWN)


def engine_key(value: int | bytes) -> bytes:
    """Return an engine key's canonical bytes (see the module's text)."""
    if isinstance(value, int):
        return (value & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "big")
    return value


class Context(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens between the last block that was announced and an event's parent: for the chain only, not resident.

    Attributes:
        parent: engine key of the last announced block, None at the start of a prompt.
        tokens: the tokens since, little-endian u32; whole blocks.
        extra: typed extra keys of each of their blocks, or empty.
        cache_salt: salt of the first of them, as in :class:`Stored`.
    """

    parent: bytes | None
    tokens: bytes
    extra: list[list[ExtraKey]] = []
    cache_salt: str | None = None


class Stored(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Blocks became available on one tier of the pod.

    Attributes:
        keys: engine keys of the blocks, in chain order.
        parent: engine key of the block before the first, None at the start of a prompt.
        tokens: token ids as little-endian u32; empty for placeholders. Token ``i * block_size_tokens`` starts
            block ``i`` only when the lengths fit; ``masked`` says that they do not.
        block_size_tokens: tokens per engine block; 0 for placeholders.
        tier: where the blocks are.
        group: KV-cache group index.
        kind: attention kind of the group; None when the event does not say, so that what is known stays.
        window_tokens: sliding window of the group, 0 when it has none.
        lora: adapter name, None for the base model.
        cache_salt: salt of the first block when ``parent`` is None and the event says it.
        extra: per block the typed extra keys (LoRA and salt taken out), or empty when no block has any.
        masked: the tokens do not line up with the keys, so no key may be derived from them.
        lookahead: the engine hashed tokens behind each block into its key, so that two keys may name one block.
        ahead: the one token behind the last block, little-endian u32, from an engine whose cache is keyed by pairs of
            tokens (speculative decoding in SGLang): a block then counts only when the token behind it is the same too.
        ownership: whose copy it is, empty for the engine's own; one owner's removal leaves the others' copies.
        unnamed: the event never carries salts, pictures and embeddings, so tokens alone do not name its blocks; what
            is known of an engine key stands.
        bare: an unnamed event that says no group either, as stores do whose keys are not the engine's own.
        context: tokens between the last announced block and ``parent``, when the event has them.
        session: hash of the client's session, of stores on the GPU; empty for none. It names no block.
    """

    keys: list[bytes]
    parent: bytes | None = None
    tokens: bytes = b""
    block_size_tokens: int = 0
    tier: Tier = Tier.GPU
    group: int = 0
    kind: Kind | None = None
    window_tokens: int = 0
    lora: str | None = None
    cache_salt: str | None = None
    extra: list[list[ExtraKey]] = []
    masked: bool = False
    lookahead: bool = False
    ahead: bytes = b""
    ownership: str = ""
    unnamed: bool = False
    bare: bool = False
    context: Context | None = None
    session: str = ""


class Removed(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Blocks are gone from one tier.

    Attributes:
        keys: engine keys of the blocks.
        tier: where they were.
        group: KV-cache group index; 0 for engines without groups.
        ownership: whose copies are gone, as in :class:`Stored`.
        remaining: copies left of each block, 0 for none, None where the engine does not know; empty when it never says.
    """

    keys: list[bytes]
    tier: Tier = Tier.GPU
    group: int = 0
    ownership: str = ""
    remaining: list[int | None] = []


class Cleared(msgspec.Struct, frozen=True, gc=False):
    """The engine dropped its whole prefix cache."""


Event = Stored | Removed | Cleared


class Rejected(msgspec.Struct, frozen=True, gc=False):
    """One event that could not be used: its own bytes and why. The rest of its batch is not touched."""

    raw: bytes
    reason: str


class Batch(msgspec.Struct, frozen=True, gc=False):
    """One decoded engine message.

    Attributes:
        timestamp: the engine's clock when it built the batch, seconds since the epoch.
        events: what happened, in order.
        rejected: events that could not be used.
        dp_rank: data-parallel rank, None when the engine does not say.
    """

    timestamp: float
    events: list[Event]
    rejected: list[Rejected]
    dp_rank: int | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that keep one bad message from costing more than itself."""

    message_bytes: int = 16 * 1024 * 1024
    events_per_batch: int = 20_000
    keys_per_batch: int = 262_144
    tokens_per_event: int = 1_048_576
    keys_per_event: int = 131_072
    group_max: int = 65_535
