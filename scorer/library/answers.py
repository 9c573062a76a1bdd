"""Answers of the indexer library: frozen values with the fields of ``scorer.proto``."""

from __future__ import annotations

import msgspec


class PodScore(msgspec.Struct, frozen=True, kw_only=True):
    """What one pod's cache is worth for a prompt.

    Attributes:
        score: sum of the matched blocks' weights.
        matched_blocks, matched_tokens: length of the match.
        tiers: matched blocks by the tier that counted.
        suspect_blocks: matched blocks seen before a gap that could not be repaired.
        approximate: the pod's cache is predicted from decisions, not told by events.
    """

    score: float
    matched_blocks: int
    matched_tokens: int
    tiers: dict[str, int] = {}
    suspect_blocks: int = 0
    approximate: bool = False


class PodFreshness(msgspec.Struct, frozen=True, kw_only=True):
    """How fresh what is known of a pod is.

    Attributes:
        last_sequence: newest message applied; -1 before the first.
        age_ms: time since that message was received; -1 before the first.
        state: ``live`` or ``stale``.
        epoch: epoch of what is written now.
    """

    last_sequence: int
    age_ms: float
    state: str
    epoch: int


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """One scored prompt.

    Attributes:
        prompt_tokens: its tokens.
        block_size_tokens: canonical block size.
        blocks: its full blocks.
        scores: pod id -> score, best first; pods without a match are absent.
        freshness: pod id -> freshness, for the pods in ``scores``.
        partial: the index did not answer for some blocks, so matches may be longer.
        stale: nobody keeps a part of the index up to date at present: what it has only ages.
        tokenizer: backend that tokenized; empty when tokens were given.
        took_ms: time by stage: ``tokenize``, ``keys``, ``lookup``, ``score``.
    """

    prompt_tokens: int
    block_size_tokens: int
    blocks: int
    scores: dict[str, PodScore] = {}
    freshness: dict[str, PodFreshness] = {}
    partial: bool = False
    stale: bool = False
    tokenizer: str = ""
    took_ms: dict[str, float] = {}

    @property
    def best(self) -> str:
        """The pod with the highest score, empty when no pod has any."""
        return next(iter(self.scores), "")


class HolderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a block: ``state`` is ``live``, ``suspect``, ``dead`` (an ended epoch) or ``unknown-pod``."""

    pod: str
    tier: str
    group: int
    epoch: int
    state: str


class BlockInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a prompt: its number, its key in hexadecimal, its holders."""

    number: int
    key: str
    holders: list[HolderInfo] = []


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """A scored prompt, block by block.

    Attributes:
        scored: the answer itself.
        blocks: every full block with all its holders, also those that do not count.
        ends: pod id -> why its match ends where it does, for every pod that holds any of the blocks.
    """

    scored: Scored
    blocks: list[BlockInfo]
    ends: dict[str, str]
