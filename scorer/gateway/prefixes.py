"""From a request's body to what each pod holds of its prompt: read, tokenized, scored by a scorer in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from kvatlas.scorer.api.bounds import check_name
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.errors import InputError, NotReadyError
from kvatlas.scorer.picker.endpoints import Held, held_of
from kvatlas.scorer.scoring.query import PromptTokens, ScoreQuery
from kvatlas.scorer.scoring.remembered import Remembered, remember
from kvatlas.scorer.scoring.scorer import ScoringRun
from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.tokenization.pool import TokenizerPool


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

    def named(self, model: str) -> str:
        """Return a model as its engines call it, for a client's name of it or of an adapter."""

    async def of(self, shape: requests.Shape, body: Mapping[str, Any] | bytes, deadline: float) -> Prompt:
        """Score a request's prompt; the bytes of a body are read beside the event loop.

        ``deadline`` is in monotonic seconds.

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

    def named(self, model: str) -> str:
        """Return a model as its engines call it; a name that says nothing, or several things, stays what it is."""
        try:
            return self._core.intake.names.resolve(model, "")[0]
        except InputError:
            return model

    async def of(self, shape: requests.Shape, body: Mapping[str, Any] | bytes, deadline: float) -> Prompt:
        """Score the first prompt of a body; a batch of prompts goes where its first one goes.

        Raises:
            ScorerError: the body is none that an engine takes, or its prompt cannot be scored now.
            OverloadedError: there are more prompts than time to score them.
        """
        if self._core.stale:
            raise NotReadyError("no worker has announced itself lately: what the index says is not kept up to date")
        async with self._core.admission.turn(deadline):
            return await self._scored(shape, body, deadline)

    async def _scored(self, shape: requests.Shape, body: Mapping[str, Any] | bytes, deadline: float) -> Prompt:
        intake = self._core.intake
        prompts = await intake.prompts(shape, body) if isinstance(body, bytes) else requests.read(shape, body)
        request = prompts[0]
        check_name(request.model, "model")
        check_name(request.lora, "lora")
        model, lora = intake.names.resolve(request.model, request.lora)
        encoded = await self._pool.tokens_of(model, request)
        query = ScoreQuery(
            model=model,
            prompt=PromptTokens(encoded.ids, encoded.backend),
            cache_salt=request.cache_salt,
            lora=lora,
            items=[(place.identifier, place.offset, place.length) for place in request.multimodal],
            usable_only=True,
        )
        return _prompt(await self._core.run_query(query, deadline))


def _prompt(run: ScoringRun) -> Prompt:
    scored = run.scored
    held = {pod: held_of(found, scored.block_size_tokens) for pod, found in scored.scores.items()}
    remembered = remember(run.query, run.keys, scored)
    return Prompt(run.query.model, scored.prompt_tokens, held, scored.partial, remembered)
