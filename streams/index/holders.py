"""Bytes of the block index: holders, table values and ``kv-blocks`` records.

A *holder* says that a pod has a block on a tier, in one group, as of an epoch. 24 bytes, big-endian::

    0        8      10   11    12            16       24
    | pod ref | group | tier | kind | window tokens | epoch |

The first 11 bytes are its identity: (pod, group, tier) holds a block once. A ``block_index`` value is its holders
one after the other, sorted as bytes, so equal sets of holders are equal bytes and a walk over a prompt compares
neighbours with one comparison. For tier ``SHARED`` the reference is that of the store, not of a pod, and the epoch
is 0: the block outlives the pod that put it there.

A ``kv-blocks`` record is one msgpack array of packed columns, so that it decodes with slices::

    [1, runs, keys, ops, holders, receive_ns]

``keys`` has 16 bytes an update, ``ops`` 1, ``holders`` 24. ``runs`` has 36 bytes a pod, in the order of the updates::

    | pod ref 8 | epoch 8 | first sequence 8 | last sequence 8 | updates 4 |

The epoch and sequences of a run are the pod's when it was flushed. The index drops a run that does not go past the
(incarnation, sequence) it has already applied for that pod, so a repeated or late record changes nothing.

A run too long for one record goes on in the next record of the same partition; there its first sequence is its last
plus one. Such a piece is applied unless the pod has moved past its last sequence meanwhile; applying it twice ends in
the same state, as updates set and never count.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import VersionError, WireError
from kvatlas.bridge.model.block_key import KEY_BYTES

SCHEMA_VERSION: Final = 1

HOLDER: Final = struct.Struct(">QHBBIQ")
HOLDER_BYTES: Final = HOLDER.size
IDENTITY_BYTES: Final = 11
POD_BYTES: Final = 8
EPOCH_AT: Final = 16

RUN: Final = struct.Struct(">QQQQI")

OP_ADD: Final = 1
OP_REMOVE: Final = 2

pack_holder = HOLDER.pack


class Holder(NamedTuple):
    """One decoded holder; see the module's text."""

    pod_ref: int
    group: int
    tier: int
    kind: int
    window_tokens: int
    epoch: int


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
    """Return where the holder of an identity begins, -1 without one; a match between two holders is none."""
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


class Run(NamedTuple):
    """One pod's stretch of updates in a record."""

    pod_ref: int
    epoch: int
    first_sequence: int
    last_sequence: int
    updates: int


class _Columns(msgspec.Struct, array_like=True, frozen=True, gc=False):
    v: int
    runs: bytes
    keys: bytes
    ops: bytes
    holders: bytes
    receive_ns: int = 0


class BlocksRecord(NamedTuple):
    """A decoded ``kv-blocks`` record; columns stay packed.

    Attributes:
        runs: pods in the order of their updates.
        keys: 16 bytes an update.
        ops: one byte an update, :data:`OP_ADD` or :data:`OP_REMOVE`.
        holders: 24 bytes an update.
        receive_ns: when the bridge received the newest message in it, ns since the epoch.
    """

    runs: tuple[Run, ...]
    keys: bytes
    ops: bytes
    holders: bytes
    receive_ns: int


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Columns)


def encode_blocks(runs: Sequence[Run], keys: bytes, ops: bytes, holders: bytes, receive_ns: int) -> bytes:
    """Encode one ``kv-blocks`` record."""
    packed = b"".join([RUN.pack(*run) for run in runs])
    return _encoder.encode(_Columns(SCHEMA_VERSION, packed, keys, ops, holders, receive_ns))


def decode_blocks(value: bytes) -> BlocksRecord:
    """Decode one ``kv-blocks`` record.

    Raises:
        VersionError: the schema version is not known here.
        WireError: the bytes are not such a record, or its columns disagree.
    """
    try:
        columns = _decoder.decode(value)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError(f"not a kv-blocks record: {error}") from error
    if columns.v != SCHEMA_VERSION:
        raise VersionError(f"kv-blocks record of schema version {columns.v}; this build knows {SCHEMA_VERSION}")
    if len(columns.runs) % RUN.size:
        raise WireError(f"kv-blocks record: runs of {len(columns.runs)} bytes are no multiple of {RUN.size}")
    runs = tuple(Run(*fields) for fields in RUN.iter_unpack(columns.runs))
    updates = len(columns.ops)
    if (
        len(columns.keys) != updates * KEY_BYTES
        or len(columns.holders) != updates * HOLDER_BYTES
        or sum(run.updates for run in runs) != updates
    ):
        raise WireError(f"kv-blocks record: columns disagree on the number of updates ({updates} operations)")
    return BlocksRecord(runs, columns.keys, columns.ops, columns.holders, columns.receive_ns)
