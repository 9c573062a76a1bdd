"""Prefill and decode pods chosen together, and the pod to pull cached blocks from. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvatlas.scorer.picker.choose import Candidate
from kvatlas.scorer.picker.endpoints import Endpoint


class RoleRules(NamedTuple):
    """When a prompt is computed elsewhere, or blocks are pulled.

    Attributes:
        prompt_tokens: shorter prompts are computed where they are decoded.
        uncached_tokens: so are those of which the decode pod lacks fewer tokens; 0: always.
        gained_tokens: a source of blocks must hold so many tokens more than the pod that computes; 0: no source.
    """

    prompt_tokens: int = 0
    uncached_tokens: int = 0
    gained_tokens: int = 0


class PeerSource(NamedTuple):
    """A pod to pull blocks from, and the tokens that this gains."""

    endpoint: Endpoint
    tokens: int


def is_split(prompt_tokens: int, decode: Candidate, rules: RoleRules) -> bool:
    """Whether another pod than the decode pod should compute a prompt: not when it holds the prefix already."""
    missing = prompt_tokens - decode.held.tokens
    return missing > 0 and prompt_tokens >= rules.prompt_tokens and missing >= rules.uncached_tokens


def source_of(computing: Candidate, others: Sequence[Candidate], rules: RoleRules) -> PeerSource | None:
    """Return the best other holder of a prompt, None when pulling from it would gain too little."""
    if not rules.gained_tokens or not others:
        return None
    best = max(others, key=lambda one: (one.held.tokens - one.held.speculative, -one.load.requests))
    gained = best.held.tokens - best.held.speculative - computing.held.tokens
    return PeerSource(best.endpoint, gained) if gained >= rules.gained_tokens else None
