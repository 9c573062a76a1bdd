"""A fleet reduced to what routing decides: which blocks each pod's paged cache holds, and its prefill queue.

A pod is an LRU of blocks with a fixed capacity, evicted tail first, as engines do. Prefill work is counted in
blocks: a queue that drains at a fixed rate between arrivals.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple


class Arrival(NamedTuple):
    """One request as it reached the fleet.

    Attributes:
        time_ms: arrival on the trace's clock.
        blocks: ids of the prompt's blocks; equal ids are equal blocks with equal prefix.
        output_blocks: blocks that the answer fills.
        pod: pod that really served it, empty when unknown (a trace without decisions).
        tokens: length of the prompt, 0 where only whole blocks are known.
        output_tokens: length of the answer, 0 where only blocks are known.
    """

    time_ms: float
    blocks: Sequence[int]
    output_blocks: int = 0
    pod: str = ""
    tokens: int = 0
    output_tokens: int = 0


class PrefixCache:
    """A paged prefix cache: blocks by id, least recently used first."""

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self._anonymous = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, blocks: Sequence[int]) -> int:
        """Return how many leading blocks are held."""
        held = self._blocks
        for number, block in enumerate(blocks):
            if block not in held:
                return number
        return len(blocks)

    def insert(self, blocks: Sequence[int], output_blocks: int = 0) -> list[int]:
        """Hold a request's blocks and its answer's; returns the ids that were evicted for them.

        The tail is the first to go again: blocks are touched from the last to the first. Blocks of an answer have no
        id in a trace but take room like any other.
        """
        held = self._blocks
        for _ in range(min(output_blocks, self.capacity_blocks)):
            self._anonymous -= 1
            held[self._anonymous] = None
        for block in reversed(blocks):
            if block in held:
                held.move_to_end(block)
            else:
                held[block] = None
        evicted = []
        while len(held) > self.capacity_blocks:
            evicted.append(held.popitem(last=False)[0])
        return evicted

    def drop(self, blocks: Sequence[int]) -> None:
        """Forget blocks."""
        for block in blocks:
            self._blocks.pop(block, None)


class Pod:
    """One pod: its cache, and the prefill work that waits in front of it."""

    def __init__(self, capacity_blocks: int, blocks_per_second: float) -> None:
        self.cache = PrefixCache(capacity_blocks)
        self.served_blocks = 0
        self.hit_blocks = 0
        self.requests = 0
        self._rate_per_ms = blocks_per_second / 1000
        self._queue_blocks = 0.0
        self._seen_ms = 0.0

    def queued_blocks(self, now_ms: float) -> float:
        """Return the prefill work that is still to do at a moment."""
        return max(0.0, self._queue_blocks - max(0.0, now_ms - self._seen_ms) * self._rate_per_ms)

    def serve(self, arrival: Arrival) -> list[int]:
        """Run one request; returns the block ids that it evicted."""
        hit = self.cache.match(arrival.blocks)
        self._queue_blocks = self.queued_blocks(arrival.time_ms) + len(arrival.blocks) - hit
        self._seen_ms = max(self._seen_ms, arrival.time_ms)
        self.requests += 1
        self.served_blocks += len(arrival.blocks)
        self.hit_blocks += hit
        return self.cache.insert(arrival.blocks, arrival.output_blocks)
