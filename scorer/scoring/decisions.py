"""Decisions: blocks that a pod will hold soon, because a request was just sent there.

Pure state; :mod:`kvatlas.scorer.service` moves the records over ``kv-decisions``. A decision vouches for all keys of
its prompt until it expires or its pod's epoch ends, so the keys of all open decisions are closed under prefixes and
a lookup stops at the first key that no decision has.

What came of a decision is judged once, after a delay, from what the index says then
(:mod:`kvatlas.scorer.scoring.outcomes`).
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Sequence
from typing import Final

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.block_key import KEY_BYTES, tenant_of
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.bridge.model.records import GONE, DecisionRecord, PodRecord, decode
from kvatlas.scorer.errors import UnknownPodError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.prefix_tree import PrefixTree
from kvatlas.scorer.scoring.remembered import Remembered
from kvatlas.scorer.scoring.walk import SPECULATIVE
from kvatlas.streams.index.holders import pack_holder

log = logging.getLogger(__name__)

DECISION: Final = "decision"
OUTCOME: Final = "outcome"
SERVED: Final = "served"

#: No decision lives longer, whatever the clock of the scorer that made it says.
_LONGEST_MS: Final = 60_000.0

#: Open decisions and their blocks at most: five seconds of 4,000 requests a second, about 0.5 GB at the worst.
MOST_DECISIONS: Final = 20_000
MOST_BLOCKS: Final = 2_000_000


class Decisions:
    """Open decisions of all scorers.

    Attributes:
        open: request id -> decision that has not expired.
        rejected: records that could not be read.
        publish: gets decisions made here, to tell the other scorers; None keeps them here.
    """

    def __init__(self, settings: ScorerSettings, publish: Callable[[DecisionRecord], None] | None = None) -> None:
        self.open: dict[str, DecisionRecord] = {}
        self.rejected = 0
        self.publish = publish
        self._settings = settings
        self._tree = PrefixTree()  # a burst of one prefix to one pod is one holder there
        self._blocks = 0  # of all open decisions
        self._expiries: list[tuple[int, str]] = []
        self._until: dict[str, int] = {}

    def decide(
        self,
        request_id: str,
        record: PodRecord | None,
        *,
        pod: str,
        prompt: Remembered,
        policy: str,
        ttl_ms: float,
        now_ns: int,
    ) -> DecisionRecord:
        """Make a decision about a prompt here, apply it and hand it to ``publish``.

        Raises:
            UnknownPodError: the pod is not known.
        """
        if record is None or record.state == GONE:
            raise UnknownPodError(f"pod {pod!r} is not known or gone; `kvatlas pods` lists those that are")
        made = DecisionRecord(
            request_id=request_id,
            pod=pod,
            pod_epoch=record.epoch,
            model=prompt.model,
            keys=prompt.keys,
            block_size_tokens=prompt.block_size_tokens,
            predicted_blocks=prompt.scores.get(pod, (0.0, 0))[1],
            speculative_blocks=prompt.speculative.get(pod, 0),
            scores=prompt.scores,
            freshness=prompt.partitions,
            pod_sequences={pod: record.last_sequence},
            scorer=self._settings.name,
            decided_ns=now_ns,
            expires_ns=now_ns + int(min(ttl_ms or self._settings.speculative_ttl_ms, _LONGEST_MS) * 1e6),
            policy=policy,
            tenant=tenant_of(prompt.cache_salt),
        )
        self.put(made, now_ns)
        if self.publish is not None:
            self.publish(made)
        return made

    def apply(self, value: bytes | None, now_ns: int) -> DecisionRecord | None:
        """Apply a record of ``kv-decisions``; one that cannot be read is counted and left out."""
        if not value:
            return None
        try:
            record = decode(DecisionRecord, value)
        except WireError as error:
            self.rejected += 1
            log.warning("kv-decisions: %s", error)
            return None
        if record.kind == DECISION:
            self.put(record, now_ns)
        return record

    def put(self, record: DecisionRecord, now_ns: int) -> None:
        """Take a decision in, unless it has expired or is known."""
        self.expire(now_ns)
        known = self.open.get(record.request_id)
        if record.expires_ns <= now_ns or not record.keys or known == record:
            return
        if known is not None:
            self._drop(record.request_id)
        self.open[record.request_id] = record
        # A clock that is ahead must not make a decision live longer than one may.
        until = min(record.expires_ns, now_ns + int(_LONGEST_MS * 1e6))
        self._until[record.request_id] = until
        heapq.heappush(self._expiries, (until, record.request_id))
        self._tree.add(_whole_keys(record), _holder(record))
        self._blocks += len(record.keys) // KEY_BYTES
        while self.open and (len(self.open) > MOST_DECISIONS or self._blocks > MOST_BLOCKS):
            self._drop(next(iter(self.open)))

    def expire(self, now_ns: int) -> None:
        """Drop what has expired."""
        while self._expiries and self._expiries[0][0] <= now_ns:
            until, request_id = heapq.heappop(self._expiries)
            # A decision made anew under the same id has a later entry of its own.
            if self._until.get(request_id) == until:
                self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        record = self.open.pop(request_id)
        del self._until[request_id]
        self._blocks -= len(record.keys) // KEY_BYTES
        self._tree.remove(_whole_keys(record), _holder(record))

    def overlay(self, keys: bytes, start: int, values: Sequence[bytes | None], now_ns: int) -> Sequence[bytes | None]:
        """Return the values with the speculative holders added; a block without an answer stays without one.

        Args:
            keys: packed keys of the prompt, from its first block on.
            start: the block of the first value.
            values: of the blocks from there on.
            now_ns: wall clock in ns.
        """
        self.expire(now_ns)
        if not self._tree:
            return values
        changed = list(values)
        begin = -start
        for blocks, holders in self._tree.along(keys):
            first, begin = max(begin, 0), begin + blocks
            if first < begin:
                changed[first:begin] = _with(changed[first:begin], holders)
        return changed


def _with(values: list[bytes | None], holders: bytes) -> list[bytes | None]:
    """Return values with holders added; equal ones stay one object, which the walk is quick to tell."""
    if values and values.count(values[0]) == len(values):  # the common case, counted in C
        return [None if values[0] is None else values[0] + holders] * len(values)
    whole = {value: None if value is None else value + holders for value in set(values)}
    return [whole[value] for value in values]


def _whole_keys(record: DecisionRecord) -> bytes:
    return record.keys[: len(record.keys) // KEY_BYTES * KEY_BYTES]


def _holder(record: DecisionRecord) -> bytes:
    return pack_holder(pod_ref(record.pod), 0, SPECULATIVE, 0, 0, record.pod_epoch)
