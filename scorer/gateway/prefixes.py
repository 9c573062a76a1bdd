"""From a request's body to what each pod holds of its prompt: read, tokenized, scored by a scorer in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from kvatlas.scorer.api.core import Core, Scored
from kvatlas.scorer.picker.endpoints import Held
from kvatlas.scorer.scoring.remembered import Remembered, remember
from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.v1 import scorer_pb2 as pb


class Prompt(NamedTuple):
    """A prompt with what is known of it.

    Attributes:
        model: model name.
        tokens: its length.
        held: pod id -> what the pod holds of it, as an engine would reuse it (the last token is computed anyway).
        partial: the index did not answer for some blocks.
        remembered: what a decision about it needs.
    """

    model: str
    tokens: int
    held: Mapping[str, Held]
    partial: bool
    remembered: Remembered


class Prefixes(Protocol):
    """Answers which pods hold how much of a prompt."""

    async def of(self, shape: requests.Shape, body: Mapping[str, Any], deadline: float) -> Prompt:
        """Score a request's prompt; ``deadline`` in monotonic seconds.

        Raises:
            ScorerError: the body is none that an engine takes, or its prompt cannot be scored now.
        """


class CorePrefixes:
    """Answers from a scorer's core in this process.

    Args:
        core: of the scorer.
        pool: its tokenizers.
    """

    def __init__(self, core: Core, pool: TokenizerPool) -> None:
        self._core = core
        self._pool = pool

    async def of(self, shape: requests.Shape, body: Mapping[str, Any], deadline: float) -> Prompt:
        """Score the first prompt of a body; a batch of prompts goes where its first one goes.

        Raises:
            ScorerError: the body is none that an engine takes, or its prompt cannot be scored now.
        """
        request = requests.read(shape, body)[0]
        encoded = await self._pool.tokens_of(request.model, request)
        asked = pb.ScoreRequest(
            model=request.model,
            tokens_packed=encoded.ids,
            cache_salt=request.cache_salt,
            lora=request.lora,
            usable_only=True,
        )
        for place in request.multimodal:
            asked.multimodal.add(identifier=place.identifier, offset=place.offset, length=place.length)
        scored = await self._core.run(asked, deadline)
        return _prompt(asked, scored)


def _prompt(asked: pb.ScoreRequest, scored: Scored) -> Prompt:
    size = scored.response.block_size_tokens
    held = {}
    for match in scored.matches:
        tiers = {name: blocks * size for name, blocks in match.tiers.items()}
        held[match.pod.name] = Held(match.tokens, tiers, match.speculative * size, match.suspect * size)
    return Prompt(
        asked.model,
        scored.response.prompt_tokens,
        held,
        scored.response.freshness.partial,
        remember(asked, scored.keys, scored.response),
    )
