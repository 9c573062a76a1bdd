"""Prompts that were scored lately, by request id: what a decision about one needs to know."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

#: So many pods of an answer go into a decision, best first.
_MOST_SCORES = 16


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


def remember(request: pb.ScoreRequest, keys: list[bytes], response: pb.ScoreResponse) -> Remembered:
    """Return what a decision needs of an answer."""
    best = sorted(response.scores.items(), key=lambda item: -item[1].score)[:_MOST_SCORES]
    return Remembered(
        request.model,
        request.cache_salt,
        b"".join(keys),
        response.block_size_tokens,
        {pod: (entry.score, entry.matched_blocks) for pod, entry in best},
        {pod: entry.speculative_blocks for pod, entry in best if entry.speculative_blocks},
        {part.partition: part.applied_offset for part in response.freshness.partitions},
    )


class Prompts:
    """The prompts remembered, within the settings' bounds: the oldest go first."""

    def __init__(self, settings: ScorerSettings) -> None:
        self._most = settings.remembered_requests
        self._most_bytes = settings.speculative_max_blocks * KEY_BYTES
        self._known: OrderedDict[str, Remembered] = OrderedDict()
        self._bytes = 0

    def get(self, request_id: str) -> Remembered | None:
        """Return the prompt of a request id, None when there is none."""
        return self._known.get(request_id)

    def put(self, request: pb.ScoreRequest, keys: list[bytes], response: pb.ScoreResponse) -> None:
        """Remember a prompt under its request id."""
        if not self._most:
            return
        kept = remember(request, keys, response)
        before = self._known.pop(request.request_id, None)
        self._known[request.request_id] = kept
        self._bytes += len(kept.keys) - (len(before.keys) if before is not None else 0)
        while len(self._known) > self._most or self._bytes > self._most_bytes:
            _, gone = self._known.popitem(last=False)
            self._bytes -= len(gone.keys)
