"""Who may write a partition's changelog: claims in the changelog itself, and a lease in the group.

A worker that is frozen (stopped, swapped out, cut off) past its session goes on where it was when it continues, also
between the check that a partition is its own and the write that follows. Kafka's group cannot stop that write. So
every owner begins with a claim: a meta record with a higher epoch than any before it, written to the end of the
changelog and read back. Each record batch begins with the meta record of its writer; whoever reads the changelog
(restore, standby) drops the batches of writers that an earlier claim has replaced. The writer itself sees by the
offset of its own batch whether somebody else wrote in between, and reads what it was: a higher claim ends it, an
older writer's batch is dropped, and its keys are written once more, since compaction keeps the last value of a key.

The :class:`Lease` tells when this worker cannot be sure any more that the group still counts it in: it then writes
nothing, and answers lookups flagged as a standby does.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvatlas.bridge.errors import WireError
from kvatlas.streams.errors import FencedError
from kvatlas.streams.state.changelog import META_KEY, Meta, decode_meta


class Filter:
    """Drops the records of replaced writers, in the order of the changelog.

    Args:
        meta: what the state reflects so far.

    Attributes:
        meta: the newest meta record that counts.
        dropping: the records that follow come from a writer that was replaced.
    """

    def __init__(self, meta: Meta) -> None:
        self.meta = meta
        self.dropping = False

    def take(self, value: bytes | None) -> bool:
        """Take a meta record's value; what is none tells of a writer that nobody knows, whose records do not count."""
        try:
            return self.writer(decode_meta(value or b""))
        except WireError:
            self.dropping = True
            return False

    def writer(self, found: Meta) -> bool:
        """Accept a meta record unless its writer was replaced; returns whether it was accepted."""
        mine = self.meta
        self.dropping = found.epoch < mine.epoch or (found.epoch == mine.epoch and found.owner != mine.owner)
        if not self.dropping:
            self.meta = found
        return not self.dropping


def examine(records: Iterable[tuple[bytes | None, bytes | None]], mine: Meta, where: str) -> set[bytes]:
    """Return the keys that replaced writers wrote between two batches of ours.

    Args:
        records: key and value in changelog order, our own batch (or a repeated send of it) among them.
        mine: epoch and owner of this worker.
        where: the changelog partition, for the error.

    Raises:
        FencedError: another worker has claimed the partition.
    """
    keys: set[bytes] = set()
    writers = Filter(mine)
    for key, value in records:
        if key == META_KEY:
            writers.take(value)
            if writers.meta.epoch > mine.epoch:
                raise FencedError(f"{where}: another worker took over while this one stood still; it starts anew")
        elif writers.dropping and key is not None:
            keys.add(key)
    return keys
