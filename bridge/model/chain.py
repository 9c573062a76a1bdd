"""From engine blocks to canonical block keys, whatever the two sizes.

Engine blocks of E tokens are laid over canonical blocks of C tokens. A canonical block ends in exactly one engine
block; that one names it. What lies behind the last canonical boundary is the *tail*, which the next engine block
goes on from::

    C = 4, E = 3:   | 0 1 2 | 3 4 5 | 6 7 8 |      engine blocks a, b, c
                    | 0 1 2 3 | 4 5 6 7 | 8 ..     a names none, b names the first, c the second

An engine whose cache is keyed by pairs of tokens has a block only for prompts that also go on with the same token:
what the index knows is then the block's name together with that token, while the chain goes on from its plain key.

Offsets of multimodal items are relative to the engine block on the wire and to the canonical block in its key. The
length of a placeholder is not on the wire: with E > C an item counts from the canonical block it begins in to the end
of the engine block, so canonical blocks behind its end carry it too and match no prompt of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import unpack_from
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.block_key import KEY_BYTES, TOKEN_BYTES, ExtraKey, ahead_key, chain, encode_extra

_MAX_OFFSET: Final = 1 << 40
#: Of so many keys on one call is faster than a slice each.
_MANY_KEYS: Final = 8
_KEY: Final = f"{KEY_BYTES}s"


class Tail(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where the next engine block goes on.

    Attributes:
        key: the last canonical block key, or the root.
        tokens: tokens behind its end, little-endian u32.
        extra: typed extra keys among them, offsets relative to the open canonical block.
        members: engine keys that those tokens belong to, in order.
    """

    key: bytes
    tokens: bytes = b""
    extra: list[Any] = []
    members: list[bytes] = []


def check_extra(extra: Sequence[Sequence[ExtraKey]]) -> None:
    """Refuse extra keys that no key can be made of, before anything is written.

    Raises:
        WireError: an offset is out of range, or a value has no canonical bytes.
    """
    for items in extra:
        for item in items:
            if item[0] == "mm" and len(item) == 3:
                offset: object = item[2]
                if type(offset) is int and abs(offset) > _MAX_OFFSET:
                    raise WireError(f"extra_keys: multimodal offset {offset} is out of range")
            try:
                encode_extra([item])
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise WireError(f"extra_keys: {item[0]} value has no canonical bytes: {error}") from error


def canonical_extra(items: Iterable[ExtraKey]) -> bytes:
    """Return the canonical bytes of one block's extra keys; each counts once, however often it is named."""
    return encode_extra(list(_distinct(items)))


def block_extra(extra: Sequence[Sequence[ExtraKey]], size_tokens: int) -> dict[int, bytes]:
    """Return the extra bytes by block when engine blocks are canonical blocks."""
    return {number: canonical_extra(_inside(items, size_tokens)) for number, items in enumerate(extra) if items}


def extend(
    tail: Tail,
    engine_key: bytes,
    tokens: bytes,
    extra: Sequence[ExtraKey],
    canonical_tokens: int,
    *,
    ahead: bytes = b"",
) -> tuple[bytes, list[bytes], Tail]:
    """Lay one engine block behind a tail.

    Args:
        tail: what came before.
        engine_key: the block's engine key.
        tokens: its tokens, little-endian u32.
        extra: its typed extra keys, offsets relative to it.
        canonical_tokens: canonical block size.
        ahead: the token behind it, of engines whose blocks also depend on that one; its canonical blocks then have
            the names of :func:`~kvatlas.bridge.model.block_key.ahead_key`.

    Returns:
        The packed names of the canonical blocks that end in it, the engine keys before it in the first of them, and
        the tail behind it.
    """
    step = canonical_tokens * TOKEN_BYTES
    packed = tail.tokens + tokens
    ours = _moved(_inside(extra, len(tokens) // TOKEN_BYTES), len(tail.tokens) // TOKEN_BYTES)
    blocks, rest = divmod(len(packed), step)
    if not blocks:
        merged = list(_distinct([*tail.extra, *ours]))
        return b"", [], Tail(tail.key, packed, merged, [*tail.members, engine_key])
    key = tail.key
    keys: list[bytes] = []
    behind = packed + ahead
    for number in range(blocks):
        touching = _inside(_moved(ours, -number * canonical_tokens), canonical_tokens)
        items = [*tail.extra, *touching] if number == 0 else touching
        end = (number + 1) * step
        key = chain(key, packed[number * step : end], canonical_extra(items))
        keys.append(ahead_key(key, behind[end : end + TOKEN_BYTES]) if ahead else key)
    if not rest:
        return b"".join(keys), tail.members, Tail(key)
    open_extra = list(_distinct(_moved(ours, -blocks * canonical_tokens)))
    return b"".join(keys), tail.members, Tail(key, packed[blocks * step :], open_extra, [engine_key])


def split_keys(packed: bytes) -> list[bytes]:
    """Split packed block keys; a rest that is no whole key comes last."""
    whole = len(packed) // KEY_BYTES
    if whole < _MANY_KEYS:
        return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]
    keys = list(unpack_from(_KEY * whole, packed))
    return keys if len(packed) == whole * KEY_BYTES else [*keys, packed[whole * KEY_BYTES :]]


def _inside(items: Iterable[ExtraKey], size_tokens: int) -> list[ExtraKey]:
    """Return the items that begin before a block's end; engines that hash ahead name later ones too."""
    return [item for item in items if not (_placed(item) and item[2] >= size_tokens)]  # type: ignore[misc]


def _moved(items: Iterable[ExtraKey], by_tokens: int) -> list[ExtraKey]:
    """Return items with offsets from a block further on; a wide token of an earlier block is not among them."""
    moved: list[ExtraKey] = []
    for item in items:
        if not _placed(item):
            moved.append(item)
        elif item[0] == "mm" or item[2] + by_tokens >= 0:  # type: ignore[misc]
            moved.append((item[0], item[1], item[2] + by_tokens))  # type: ignore[misc]
    return moved


def _placed(item: ExtraKey) -> bool:
    return item[0] in ("mm", "wide") and len(item) == 3 and type(item[2]) is int


def _distinct(items: Iterable[ExtraKey]) -> Iterable[ExtraKey]:
    return {encode_extra([item]): item for item in items}.values()
