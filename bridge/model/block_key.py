"""Block keys: the engine-independent name of a block of KV cache.

The only place where kvatlas hashes tokens. A key chains from a root over fixed runs of tokens::

    root  = XXH3-128( msgpack [KEY_VERSION, model, lora or nil, cache salt or nil] )
    key_i = XXH3-128( key_(i-1) | tokens of block i as little-endian u32 | extra keys of block i )

Keys are 16 bytes, the big-endian digest. Extra keys are the canonical msgpack of a sorted list; a block
without extra keys adds no bytes. XXH3 is not a cryptographic hash: a key is a routing hint and must never
grant access to data.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from struct import iter_unpack
from types import MappingProxyType
from typing import Final

import msgspec
import xxhash

KEY_VERSION: Final = 1
KEY_BYTES: Final = 16
TOKEN_BYTES: Final = 4

_digest = xxhash.xxh3_128_digest
_encode = msgspec.msgpack.Encoder(order="deterministic").encode

#: One extra key of one block: ``("mm", item hash, offset of the item's first token relative to the block)``,
#: ``("wide", token id above 32 bits, its offset in the block)`` or ``("raw", the engine's value)`` for what has no
#: type of ours.
ExtraKey = tuple[str, object] | tuple[str, object, int]


def root_key(model: str, lora: str | None = None, cache_salt: str | None = None) -> bytes:
    """Return the key that the first block of a prompt chains from (16 bytes)."""
    return _digest(_encode((KEY_VERSION, model, lora or None, cache_salt or None)))


def tenant_of(cache_salt: str) -> str:
    """Return the hash by which records name a cache salt, empty for none; salts themselves go no further."""
    return hashlib.sha256(cache_salt.encode("utf-8", "surrogateescape")).hexdigest()[:32] if cache_salt else ""


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Pack token ids as little-endian u32.

    Raises:
        OverflowError: a token id is negative or above 2**32 - 1.
        TypeError: a token id is not an integer.
    """
    packed = array("I", token_ids)
    if packed.itemsize != TOKEN_BYTES or _BIG_ENDIAN:  # pragma: no branch - one byte order per machine
        return b"".join(token.to_bytes(TOKEN_BYTES, "little") for token in token_ids)
    return packed.tobytes()


def pack_wide_tokens(token_ids: Sequence[int]) -> tuple[bytes, dict[int, int]]:
    """Pack token ids of up to 64 bits: their low 32 bits as :func:`pack_tokens`, and the whole ids of wide ones.

    Engines that put a picture's hash in place of its tokens use ids above 32 bits. The key of a block has them as
    ``("wide", id, offset)`` extra keys.

    Returns:
        The packed low halves, and position -> id of the tokens above 2**32 - 1.

    Raises:
        OverflowError: a token id is negative or above 2**64 - 1.
        TypeError: a token id is not an integer.
    """
    wide = {at: token for at, token in enumerate(token_ids) if token > _TOKEN_MAX}
    if any(token > _WIDE_MAX for token in wide.values()):
        raise OverflowError("token id is above 2**64 - 1")
    return pack_tokens([token & _TOKEN_MAX if token > _TOKEN_MAX else token for token in token_ids]), wide


def wide_extra(wide: Mapping[int, int], block_size_tokens: int, blocks: int) -> list[list[ExtraKey]]:
    """Return the extra keys of each block that wide tokens of :func:`pack_wide_tokens` make."""
    extra: list[list[ExtraKey]] = [[] for _ in range(blocks)]
    for at, token in wide.items():
        number, offset = divmod(at, block_size_tokens)
        if number < blocks:
            extra[number].append(("wide", token, offset))
    return extra


def ahead_key(key: bytes, next_token: bytes) -> bytes:
    """Return the name of a block together with the token behind it (4 bytes, little-endian).

    Engines whose cache is keyed by pairs of tokens hold a block only for prompts that go on with the same token.
    """
    return _digest(key + b"\x01ahead" + next_token)


def ahead_keys(keys: Sequence[bytes], packed: bytes, block_size_tokens: int) -> list[bytes]:
    """Return :func:`ahead_key` of a prompt's blocks; a last block with no token behind it has none.

    Args:
        keys: the block keys from :func:`block_keys`.
        packed: the prompt's tokens, from its start.
        block_size_tokens: tokens in one block.
    """
    step = block_size_tokens * TOKEN_BYTES
    ends = range(step, (len(keys) + 1) * step, step)
    return [
        ahead_key(key, packed[end : end + TOKEN_BYTES])
        for key, end in zip(keys, ends, strict=True)
        if end + TOKEN_BYTES <= len(packed)
    ]


_TOKEN_MAX: Final = (1 << 32) - 1
_WIDE_MAX: Final = (1 << 64) - 1
_BIG_ENDIAN: Final = array("H", [1]).tobytes() != b"\x01\x00"


def encode_extra(extra: Sequence[ExtraKey]) -> bytes:
    """Return the canonical bytes of a block's extra keys; empty for none.

    The order in which an engine lists them carries no meaning, so they are sorted by their encoding.
    """
    if not extra:
        return b""
    return b"".join([b"\x00", *sorted(_encode(item) for item in extra)])


def chain(parent: bytes, packed_block: bytes, extra: bytes = b"") -> bytes:
    """Return the key of one block after ``parent``.

    Args:
        parent: 16 bytes: the previous block's key, or the root.
        packed_block: the block's tokens from :func:`pack_tokens`.
        extra: the block's extra keys from :func:`encode_extra`.
    """
    return _digest(parent + packed_block + extra)


def block_keys(
    parent: bytes,
    packed: bytes,
    block_size_tokens: int,
    extra: Mapping[int, bytes] | None = None,
) -> list[bytes]:
    """Return the keys of all full blocks in ``packed`` (little-endian u32); a trailing partial block has none.

    Args:
        parent: the key to chain from (a root, or the last key of what came before).
        packed: token ids from :func:`pack_tokens`.
        block_size_tokens: tokens in one block.
        extra: block number -> bytes from :func:`encode_extra`, for the blocks that have any.
    """
    step = block_size_tokens * TOKEN_BYTES
    # Cut in C: half of the time of slices, and hashing a block takes less than cutting it off did.
    blocks = iter_unpack(f"{step}s", memoryview(packed)[: len(packed) // step * step])
    digest = _digest
    key = parent
    if not extra:
        return [key := digest(key + block) for (block,) in blocks]
    return [key := digest(key + block + extra.get(number, b"")) for number, (block,) in enumerate(blocks)]


def partition_of(key: bytes, partitions: int) -> int:
    """Return the ``kv-blocks`` partition that owns a block key."""
    return int.from_bytes(key[:4], "big") % partitions


def multimodal_extra(
    items: Sequence[tuple[str, int, int]],
    block_size_tokens: int,
    blocks: int,
    wide: Mapping[int, int] = MappingProxyType({}),
) -> dict[int, bytes]:
    """Return the extra keys of the blocks that multimodal placeholders touch, and those of wide tokens.

    Args:
        items: ``(item hash, offset, length)`` per item, in tokens of the prompt.
        block_size_tokens: tokens in one block.
        blocks: number of full blocks in the prompt.
        wide: position -> token, from :func:`pack_wide_tokens`.

    Returns:
        Block number -> canonical bytes, for :func:`block_keys`.
    """
    per_block: dict[int, list[ExtraKey]] = {}
    for identifier, offset, length in items:
        first, last = offset // block_size_tokens, (offset + length - 1) // block_size_tokens
        for number in range(max(first, 0), min(last, blocks - 1) + 1):
            relative = offset - number * block_size_tokens
            per_block.setdefault(number, []).append(("mm", identifier, relative))
    for at, token in wide.items():
        number, offset = divmod(at, block_size_tokens)
        if number < blocks:
            per_block.setdefault(number, []).append(("wide", token, offset))
    return {number: encode_extra(extra) for number, extra in per_block.items()}
