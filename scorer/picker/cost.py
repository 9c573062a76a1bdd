"""What a request costs at an endpoint, in one unit: prompt tokens to compute. Pure.

    compute = prompt tokens - held tokens + sum over tiers (load cost of the tier * tokens held there)
    queued  = queue weight * prompt tokens that wait before it
    decode  = tokens per request * requests that run or wait there
    full    = tokens of a full cache * how far the KV cache in use is past the soft limit (0 to 1)
    cost    = compute + queued + decode + full

A token held on the GPU costs nothing; one that must be fetched from host memory, disk or a shared store costs a
part of computing it. A suspect token is counted as held by half. Each request that decodes takes time from prompts,
as many tokens' worth as the engine gives up for it while the prompt is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from kvatlas.scorer.picker.endpoints import Held
from kvatlas.scorer.picker.load import Load

_SUSPECT: Final = 0.5


class CostWeights(NamedTuple):
    """What makes up the cost.

    Attributes:
        queue: a waiting token beside one to compute. Below 1, since a token that is computed again also keeps the
            pod from others, while one that waits only delays this request; the simulation says how far.
        decode_tokens: what a running or waiting request costs, in tokens.
        full_tokens: what a full KV cache costs, in tokens.
        soft_usage: share of the KV cache in use from which that begins.
        tiers: cost of a held token by tier name, 0 (as good as on the GPU) to 1 (as good as not held).
        unknown_tier: for tiers that are not named.
    """

    queue: float = 0.15
    decode_tokens: float = 32.0
    full_tokens: float = 4_096.0
    soft_usage: float = 0.9
    tiers: Mapping[str, float] = {"gpu": 0.0, "cpu": 0.1, "disk": 0.4, "shared": 0.5}
    unknown_tier: float = 0.5


class Cost(NamedTuple):
    """A cost by its parts, all in tokens; ``total`` is their sum."""

    compute: float
    queued: float
    decode: float
    full: float

    @property
    def total(self) -> float:
        """The cost."""
        return self.compute + self.queued + self.decode + self.full


def compute_tokens(prompt_tokens: int, held: Held, weights: CostWeights) -> float:
    """Return the tokens that computing and fetching a prompt takes at a pod."""
    if not held.tokens:
        return float(prompt_tokens)
    fetched = 0.0
    for name, tokens in held.tiers.items():
        fetched += tokens * weights.tiers.get(name, weights.unknown_tier)
    lost = held.suspect * _SUSPECT
    return max(0.0, prompt_tokens - held.tokens + min(fetched + lost, float(held.tokens)))


def cost_of(prompt_tokens: int, held: Held, load: Load, weights: CostWeights) -> Cost:
    """Return what a prompt costs at an endpoint."""
    over = 0.0
    if load.usage > weights.soft_usage:
        over = (load.usage - weights.soft_usage) / max(1.0 - weights.soft_usage, 1e-6)
    return Cost(
        compute_tokens(prompt_tokens, held, weights),
        weights.queue * load.prefill_tokens,
        weights.decode_tokens * load.requests,
        weights.full_tokens * over,
    )
