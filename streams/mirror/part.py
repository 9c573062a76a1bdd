"""What the mirror knows of one partition, and what it reads of its worker."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

from kvatlas.bridge.model import records
from kvatlas.streams.mirror.layout import MirrorPosition, position_of
from kvatlas.streams.mirror.server import MirroredPartition
from kvatlas.streams.state.partition import PartitionState


class MirrorSource(NamedTuple):
    """What the mirror reads of its worker.

    Attributes:
        states: returns the partitions of ``block_index`` that are here.
        generation: returns the Kafka generation of the assignment.
        pod: pod id -> what is known of it, None for a pod that left.
        pods: returns all pods known.
        pods_known: tells whether ``kv-pods`` has been read to what was its end.
        changed: keys that a partition's changelog has after one position's offset, up to another offset; None when it
            cannot tell any more.
    """

    states: Callable[[], Mapping[int, PartitionState]]
    generation: Callable[[], int]
    pod: Callable[[str], records.PodRecord | None]
    pods: Callable[[], Iterable[records.PodRecord]]
    pods_known: Callable[[], bool]
    changed: Callable[[int, MirrorPosition, int], Awaitable[list[bytes] | None]]


class Part:
    """One partition's way into the mirror.

    Attributes:
        dirty: keys changed since ``base``; an ordered set.
        base: changelog offset from which ``dirty`` tells everything; None before anything is known.
        through: changelog offset up to which it does.
        tried: changelog offset of a write of which no answer came.
        behind: the server's position when it is behind ``base``.
        copy: whether the partition has to be copied.
        position: the server's, as we wrote or read it, empty for none; None before it was read.
        since: monotonic time of the oldest change that waits, seconds.
    """

    def __init__(self) -> None:
        self.dirty: dict[bytes, None] = {}
        self.pods: set[str] = set()
        self.all_pods = True
        self.base: int | None = None
        self.through: int | None = None
        self.tried: int | None = None
        self.behind: MirrorPosition | None = None
        self.copy = False
        self.token = b""
        self.position: bytes | None = None
        self.claimed_at = 0.0
        self.since = time.monotonic()

    def stand(self, found: bytes) -> None:
        """Compare the mirror's position with ours; decides what has to be copied."""
        known = position_of(found)
        if known is None or self.base is None or known.changelog_offset > max(self.base, self.tried or -1):
            self.copy = True
        elif known.changelog_offset in (self.base, self.tried):
            self.base = known.changelog_offset
        else:
            self.behind = known
        self.position, self.all_pods = found, True

    def held(self, number: int) -> MirroredPartition:
        """Return what a write names."""
        assert self.position is not None
        return MirroredPartition(number, self.token, self.position)
