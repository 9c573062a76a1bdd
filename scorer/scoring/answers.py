"""Score answers: frozen values with the fields of ``scorer.proto``, the same from service, library and the past."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from kvatlas.scorer.scoring.lookup import STANDBY, Seen


class PodScore(msgspec.Struct, frozen=True, kw_only=True):
    """What one pod's cache is worth for a prompt.

    Attributes:
        score: what the strategy makes of the match; by default the sum of the matched blocks' weights.
        matched_blocks, matched_tokens: length of the match.
        tiers: matched blocks by the tier that counted.
        suspect_blocks: matched blocks seen before a gap that could not be repaired.
        speculative_blocks: matched blocks that only a recent decision vouches for.
        approximate: the pod's cache is predicted from decisions, not told by events.
    """

    score: float
    matched_blocks: int
    matched_tokens: int
    tiers: dict[str, int] = {}
    suspect_blocks: int = 0
    speculative_blocks: int = 0
    approximate: bool = False


class PodFreshness(msgspec.Struct, frozen=True, kw_only=True):
    """How fresh what is known of a pod is.

    Attributes:
        last_sequence: newest message applied; -1 before the first.
        age_ms: time since that message was received; -1 before the first.
        state: ``live`` or ``stale``.
        epoch: epoch of what is written now.
        coverage: ``whole`` (its engine's stream is known from the start), ``partial`` (from ``heard_from`` on, so
            matches may be longer), or empty where it is not known.
        heard_from: of a partial one, the first sequence from which on nothing is missing.
    """

    last_sequence: int
    age_ms: float
    state: str
    epoch: int
    coverage: str = ""
    heard_from: int = 0


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """One scored prompt.

    Attributes:
        prompt_tokens: its tokens.
        block_size_tokens: canonical block size.
        blocks: its full blocks that can matter.
        scores: pod id -> score, best first; pods without a match are absent.
        freshness: pod id -> freshness, for the pods in ``scores``.
        partitions: partition -> who answered and up to where; empty where the index has no partitions.
        partial: the index did not answer for some blocks, so matches may be longer.
        stale: nobody keeps a part of the index up to date at present: what it has only ages.
        tokenizer: backend that tokenized; empty when tokens were given.
        took_ms: time by stage: ``tokenize`` where text was given, ``keys``, ``lookup``, ``score``.
    """

    prompt_tokens: int
    block_size_tokens: int
    blocks: int
    scores: dict[str, PodScore] = {}
    freshness: dict[str, PodFreshness] = {}
    partitions: Mapping[int, Seen] = {}
    partial: bool = False
    stale: bool = False
    tokenizer: str = ""
    took_ms: dict[str, float] = {}

    @property
    def best(self) -> str:
        """The pod with the highest score, empty when no pod has any."""
        return next(iter(self.scores), "")

    @property
    def standby(self) -> bool:
        """Whether a standby answered for some partition, which may be behind its owner."""
        return any(seen.role == STANDBY for seen in self.partitions.values())


class HolderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a block.

    Attributes:
        state: ``live``, ``suspect``, ``speculative``, ``dead`` (an ended epoch, a removed pod), ``other-model`` (a pod
            that mounts the store and serves another model), ``adapters`` (a cache server's chunk, which cannot name the
            pod's adapters), ``assumed`` (named by its tokens alone, while the pod uses
            salts or pictures) or ``unknown-pod``.
    """

    pod: str
    tier: str
    group: int
    epoch: int
    state: str


class BlockInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a prompt.

    Attributes:
        number: position in the prompt.
        key: block key in hexadecimal.
        partition: of ``kv-blocks``; 0 where there are none.
        answered: whether the index answered.
        holders: who holds it, also those that do not count.
    """

    number: int
    key: str
    partition: int = 0
    answered: bool = True
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
