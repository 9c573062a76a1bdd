"""The indexer as a library: engines in, scores out, in one process.

    async with Indexer() as indexer:
        await indexer.add_engine("tcp://10.0.0.5:5557,tcp://10.0.0.5:5558,model=llama")
        scored = await indexer.score_tokens(token_ids, "llama")
        scored.best          # the pod to send the request to

It runs the same code as the pipeline (decode, resolve, apply, walk), so moving to the pipeline later changes the
constructor: :meth:`Indexer.from_kafka` follows what the workers wrote and keeps a full replica here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self

import msgspec

from kvatlas.bridge.block_key import TOKEN_BYTES, block_keys, multimodal_extra, pack_tokens, root_key
from kvatlas.bridge.options import EngineSpec, parse_engine
from kvatlas.bridge.records import PodRecord
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.scorer.approximate import Approximate
from kvatlas.scorer.backends.base import Backend, Stats
from kvatlas.scorer.backends.errors import BackendError
from kvatlas.scorer.backends.memory import MemoryBackend
from kvatlas.scorer.errors import InputError, NotReadyError, UnknownModelError, UnknownPodError
from kvatlas.scorer.indexer_answers import Explained, PodFreshness, PodScore, Scored
from kvatlas.scorer.indexer_explain import explain
from kvatlas.scorer.indexer_options import IndexerOptions, Source, Tokenizers, Tokens
from kvatlas.scorer.pods import PodTable
from kvatlas.scorer.score import Match, Walk
from kvatlas.streams.message import parse_message

log = logging.getLogger(__name__)

_FIRST_BLOCKS = 1_024
_GROWTH = 4
_MOST_BLOCKS = 65_536


class Indexer:
    """Scores prompts against what the engines hold. One event loop uses it, from :meth:`start` to :meth:`stop`.

    Attributes:
        backend: the index.
        approximate: predicted caches of pods without events.
    """

    def __init__(
        self,
        backend: Backend | None = None,
        options: IndexerOptions | None = None,
        *,
        engines: Collection[str] = (),
        tokenizers: Tokenizers | None = None,
        clock: Callable[[], int] = time.time_ns,
        observe: Callable[[str, float], None] = lambda _stage, _seconds: None,
    ) -> None:
        """Describe the indexer; nothing is opened before :meth:`start`.

        Args:
            backend: the index; None keeps it in this process's memory.
            options: block size, weights, meaning of events.
            engines: endpoints to subscribe to at start, as ``kvatlas bridge --engine`` takes them.
            tokenizers: for prompts and chats; None takes token ids only. Closed by whoever made it.
            clock: wall clock, ns.
            observe: told of each stage's duration in seconds: tokenize, keys, lookup, score.
        """
        self.backend: Backend = backend or MemoryBackend()
        self._options = options or IndexerOptions()
        self._engines = list(engines)
        self._tokenizers = tokenizers
        self._clock = clock
        self._observe = observe
        self._kafka: KafkaSettings | None = None
        self._size = self._options.block_size_tokens
        self._pods = PodTable(self._size)
        self._source: Source | None = None
        self.approximate = Approximate(self.backend, self._pods, clock)

    @classmethod
    def from_kafka(
        cls,
        kafka: KafkaSettings,
        backend: Backend | None = None,
        options: IndexerOptions | None = None,
        *,
        tokenizers: Tokenizers | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> Self:
        """Return an indexer that follows ``kv-blocks`` and ``kv-pods`` instead of engines.

        Args:
            kafka: how to reach Kafka.
            backend: a memory backend with bounds of its own; None for the default.
            options: as for the constructor.
            tokenizers: as for the constructor.
            clock: wall clock, ns.

        The replica has what ``kv-blocks`` still holds (its retention) and everything written from then on.
        """
        indexer = cls(backend, options, tokenizers=tokenizers, clock=clock)
        indexer._kafka = kafka
        return indexer

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the index, subscribe to the engines or read the log.

        Raises:
            BackendError: the index cannot be opened.
            LogError: Kafka could not be read in time.
            KvatlasError: an endpoint is not valid.
        """
        await self.backend.start()
        try:
            if self._kafka is not None:
                from kvatlas.scorer.replica import Replica  # noqa: PLC0415 - Kafka's client only where it is used

                replica = Replica(self._kafka, self.backend, self._pods, self._set_block_size)
                self._source = replica
                await replica.start(self._options.start_timeout_seconds)
                return
            self._open_feed()
            for text in self._engines:
                await self.add_engine(text)
        except BaseException:
            await self.stop()
            raise

    def _open_feed(self) -> None:
        from kvatlas.scorer.feed import Feed  # noqa: PLC0415 - ZMQ only where engines are read

        resolve = msgspec.structs.replace(self._options.resolve, block_size_tokens=self._size)
        feed = Feed(self.backend, self._pods, bridge=self._options.bridge, resolve=resolve, clock=self._clock)
        self._source = self._feed = feed
        feed.start()

    _feed: Any = None

    def _set_block_size(self, tokens: int) -> None:
        self._size = tokens
        self._pods.set_block_size(tokens)

    async def stop(self) -> None:
        """Stop reading and close the index."""
        source, self._source, self._feed = self._source, None, None
        if source is not None:
            await source.stop()
        await self.backend.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def caught_up(self, timeout_seconds: float = 10.0) -> None:
        """Wait until what every engine had published by now has been applied (a log: what it held at the start).

        Raises:
            NotReadyError: not within the time; says which engines are behind.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self._running.caught_up:
            if time.monotonic() >= deadline:
                late = (
                    [] if self._feed is None else [e.spec.live for e in self._feed.engines.values() if not e.caught_up]
                )
                raise NotReadyError(
                    f"not caught up after {timeout_seconds:g} s: {', '.join(late) or 'updates still wait'}"
                )
            await asyncio.sleep(0.005)

    @property
    def _running(self) -> Source:
        if self._source is None:
            raise NotReadyError("the indexer is not started")
        if (error := self._source.failed()) is not None:
            raise NotReadyError(f"the indexer has stopped reading: {error}") from error
        return self._source

    # --- engines --------------------------------------------------------------------------------------------------

    async def add_engine(self, engine: EngineSpec | str) -> None:
        """Subscribe to an engine: a spec, or text as ``kvatlas bridge --engine`` takes it (all its ranks).

        Raises:
            KvatlasError: the endpoint is not valid.
        """
        feed = self._engine_feed()
        for spec in parse_engine(engine) if isinstance(engine, str) else [engine]:
            feed.add(spec)

    async def remove_engine(self, pod: str) -> None:
        """Leave a pod (by pod id, or by live address): it scores no more.

        Raises:
            UnknownPodError: there is none.
        """
        if not await self._engine_feed().remove(pod):
            raise UnknownPodError(f"no engine {pod!r} here; there are {', '.join(self._pods.names()) or 'none'}")

    async def apply_record(
        self, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        """Apply one record as ``kv-events`` has them: from a capture, or from a transport of the caller's own.

        Args:
            key: pod id.
            value: an engine's payload, or a control record (start, gap, restart, gone).
            headers: ``sequence`` at least, ``model`` and ``incarnation`` where they are known.

        Nothing is raised for a record that cannot be used: it is counted and logged. Records of one pod come in order.

        Raises:
            InputError: this indexer follows a log.
        """
        await self._engine_feed().record(parse_message(key, value, headers))

    def _engine_feed(self) -> Any:
        _ = self._running
        if self._feed is None:
            raise InputError("this indexer follows a log: engines belong to its bridge")
        return self._feed

    # --- pods without events --------------------------------------------------------------------------------------

    def add_approximate(self, pod: str, model: str, capacity_blocks: int) -> None:
        """Enter a pod whose engine sends no events; its scores come from :meth:`note_decision`, marked approximate.

        It becomes precise by itself as soon as events name the same pod id.

        Raises:
            InputError: a capacity below one block.
        """
        self.approximate.add(pod, model, capacity_blocks)

    async def note_decision(
        self, pod: str, tokens: Tokens, model: str, *, lora: str | None = None, cache_salt: str | None = None
    ) -> bool:
        """Tell that a prompt was sent to a pod; False when the pod is precise, so that nothing is predicted.

        Raises:
            UnknownPodError: the pod is not known.
        """
        return await self.approximate.decided(pod, self.block_keys(tokens, model, lora=lora, cache_salt=cache_salt))

    def pods(self, model: str = "") -> list[PodRecord]:
        """Return the pods known, by name; of one model when given."""
        return self._pods.listed(model)

    @property
    def engines(self) -> Mapping[str, Any]:
        """The engines subscribed to, by live address; for metrics."""
        return {} if self._feed is None else self._feed.engines

    @property
    def counts(self) -> Mapping[str, int]:
        """What was applied so far, by name, as the workers count it."""
        return self._running.counts

    async def stats(self) -> Stats:
        """Return what the index says of itself."""
        return await self.backend.stats()

    # --- scores ---------------------------------------------------------------------------------------------------

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
    ) -> Explained:
        """Say block by block who holds a prompt, and why each pod's match ends where it does.

        Raises:
            ScorerError: the request cannot be scored.
        """
        packed = _packed(tokens)
        keys = self.block_keys(packed, model, lora=lora, cache_salt=cache_salt)
        began = time.perf_counter()
        scored, values = await self._score(keys, len(packed) // TOKEN_BYTES, model, pods, began=began, all_blocks=True)
        scene = self._pods.fleet.scene(model, self._options.weights)
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
        _ = self._running
        scene = self._pods.fleet.scene(model, self._options.weights)
        steps = Walk(scene, tokens, pods=pods, whole_prompt=not self._options.usable_only)
        values: list[bytes | None] = []
        looked, chunk, walking = 0.0, _FIRST_BLOCKS, True
        while len(values) < len(keys) and (walking or all_blocks):
            part = keys[len(values) : len(values) + chunk]
            start = time.perf_counter()
            found = await self._lookup(part)
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
            scores={match.pod.name: _score_of(match) for match in matches},
            freshness=self._freshness(matches),
            partial=steps.partial,
            took_ms={stage: seconds * 1e3 for stage, seconds in took.items()},
        )
        return scored, values

    async def _lookup(self, keys: list[bytes]) -> Sequence[bytes | None]:
        try:
            return await self.backend.lookup(keys)
        except BackendError as error:
            if not error.retriable:
                raise
            # As with a worker that is away: no answer is not "nobody holds it", and the score says that it is partial.
            log.warning("%s", error)
            return [None] * len(keys)

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


def _score_of(match: Match) -> PodScore:
    return PodScore(
        score=match.score,
        matched_blocks=match.blocks,
        matched_tokens=match.tokens,
        tiers=match.tiers,
        suspect_blocks=match.suspect,
        approximate=match.pod.approximate,
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
