"""Scores of the indexer library: keys, lookup, walk, answer; whatever feeds the index."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.bridge.model.block_key import TOKEN_BYTES, block_keys, multimodal_extra, pack_tokens, root_key
from kvatlas.scorer.errors import InputError, NotReadyError, UnknownModelError
from kvatlas.scorer.library.answers import Explained, PodFreshness, PodScore, Scored
from kvatlas.scorer.library.backends.base import Backend
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.scorer.library.explain import explain
from kvatlas.scorer.library.options import IndexerOptions, Source, Tokenizers, Tokens
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.scoring.strategies import strategy_named
from kvatlas.scorer.scoring.walk import Match, Walk

log = logging.getLogger(__name__)

_FIRST_BLOCKS = 1_024
_GROWTH = 4
_MOST_BLOCKS = 65_536


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
        self._strategy = strategy_named(options.strategy)
        self._weights = self._strategy.weights(options.weights)
        self._size = options.block_size_tokens
        self._pods = PodTable(self._size)
        self._source: Source | None = None
        self._away = False

    @property
    def _running(self) -> Source:
        if self._source is None:
            raise NotReadyError("the indexer is not started")
        if (error := self._source.failed()) is not None:
            raise NotReadyError(f"the indexer has stopped reading: {error}") from error
        return self._source

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
        if not model:
            raise InputError("model: missing; block keys differ by model")
        packed = _packed(tokens)
        extra = None
        if multimodal:
            _check_items(multimodal, len(packed) // TOKEN_BYTES)
            extra = multimodal_extra(multimodal, self._size, len(packed) // TOKEN_BYTES // self._size)
        return block_keys(root_key(model, lora, cache_salt), packed, self._size, extra)

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
        packed = _packed(tokens)
        began = time.perf_counter()
        keys = self.block_keys(packed, model, lora=lora, cache_salt=cache_salt, multimodal=multimodal)
        scored, _ = await self._score(keys, len(packed) // TOKEN_BYTES, model, pods, began=began)
        return scored

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
        return await self._score_encoded(encoded, began, model=model, lora=lora, cache_salt=cache_salt, pods=pods)

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
        return await self._score_encoded(encoded, began, model=model, lora=lora, cache_salt=cache_salt, pods=pods)

    def _pool(self, model: str) -> Tokenizers:
        if self._tokenizers is None:
            raise UnknownModelError(f"no tokenizer for {model!r}: pass a TokenizerPool as `tokenizers`")
        return self._tokenizers

    async def _score_encoded(
        self,
        encoded: Any,
        began: float,
        *,
        model: str,
        lora: str | None,
        cache_salt: str | None,
        pods: Collection[str],
    ) -> Scored:
        tokenized = time.perf_counter()
        keys = self.block_keys(encoded.ids, model, lora=lora, cache_salt=cache_salt)
        scored, _ = await self._score(keys, len(encoded), model, pods, began=tokenized)
        self._observe("tokenize", tokenized - began)
        took = {"tokenize": (tokenized - began) * 1e3} | scored.took_ms
        return msgspec.structs.replace(scored, tokenizer=encoded.backend, took_ms=took)

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
        packed = _packed(tokens)
        keys = self.block_keys(packed, model, lora=lora, cache_salt=cache_salt, multimodal=multimodal)
        began = time.perf_counter()
        scored, values = await self._score(keys, len(packed) // TOKEN_BYTES, model, pods, began=began, all_blocks=True)
        scene = self._pods.fleet.scene(model, self._weights)
        return explain(scored, keys, values, scene, pods, usable_only=self._options.usable_only)

    async def _score(
        self,
        keys: list[bytes],
        tokens: int,
        model: str,
        pods: Collection[str],
        *,
        began: float,
        all_blocks: bool = False,
    ) -> tuple[Scored, list[bytes | None]]:
        hashed = time.perf_counter()
        if isinstance(pods, str):
            raise InputError(f"pods: {pods!r} is text; expected a collection of pod ids")
        source = self._running
        scene = self._pods.fleet.scene(model, self._weights)
        steps = Walk(scene, tokens, pods=pods, whole_prompt=not self._options.usable_only)
        values: list[bytes | None] = []
        looked, chunk, walking = 0.0, _FIRST_BLOCKS, True
        while len(values) < len(keys) and (walking or all_blocks):
            part = keys[len(values) : len(values) + chunk]
            start = time.perf_counter()
            found = await self._lookup(source, part)
            looked += time.perf_counter() - start
            values.extend(found)
            walking = walking and steps.feed(found)
            chunk = min(chunk * _GROWTH, _MOST_BLOCKS)
        matches = steps.matches()
        done = time.perf_counter()
        took = {"keys": hashed - began, "lookup": looked, "score": done - hashed - looked}
        for stage, seconds in took.items():
            self._observe(stage, seconds)
        scored = Scored(
            prompt_tokens=tokens,
            block_size_tokens=self._size,
            blocks=len(keys),
            scores=self._scored(matches, len(keys)),
            freshness=self._freshness(matches),
            partial=steps.partial,
            stale=source.stale,
            took_ms={stage: seconds * 1e3 for stage, seconds in took.items()},
        )
        return scored, values

    async def _lookup(self, source: Source, keys: list[bytes]) -> Sequence[bytes | None]:
        if source.rebuilding:
            return [None] * len(keys)
        try:
            found = await self.backend.lookup(keys)
        except BackendError as error:
            if not error.retriable:
                raise
            # As with a worker that is away: no answer is not "nobody holds it", and the score says that it is partial.
            (log.debug if self._away else log.warning)("%s; scores are partial meanwhile", error)
            self._away = True
            return [None] * len(keys)
        self._away = False
        return found

    def _scored(self, matches: Sequence[Match], blocks: int) -> dict[str, PodScore]:
        value = self._strategy.score
        found = {match.pod.name: _score_of(match, value(match, blocks)) for match in matches}
        return dict(sorted(found.items(), key=lambda item: -item[1].score))

    def _freshness(self, matches: Sequence[Match]) -> dict[str, PodFreshness]:
        now = self._clock()
        found = {}
        for match in matches:
            record = self._pods.merged.get(match.pod.name)
            if record is not None:
                age_ms = max(now - record.receive_ns, 0) / 1e6 if record.receive_ns else -1.0
                found[record.pod] = PodFreshness(
                    last_sequence=record.last_sequence, age_ms=age_ms, state=record.state, epoch=record.epoch
                )
        return found


def _score_of(match: Match, score: float) -> PodScore:
    return PodScore(
        score=score,
        matched_blocks=match.blocks,
        matched_tokens=match.tokens,
        tiers=match.tiers,
        suspect_blocks=match.suspect,
        approximate=match.pod.approximate,
    )


def _check_items(items: Sequence[tuple[str, int, int]], tokens: int) -> None:
    for number, (identifier, offset, length) in enumerate(items):
        if not identifier or offset < 0 or length < 1 or offset + length > tokens:
            raise InputError(
                f"multimodal[{number}]: needs an identifier and a range inside the prompt of {tokens} tokens, "
                f"has offset {offset} and length {length}"
            )


def _packed(tokens: Tokens) -> bytes:
    if isinstance(tokens, bytes):
        if len(tokens) % TOKEN_BYTES:
            raise InputError(f"tokens: {len(tokens)} packed bytes are no multiple of {TOKEN_BYTES}")
        return tokens
    try:
        return pack_tokens(tokens)
    except (OverflowError, TypeError) as error:
        raise InputError(f"tokens: {error}") from error
