"""Prompts that were scored lately, by request id: what a decision about one needs to know."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.scorer.scoring.answers import Scored
from kvatlas.scorer.scoring.query import ScoreQuery

#: So many pods of an answer go into a decision, best first.
_MOST_SCORES = 16

#: Prompts kept for ReportDecision: seconds of traffic, since a router reports at once; the bytes bound long prompts.
_MOST_PROMPTS: Final = 4_096
_MOST_BYTES: Final = 2_000_000 * KEY_BYTES


class Remembered(NamedTuple):
    """A prompt with its answer.

    Attributes:
        keys: packed 16-byte block keys.
        scores: pod -> score and matched blocks, of the best pods.
        speculative: pod -> matched blocks that only decisions vouched for, where there are any.
        partitions: partition -> offset applied when it answered.
    """

    model: str
    cache_salt: str
    keys: bytes
    block_size_tokens: int
    scores: dict[str, tuple[float, int]]
    speculative: dict[str, int]
    partitions: dict[int, int]


def remember(query: ScoreQuery, keys: Sequence[bytes], scored: Scored) -> Remembered:
    """Return what a decision needs of an answer."""
    best = list(scored.scores.items())[:_MOST_SCORES]
    return Remembered(
        query.model,
        query.cache_salt,
        b"".join(keys),
        scored.block_size_tokens,
        {pod: (entry.score, entry.matched_blocks) for pod, entry in best},
        {pod: entry.speculative_blocks for pod, entry in best if entry.speculative_blocks},
        {number: seen.applied_offset for number, seen in sorted(scored.partitions.items())},
    )


class Prompts:
    """The prompts remembered, within bounds: the oldest go first."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Remembered] = OrderedDict()
        self._bytes = 0

    def get(self, request_id: str) -> Remembered | None:
        """Return the prompt of a request id, None when there is none."""
        return self._known.get(request_id)

    def put(self, request_id: str, query: ScoreQuery, keys: Sequence[bytes], scored: Scored) -> None:
        """Remember a prompt under its request id."""
        kept = remember(query, keys, scored)
        before = self._known.pop(request_id, None)
        self._known[request_id] = kept
        self._bytes += len(kept.keys) - (len(before.keys) if before is not None else 0)
        while len(self._known) > _MOST_PROMPTS or self._bytes > _MOST_BYTES:
            _, gone = self._known.popitem(last=False)
            self._bytes -= len(gone.keys)
