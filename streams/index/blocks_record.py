"""The ``kv-blocks`` record: block updates of several pods in packed columns.

One msgpack array, so that it decodes with slices::

    [1, runs, keys, ops, holders, receive_ns]

``keys`` has 16 bytes an update, ``ops`` 1, ``holders`` 24 (:mod:`kvatlas.streams.index.holders`). ``runs`` has 36 bytes
a pod, in the order of the updates::

    | pod ref 8 | epoch 8 | first sequence 8 | last sequence 8 | updates 4 |

The epoch and sequences of a run are the pod's when it was flushed. The index drops a run that does not go past the
(incarnation, sequence) it has already applied for that pod, so a repeated or late record changes nothing.

A run too long for one record goes on in the next record of the same partition; there its first sequence is its last
plus one. Such a piece is applied unless the pod has moved past its last sequence meanwhile; applying it twice ends in
the same state, as updates set and never count.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS, VersionError, WireError
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.streams.index.holders import HOLDER_BYTES, are_holders

SCHEMA_VERSION: Final = 1
RUN: Final = struct.Struct(">QQQQI")
OP_ADD: Final = 1
OP_REMOVE: Final = 2
_OPS: Final = bytes((OP_ADD, OP_REMOVE))


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
    receive_ns: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0


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
    except DECODE_ERRORS as error:
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
    if columns.ops.translate(None, _OPS) or not are_holders(columns.holders):
        raise WireError("kv-blocks record: an operation or a tier that this build does not know")
    return BlocksRecord(runs, columns.keys, columns.ops, columns.holders, columns.receive_ns)
