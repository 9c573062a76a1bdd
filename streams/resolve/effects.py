"""What applying engine messages asks to be written outside the ``engine_blocks`` table.

Updates are gathered per pod, as columns; :meth:`Effects.encode` cuts them into one ``kv-blocks`` record per partition,
and :meth:`Effects.records` for an index in this process, where nothing is encoded. With many updates that is numpy's
work, so that nothing but a list append is paid per block before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.epochs import incarnation_of
from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, BlocksRecord, Run, encode_blocks
from kvatlas.streams.index.holders import HOLDER_BYTES

#: Updates in one ``kv-blocks`` record at most: 41 bytes each, far under the topic's largest record.
RECORD_UPDATES: Final = 65_536

#: Updates up to which a plain loop is faster than numpy, whose calls have a price for each partition.
_FEW: Final = 256

_ADD: Final = bytes([OP_ADD])
_REMOVE: Final = bytes([OP_REMOVE])


class DeadLetter(NamedTuple):
    """One event, or one whole message, that could not be applied.

    Attributes:
        pod: pod id, the key of the record on ``kv-events-dlq``.
        raw: bytes of the event alone, or of the message when none of it could be read.
        reason: shown in logs.
        partition: ``kv-events`` partition it came from.
        offset: ``kv-events`` offset it came from.
        headers: headers of the message it came in.
    """

    pod: str
    raw: bytes
    reason: str
    partition: int
    offset: int
    headers: Mapping[str, bytes]


class Sighting(NamedTuple):
    """Where a session was seen.

    Attributes:
        pod: pod id whose event named it.
        receive_ns: when the bridge received that.
    """

    pod: str
    receive_ns: int


class PodUpdates:
    """One pod's updates within one incarnation, in order; :attr:`last` moves with every message.

    ``add`` and ``remove`` take a whole stretch at once. The columns are lists of byte strings, joined when encoded.
    """

    __slots__ = ("epoch", "first", "holders", "keys", "last", "ops", "pod_ref")

    def __init__(self, pod_ref: int, epoch: int, sequence: int) -> None:
        self.pod_ref = pod_ref
        self.epoch = epoch
        self.first = sequence
        self.last = sequence
        self.keys: list[bytes] = []
        self.ops: list[bytes] = []
        self.holders: list[bytes] = []

    def add(self, keys: list[bytes], holder: bytes) -> None:
        """Add ``holder`` (24 bytes) to every block of ``keys`` (16 bytes each)."""
        self.keys += keys
        self.ops.append(_ADD * len(keys))
        self.holders += repeat(holder, len(keys))

    def remove(self, keys: list[bytes], holder: bytes) -> None:
        """Remove ``holder`` from every block of ``keys``."""
        self.keys += keys
        self.ops.append(_REMOVE * len(keys))
        self.holders += repeat(holder, len(keys))


class Effects:
    """Everything that one flush writes besides the table itself.

    Attributes:
        dead: events and messages for ``kv-events-dlq``.
        counts: what happened, by name, for metrics.
        sessions: hash of each session that a store named -> where that was last.
        notices: (pod, text) of what an operator should know of a pod's events, for the log, once a pod.
        urgent: an epoch rose, so the pod records must be readable before the updates.
        receive_ns: newest receive time (bridge clock, ns) among the applied messages.
    """

    def __init__(self, partitions: int) -> None:
        self.partitions = partitions
        self.dead: list[DeadLetter] = []
        self.counts: Counter[str] = Counter()
        self.sessions: dict[str, Sighting] = {}
        self.notices: list[tuple[str, str]] = []
        self.urgent = False
        self.receive_ns = 0
        self._pods: dict[str, Callable[[], PodRecord]] = {}
        self._segments: list[PodUpdates] = []
        self._current: dict[int, PodUpdates] = {}

    @property
    def pods(self) -> dict[str, PodRecord]:
        """Return the records of the pods that changed, by pod id, as of their last message in this flush."""
        return {pod: build() for pod, build in self._pods.items()}

    def changed(self, pod: str, build: Callable[[], PodRecord]) -> None:
        """Note that a pod's record changed; ``build`` makes it when it is asked for, once per flush."""
        self._pods[pod] = build

    def absorb(self, other: Effects) -> None:
        """Take over the effects of messages of other pods, or of earlier messages of the same."""
        self.dead += other.dead
        self.sessions.update(other.sessions)
        self.notices += other.notices
        self.counts.update(other.counts)
        self.urgent = self.urgent or other.urgent
        self.receive_ns = max(self.receive_ns, other.receive_ns)
        self._pods.update(other._pods)
        self._segments += other._segments
        for segment in other._segments:
            self._current.pop(segment.pod_ref, None)

    @property
    def updates(self) -> int:
        """Return the number of block updates gathered."""
        return sum(len(segment.keys) for segment in self._segments)

    def __bool__(self) -> bool:
        """Tell whether there is anything to write."""
        return bool(self._segments or self._pods or self.dead)

    def of(self, pod_ref: int, epoch: int, sequence: int) -> PodUpdates:
        """Return where a pod's updates of one message go.

        Args:
            pod_ref: reference of the pod.
            epoch: the pod's epoch; a new incarnation starts a new run.
            sequence: the message's sequence, past all earlier ones of the incarnation.
        """
        found = self._current.get(pod_ref)
        if found is None or incarnation_of(found.epoch) != incarnation_of(epoch):
            found = self._current[pod_ref] = PodUpdates(pod_ref, epoch, sequence)
            self._segments.append(found)
        found.epoch = epoch
        found.last = sequence
        return found

    @property
    def segments(self) -> list[PodUpdates]:
        """Return the updates gathered, in order."""
        return [segment for segment in self._segments if segment.keys]

    def encode(self, receive_ns: int | None = None) -> dict[int, list[bytes]]:
        """Return the ``kv-blocks`` records by partition, to be sent in the order of each list.

        Args:
            receive_ns: receive time to stamp, ns since the epoch; None takes the newest message's.
        """
        return encode(self.segments, self.partitions, self.receive_ns if receive_ns is None else receive_ns)

    def records(self) -> list[BlocksRecord]:
        """Return the updates for an index in this process, whatever their partitions, in order."""
        return cut(self.segments, 1, self.receive_ns).get(0, [])


def encode(segments: list[PodUpdates], partitions: int, receive_ns: int) -> dict[int, list[bytes]]:
    """Return the ``kv-blocks`` records of updates by partition, to be sent in the order of each list.

    Args:
        segments: updates, those of one pod in the order of its messages; none is empty.
        partitions: partitions of ``kv-blocks``.
        receive_ns: receive time to stamp, ns since the epoch.
    """
    return {
        partition: [encode_blocks(*record) for record in made]
        for partition, made in cut(segments, partitions, receive_ns).items()
    }


def cut(segments: list[PodUpdates], partitions: int, receive_ns: int) -> dict[int, list[BlocksRecord]]:
    """Return the records of updates by partition, as :func:`encode` does before it encodes them."""
    if not segments:
        return {}
    updates = sum(len(segment.keys) for segment in segments)
    if partitions == 1 and updates <= RECORD_UPDATES:
        return {0: [_together(segments, receive_ns)]}
    if updates <= min(_FEW, RECORD_UPDATES):
        return _cut_few(segments, partitions, receive_ns)
    columns = _Columns(segments)
    where = columns.partitions(partitions)
    order = np.argsort(where, kind="stable")
    bounds = np.searchsorted(where[order], np.arange(partitions + 1))
    records: dict[int, list[BlocksRecord]] = {}
    for partition in range(partitions):
        rows = order[bounds[partition] : bounds[partition + 1]]
        if len(rows):
            records[partition] = columns.records(rows, receive_ns)
    return records


def _together(segments: list[PodUpdates], stamp: int) -> BlocksRecord:
    """Put all updates into one record of the only partition."""
    return BlocksRecord(
        tuple([Run(one.pod_ref, one.epoch, one.first, one.last, len(one.keys)) for one in segments]),
        b"".join([b"".join(one.keys) for one in segments]),
        b"".join([b"".join(one.ops) for one in segments]),
        b"".join([b"".join(one.holders) for one in segments]),
        stamp,
    )


def _cut_few(segments: list[PodUpdates], partitions: int, stamp: int) -> dict[int, list[BlocksRecord]]:
    """Cut a few updates, one record per partition."""
    runs: dict[int, list[Run]] = {}
    columns: dict[int, tuple[list[bytes], bytearray, list[bytes]]] = {}
    for segment in segments:
        counts: Counter[int] = Counter()
        for key, op, holder in zip(segment.keys, b"".join(segment.ops), segment.holders, strict=True):
            partition = int.from_bytes(key[:4], "big") % partitions
            column = columns.get(partition)
            if column is None:
                column = columns[partition] = ([], bytearray(), [])
            column[0].append(key)
            column[1].append(op)
            column[2].append(holder)
            counts[partition] += 1
        for partition, count in counts.items():
            run = Run(segment.pod_ref, segment.epoch, segment.first, segment.last, count)
            runs.setdefault(partition, []).append(run)
    return {
        partition: [BlocksRecord(tuple(runs[partition]), b"".join(keys), bytes(ops), b"".join(holders), stamp)]
        for partition, (keys, ops, holders) in sorted(columns.items())
    }


class _Columns:
    """The gathered updates of all pods as numpy columns."""

    def __init__(self, segments: list[PodUpdates]) -> None:
        self._segments = segments
        lengths = [len(segment.keys) for segment in segments]
        self._segment_of = np.repeat(np.arange(len(segments)), lengths)
        self._keys = _rows(b"".join([b"".join(segment.keys) for segment in segments]), KEY_BYTES)
        self._ops = np.frombuffer(b"".join([b"".join(segment.ops) for segment in segments]), dtype=np.uint8)
        self._holders = _rows(b"".join([b"".join(segment.holders) for segment in segments]), HOLDER_BYTES)

    def partitions(self, count: int) -> npt.NDArray[np.uint32]:
        """Return the partition of every update: the same rule as ``block_key.partition_of``."""
        heads = np.ascontiguousarray(self._keys[:, :4]).view(">u4")[:, 0]
        return heads.astype(np.uint32) % np.uint32(count)

    def records(self, rows: npt.NDArray[np.intp], receive_ns: int) -> list[BlocksRecord]:
        """Return the records of one partition's rows, in order."""
        return [
            self._record(rows[at : at + RECORD_UPDATES], int(self._segment_of[rows[at - 1]]) if at else -1, receive_ns)
            for at in range(0, len(rows), RECORD_UPDATES)
        ]

    def _record(self, rows: npt.NDArray[np.intp], continues: int, receive_ns: int) -> BlocksRecord:
        """Put rows together; a run of segment ``continues`` goes on from the record before (see ``codec``)."""
        numbers, sizes = np.unique(self._segment_of[rows], return_counts=True)
        runs = []
        for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
            segment = self._segments[number]
            first = segment.last + 1 if number == continues else segment.first
            runs.append(Run(segment.pod_ref, segment.epoch, first, segment.last, size))
        return BlocksRecord(
            tuple(runs),
            self._keys[rows].tobytes(),
            self._ops[rows].tobytes(),
            self._holders[rows].tobytes(),
            receive_ns,
        )


def _rows(packed: bytes, width: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(packed, dtype=np.uint8).reshape(-1, width)
