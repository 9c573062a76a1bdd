"""Scoring strategies: what a match is worth. Small, by name, and yours to add with :func:`register`.

===================  ===========================================================================================
``longest-prefix``   sum of the matched blocks' tier weights (the default)
``normalised``       the same, divided by the blocks of the prompt: 0 to 1
``tokens``           matched tokens, whatever the tier
``gpu-only``         as longest-prefix, and the match ends at the first block that is not on the GPU
===================  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.scorer.errors import InputError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.walk import Match, Weights


class Strategy(Protocol):
    """How a match becomes a score."""

    def weights(self, weights: Weights) -> Weights:
        """Return the weights that the walk uses, from those of the model."""

    def score(self, match: Match, blocks: int) -> float:
        """Return the score of a match in a prompt of so many full blocks."""


class LongestPrefix:
    """Sum of the matched blocks' tier weights."""

    def weights(self, weights: Weights) -> Weights:
        """Return the model's weights."""
        return weights

    def score(self, match: Match, blocks: int) -> float:  # noqa: ARG002 - part of the protocol
        """Return the sum."""
        return match.score


class Normalised(LongestPrefix):
    """The longest prefix as a share of the prompt, 0 to 1."""

    def score(self, match: Match, blocks: int) -> float:
        """Return the sum over the prompt's blocks."""
        return match.score / blocks if blocks else 0.0


class Tokens(LongestPrefix):
    """Matched tokens, whatever the tier."""

    def score(self, match: Match, blocks: int) -> float:  # noqa: ARG002 - part of the protocol
        """Return the match length in tokens."""
        return float(match.tokens)


class GpuOnly(LongestPrefix):
    """The longest prefix on the GPU; other tiers end the match."""

    def weights(self, weights: Weights) -> Weights:
        """Return the model's weights with only the GPU's and the speculative one left."""
        return msgspec.structs.replace(weights, cpu=0.0, disk=0.0, shared=0.0, unknown=0.0, end_at_zero=True)


STRATEGIES: Final[dict[str, Strategy]] = {
    "longest-prefix": LongestPrefix(),
    "normalised": Normalised(),
    "tokens": Tokens(),
    "gpu-only": GpuOnly(),
}


def full_score(
    strategy: Strategy, weights: Weights, matches: Sequence[Match], blocks: int, block_size_tokens: int
) -> float:
    """Return what a strategy gives a pod that holds a whole prompt on its best tier; 0 where no pod holds any of it."""
    if not matches:
        return 0.0
    best = max(weights.gpu, weights.cpu, weights.disk, weights.shared, weights.unknown)
    whole = matches[0]._replace(
        blocks=blocks,
        tokens=blocks * block_size_tokens,
        score=best * blocks,
        tiers={"gpu": blocks},
        suspect=0,
        speculative=0,
    )
    return strategy.score(whole, blocks)


def register(name: str, strategy: Strategy) -> None:
    """Add a strategy of your own under a name."""
    STRATEGIES[name] = strategy


def strategy_named(name: str) -> Strategy:
    """Return a strategy.

    Raises:
        InputError: there is none of this name.
    """
    found = STRATEGIES.get(name)
    if found is None:
        raise InputError(f"strategy: {name!r} is not one of {', '.join(sorted(STRATEGIES))}")
    return found


class Weighing:
    """Weights and strategy per model."""

    def __init__(self, weights: Weights | None = None, strategy: str = "longest-prefix") -> None:
        """Weigh all models alike.

        Raises:
            InputError: there is no such strategy.
        """
        strategy_named(strategy)
        self._weights = weights or Weights()
        self._strategy = strategy
        self._models: dict[str, tuple[Weights, str]] = {}

    @classmethod
    def from_settings(cls, settings: ScorerSettings) -> Weighing:
        """Read a scorer's settings.

        Raises:
            SettingsError: there is no such strategy, or an entry of ``models`` cannot be read.
        """
        if settings.strategy not in STRATEGIES:
            raise SettingsError(f"[scorer] strategy {settings.strategy!r}: known are {', '.join(sorted(STRATEGIES))}")
        weights = Weights(
            cpu=settings.weight_cpu,
            disk=settings.weight_disk,
            shared=settings.weight_shared,
            suspect_factor=settings.suspect_factor,
        )
        made = cls(weights, settings.strategy)
        made._models = _models(settings.models, weights, settings.strategy)
        return made

    def of(self, model: str, strategy: str = "") -> tuple[Strategy, Weights]:
        """Return how a request for a model is scored; ``strategy`` is what the request asks for, empty for nothing.

        Raises:
            InputError: there is no such strategy.
        """
        weights, name = self._models.get(model, (self._weights, self._strategy))
        chosen = strategy_named(strategy or name)
        return chosen, chosen.weights(weights)


def _models(entries: Sequence[str], base: Weights, strategy: str) -> dict[str, tuple[Weights, str]]:
    known = {name for name in Weights.__struct_fields__ if name != "end_at_zero"}
    found: dict[str, tuple[Weights, str]] = {}
    for entry in entries:
        model, colon, text = entry.rpartition(":")
        if not colon or not model:
            raise SettingsError(f"[scorer] models: {entry!r} is not MODEL:KEY=VALUE[,KEY=VALUE]")
        changes: dict[str, float] = {}
        name = strategy
        for pair in text.split(","):
            key, _, value = pair.strip().partition("=")
            if key == "strategy":
                if value not in STRATEGIES:
                    raise SettingsError(f"[scorer] models: {entry!r}: no strategy {value!r}")
                name = value
                continue
            try:
                number = float(value)
            except ValueError:
                number = -1.0
            if key not in known or not number >= 0:
                raise SettingsError(
                    f"[scorer] models: {entry!r}: {pair!r}; keys are strategy, {', '.join(sorted(known))}"
                )
            changes[key] = number
        found[model] = (msgspec.structs.replace(base, **changes), name)
    return found
