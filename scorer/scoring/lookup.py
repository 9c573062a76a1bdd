"""Lookups: the protocol by which block keys become index values, and the index as one request sees it. Values only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.scoring.fleet import Fleet

ACTIVE: Final = "active"
STANDBY: Final = "standby"
RESTORING: Final = "restoring"
UNANSWERED: Final = "unanswered"


class Seen(NamedTuple):
    """State of one partition when it answered (or did not)."""

    role: str
    worker: str
    applied_offset: int
    applied_receive_ns: int


class Answers(NamedTuple):
    """Answers for a stretch of keys.

    Attributes:
        values: per key its packed holders: empty when nobody holds it, None when there is no answer.
        partitions: state of every partition that the keys touched; empty where the index has none.
    """

    values: Sequence[bytes | None]
    partitions: Mapping[int, Seen]


class Lookups(Protocol):
    """Where block keys are looked up.

    Attributes:
        first_blocks: most blocks that it makes sense to ask for first; 0 leaves it to the caller.
        stale: nobody keeps a part of the index up to date at present: what it has only ages.
    """

    @property
    def first_blocks(self) -> int:
        """See above."""

    @property
    def stale(self) -> bool:
        """See above."""

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:
        """Look keys up; never raises for an index that is away.

        Args:
            keys: 16-byte block keys in the prompt's order.
            deadline: monotonic seconds (``time.monotonic``) after which what is missing stays None.
        """


class HolderOverlay(Protocol):
    """What is known beside the index: see :class:`kvatlas.scorer.scoring.decisions.Decisions`."""

    def overlay(self, keys: bytes, start: int, values: Sequence[bytes | None], now_ns: int) -> Sequence[bytes | None]:
        """Return the values with what is known of them added; a block without an answer stays without one.

        Args:
            keys: packed keys of the prompt, from its first block on.
            start: the block of the first value.
            values: of the blocks from there on.
            now_ns: wall clock in ns.
        """


class IndexView(NamedTuple):
    """The index as one request sees it, from its first lookup to its answer.

    Attributes:
        fleet: pods that may score; carries the canonical block size.
        pods: pod id -> both writers' records merged, for freshness.
        lookups: where keys are looked up.
        partition_count: partitions of ``kv-blocks``, 0 where there are none.
    """

    fleet: Fleet
    pods: Mapping[str, PodRecord]
    lookups: Lookups
    partition_count: int = 0
