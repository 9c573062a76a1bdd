"""Holders: the values of the block index.

A *holder* says that a pod has a block on a tier, in one group, as of an epoch. 24 bytes, big-endian::

    0        8      10   11    12            16       24
    | pod ref | group | tier | kind | window tokens | epoch |

The highest bit of the kind, :data:`ASSUMED`, says that the block's name was concluded from its tokens alone, from an
event that could not say salts and pictures: it counts nothing once the pod is known to use those.

The first 11 bytes are its identity: (pod, group, tier) holds a block once. A ``block_index`` value is its holders
one after the other, sorted as bytes, so equal sets of holders are equal bytes and a walk over a prompt compares
neighbours with one comparison. For tier ``SHARED`` the reference is that of the store, not of a pod, and the epoch
is 0: the block outlives the pod that put it there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from kvatlas.bridge.model.events import Tier

HOLDER: Final = struct.Struct(">QHBBIQ")
HOLDER_BYTES: Final = HOLDER.size
IDENTITY_BYTES: Final = 11
POD_BYTES: Final = 8
ASSUMED: Final = 0x80
TIER_AT: Final = 10
EPOCH_AT: Final = 16

pack_holder = HOLDER.pack

_TIERS: Final = bytes(int(tier) for tier in Tier)


def are_holders(value: bytes) -> bool:
    """Tell whether bytes are holders, one after the other, on tiers that are known here."""
    return len(value) % HOLDER_BYTES == 0 and not value[TIER_AT::HOLDER_BYTES].translate(None, _TIERS)


class Holder(NamedTuple):
    """One decoded holder; see the module's text. ``kind`` may have the bit :data:`ASSUMED`."""

    pod_ref: int
    group: int
    tier: int
    kind: int
    window_tokens: int
    epoch: int


def readable(value: bytes | None, absent: bytes | None = b"") -> bytes | None:
    """Return a table value from elsewhere: ``absent`` for none, None (no answer) for one that is no holders."""
    if not value:
        return absent
    return None if len(value) % HOLDER_BYTES else value


def holders(value: bytes) -> Iterator[Holder]:
    """Yield the holders of a table value."""
    for fields in HOLDER.iter_unpack(value):
        yield Holder(*fields)


def add_holder(value: bytes, holder: bytes) -> bytes:
    """Return ``value`` with ``holder`` in place; an older epoch never replaces a newer one."""
    at = _find(value, holder[:IDENTITY_BYTES])
    if at < 0:
        at = _slot(value, holder)
        return value[:at] + holder + value[at:]
    if value[at + EPOCH_AT : at + HOLDER_BYTES] > holder[EPOCH_AT:]:
        return value
    return value[:at] + holder + value[at + HOLDER_BYTES :]


def remove_holder(value: bytes, holder: bytes) -> bytes:
    """Return ``value`` without ``holder``; a removal of an older epoch leaves a newer entry alone."""
    at = _find(value, holder[:IDENTITY_BYTES])
    if at < 0 or value[at + EPOCH_AT : at + HOLDER_BYTES] > holder[EPOCH_AT:]:
        return value
    return value[:at] + value[at + HOLDER_BYTES :]


def _find(value: bytes, identity: bytes) -> int:
    """Return where the holder of an identity begins, -1 without one; only a match aligned to a holder counts."""
    at = value.find(identity)
    while at > 0 and at % HOLDER_BYTES:
        at = value.find(identity, at + 1)
    return at


def _slot(value: bytes, holder: bytes) -> int:
    """Return where a holder of a new identity belongs, by bisection: blocks of a common prompt have hundreds."""
    low, high = 0, len(value) // HOLDER_BYTES
    while low < high:
        middle = (low + high) // 2
        at = middle * HOLDER_BYTES
        if value[at : at + HOLDER_BYTES] < holder:
            low = middle + 1
        else:
            high = middle
    return low * HOLDER_BYTES
