"""Scores of the indexer library: its arguments as queries of the scoring engine, whatever feeds the index."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.bridge.model.block_key import TOKEN_BYTES, pack_tokens
from kvatlas.scorer.errors import InputError, NotReadyError, UnknownModelError
from kvatlas.scorer.library.backends.base import Backend
from kvatlas.scorer.library.lookups import BackendLookups
from kvatlas.scorer.library.options import IndexerOptions, Source, Tokenizers, Tokens
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.scoring.answers import Explained, Scored
from kvatlas.scorer.scoring.lookup import IndexView
from kvatlas.scorer.scoring.query import PlacedItem, PromptTokens, ScoreQuery, keys_of
from kvatlas.scorer.scoring.scorer import Scorer
from kvatlas.scorer.scoring.strategies import Weighing


class Scores:
    """What can be asked of an index. One event loop uses it.

    Attributes:
        backend: the index.
    """

    def __init__(
        self,
        backend: Backend,
        options: IndexerOptions,
        *,
        tokenizers: Tokenizers | None,
        clock: Callable[[], int],
        observe: Callable[[str, float], None],
    ) -> None:
        """Take the parts over.

        Args:
            backend: the index.
            options: block size, weights.
            tokenizers: for prompts and chats; None takes token ids only.
            clock: wall clock, ns.
            observe: told of each stage's duration in seconds: tokenize, keys, lookup, score.

        Raises:
            InputError: there is no such strategy, or a block size that is none.
        """
        if options.block_size_tokens < 1:
            raise InputError(f"block_size_tokens: {options.block_size_tokens}; expected at least 1")
        self.backend = backend
        self._options = options
        self._tokenizers = tokenizers
        self._clock = clock
        self._observe = observe
        self._size = options.block_size_tokens
        self._pods = PodTable(self._size)
        self._source: Source | None = None
        self._lookups = BackendLookups(backend, lambda: self._running)
        self._scorer = Scorer(
            self._view,
            Weighing(options.weights, options.strategy),
            clock_ns=clock,
            timer=time.perf_counter,
            observe=observe,
        )

    @property
    def _running(self) -> Source:
        if self._source is None:
            raise NotReadyError("the indexer is not started")
        if (error := self._source.failed()) is not None:
            raise NotReadyError(f"the indexer has stopped reading: {error}") from error
        return self._source

    def _view(self) -> IndexView:
        _ = self._running
        return IndexView(self._pods.fleet, self._pods.merged, self._lookups)

    def _set_block_size(self, tokens: int) -> None:
        self._size = tokens
        self._pods.set_block_size(tokens)

    def block_keys(
        self,
        tokens: Tokens,
        model: str,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        multimodal: Sequence[tuple[str, int, int]] = (),
    ) -> list[bytes]:
        """Return the canonical keys of a prompt's full blocks.

        Args:
            tokens: token ids, or packed little-endian u32.
            model: model name, part of every key.
            lora: adapter name.
            cache_salt: the request's salt.
            multimodal: (identifier, offset, length) of each item, in tokens.

        Raises:
            InputError: no model, or a token id that is none.
        """
        query = _query(PromptTokens(_packed(tokens)), model, lora=lora, cache_salt=cache_salt, multimodal=multimodal)
        return keys_of(query, self._size)

    async def score_tokens(
        self,
        tokens: Tokens,
        model: str,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        pods: Collection[str] = (),
        multimodal: Sequence[tuple[str, int, int]] = (),
    ) -> Scored:
        """Score every pod for a prompt of token ids.

        Args:
            tokens: token ids, or packed little-endian u32.
            model: model name.
            lora: adapter name.
            cache_salt: the request's salt.
            pods: pod ids that may score; empty means all.
            multimodal: (identifier, offset, length) of each item, in tokens.

        Raises:
            InputError: the request does not make sense.
            NotReadyError: the indexer is not running.
        """
        query = self._asked(
            PromptTokens(_packed(tokens)), model, lora=lora, cache_salt=cache_salt, pods=pods, multimodal=multimodal
        )
        return await self._scorer.score(query, math.inf)

    async def score_prompt(
        self,
        prompt: str,
        model: str,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        pods: Collection[str] = (),
        add_special_tokens: bool = True,
    ) -> Scored:
        """Tokenize a prompt as a completion and score it.

        Raises:
            UnknownModelError: there is no tokenizer for the model.
            ScorerError: the request cannot be scored.
        """
        began = time.perf_counter()
        encoded = await self._pool(model).encode(model, prompt, add_special_tokens)
        query = self._asked(_encoded(encoded, began), model, lora=lora, cache_salt=cache_salt, pods=pods)
        return await self._scorer.score(query, math.inf)

    async def score_chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Any,
        model: str,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        pods: Collection[str] = (),
    ) -> Scored:
        """Render and tokenize a chat as the engine does, and score it.

        Args:
            messages: OpenAI-style messages, or a ``ChatInput`` with tools, documents and template options.
            model: model name.
            lora: adapter name.
            cache_salt: the request's salt.
            pods: pod ids that may score; empty means all.

        Raises:
            UnknownModelError: there is no tokenizer for the model.
            ScorerError: the request cannot be scored.
        """
        from kvatlas.scorer.tokenization.records import ChatInput  # noqa: PLC0415 - numpy only where text is scored

        began = time.perf_counter()
        chat = messages if isinstance(messages, ChatInput) else ChatInput(messages=list(messages))
        encoded = await self._pool(model).encode_chat(model, chat)
        query = self._asked(_encoded(encoded, began), model, lora=lora, cache_salt=cache_salt, pods=pods)
        return await self._scorer.score(query, math.inf)

    def _pool(self, model: str) -> Tokenizers:
        if self._tokenizers is None:
            raise UnknownModelError(f"no tokenizer for {model!r}: pass a TokenizerPool as `tokenizers`")
        return self._tokenizers

    async def explain(
        self,
        tokens: Tokens,
        model: str,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        pods: Collection[str] = (),
        multimodal: Sequence[tuple[str, int, int]] = (),
    ) -> Explained:
        """Say block by block who holds a prompt, and why each pod's match ends where it does.

        Raises:
            ScorerError: the request cannot be scored.
        """
        query = self._asked(
            PromptTokens(_packed(tokens)), model, lora=lora, cache_salt=cache_salt, pods=pods, multimodal=multimodal
        )
        return await self._scorer.explain(query, math.inf)

    def _asked(
        self,
        prompt: PromptTokens,
        model: str,
        *,
        lora: str | None,
        cache_salt: str | None,
        pods: Collection[str],
        multimodal: Sequence[PlacedItem] = (),
    ) -> ScoreQuery:
        if isinstance(pods, str):
            raise InputError(f"pods: {pods!r} is text; expected a collection of pod ids")
        query = _query(prompt, model, lora=lora, cache_salt=cache_salt, multimodal=multimodal)
        return msgspec.structs.replace(query, pods=frozenset(pods), usable_only=self._options.usable_only)


def _query(
    prompt: PromptTokens, model: str, *, lora: str | None, cache_salt: str | None, multimodal: Sequence[PlacedItem]
) -> ScoreQuery:
    return ScoreQuery(model=model, prompt=prompt, lora=lora or "", cache_salt=cache_salt or "", items=tuple(multimodal))


def _encoded(encoded: Any, began: float) -> PromptTokens:
    return PromptTokens(encoded.ids, encoded.backend, time.perf_counter() - began)


def _packed(tokens: Tokens) -> bytes:
    if isinstance(tokens, bytes):
        if len(tokens) % TOKEN_BYTES:
            raise InputError(f"tokens: {len(tokens)} packed bytes are no multiple of {TOKEN_BYTES}")
        return tokens
    try:
        return pack_tokens(tokens)
    except (OverflowError, TypeError) as error:
        raise InputError(f"tokens: {error}") from error
