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
import functools
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from kvatlas.bridge.engines.spec import EngineSpec, parse_engine
from kvatlas.bridge.model.records import PodRecord
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer.errors import InputError, NotReadyError, UnknownPodError
from kvatlas.scorer.library.approximate import Approximate
from kvatlas.scorer.library.backends.base import Backend, Stats
from kvatlas.scorer.library.backends.memory import MemoryBackend
from kvatlas.scorer.library.options import IndexerOptions, Source, Tokenizers, Tokens
from kvatlas.scorer.library.scores import Scores
from kvatlas.streams.resolve.message import parse_message

if TYPE_CHECKING:
    from kvatlas.scorer.library.backends.mirror import MirrorBackend


class Indexer(Scores):
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

        Raises:
            InputError: an argument that cannot mean anything.
        """
        if isinstance(engines, str):
            raise InputError(f"engines: {engines!r} is text; expected a collection of endpoints, such as [{engines!r}]")
        if backend is not None and not hasattr(backend, "lookup"):
            raise InputError(
                f"backend: {backend!r} is none; expected one such as RedisBackend(url) or RocksBackend(folder)"
            )
        super().__init__(
            MemoryBackend() if backend is None else backend,
            options or IndexerOptions(),
            tokenizers=tokenizers,
            clock=clock,
            observe=observe,
        )
        self._engines = list(engines)
        self._open: Callable[[], Awaitable[Source]] = self._subscribe
        self.approximate = Approximate(self.backend, self._pods, clock, recover=self._recover)

    @classmethod
    def from_kafka(
        cls,
        kafka: KafkaSettings,
        backend: Backend | None = None,
        options: IndexerOptions | None = None,
        *,
        tokenizers: Tokenizers | None = None,
        clock: Callable[[], int] = time.time_ns,
        observe: Callable[[str, float], None] = lambda _stage, _seconds: None,
    ) -> Self:
        """Return an indexer that follows ``kv-blocks`` and ``kv-pods`` instead of engines.

        Args:
            kafka: how to reach Kafka.
            backend: a memory backend with bounds of its own, or one in RocksDB, which goes on where it was when it
                is opened again; None for the default.
            options: as for the constructor.
            tokenizers: as for the constructor.
            clock: wall clock, ns.
            observe: as for the constructor.

        The replica has what ``kv-blocks`` still holds (its retention) and everything written from then on. It follows
        the index version that the scorers use. While it is read anew, after a move to another version or when the log
        has lost a part that was not read yet, scores are partial.
        """
        indexer = cls(backend, options, tokenizers=tokenizers, clock=clock, observe=observe)
        indexer._open = functools.partial(indexer._follow_log, kafka)
        return indexer

    @classmethod
    def from_mirror(
        cls,
        mirror: MirrorBackend,
        options: IndexerOptions | None = None,
        *,
        tokenizers: Tokenizers | None = None,
        clock: Callable[[], int] = time.time_ns,
        observe: Callable[[str, float], None] = lambda _stage, _seconds: None,
    ) -> Self:
        """Return an indexer that only reads: the index that workers mirror into a Redis or Valkey server.

        Args:
            mirror: where; see ``kvatlas worker --mirror``.
            options: as for the constructor; the block size is the mirror's.
            tokenizers: as for the constructor.
            clock: wall clock, ns.
            observe: as for the constructor.
        """
        indexer = cls(mirror, options, tokenizers=tokenizers, clock=clock, observe=observe)
        indexer._open = functools.partial(indexer._follow_mirror, mirror)
        return indexer

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the index, subscribe to the engines or read the log.

        Raises:
            BackendError: the index cannot be opened.
            LogError: Kafka could not be read in time.
            InputError: it has been started already.
            KvatlasError: an endpoint is not valid.
        """
        if self._source is not None:
            raise InputError("the indexer has been started already")
        try:
            await self.backend.start()
            self._source = await self._open()
        except BaseException:
            await self.stop()
            raise

    async def _subscribe(self) -> Source:
        from kvatlas.scorer.library.feed import Feed  # noqa: PLC0415 - ZMQ only where engines are read
        from kvatlas.scorer.library.saved_state import FeedState  # noqa: PLC0415 - RocksDB only where it is used

        resolve = msgspec.structs.replace(self._options.resolve, block_size_tokens=self._size)
        state = FeedState(Path(self._options.state_dir)) if self._options.state_dir else None
        feed = Feed(
            self.backend, self._pods, bridge=self._options.bridge, resolve=resolve, clock=self._clock, state=state
        )
        feed.applier.forgotten = self.approximate.forgotten
        self._source = self._feed = feed
        await feed.start()
        for text in self._engines:
            await self.add_engine(text)
        return feed

    async def _follow_log(self, kafka: KafkaSettings) -> Source:
        from kvatlas.scorer.library.replica import Replica  # noqa: PLC0415 - Kafka's client only where it is used

        replica = Replica(kafka, self.backend, self._pods, self._set_block_size, self.approximate.forgotten)
        self._source = replica  # stopped with the indexer, also when its start fails
        await replica.start(self._options.start_timeout_seconds)
        return replica

    async def _follow_mirror(self, mirror: MirrorBackend) -> Source:
        from kvatlas.scorer.library.backends.mirror import MirrorFollower  # noqa: PLC0415 - Redis only where it is used

        follower = MirrorFollower(mirror, self._pods, self._set_block_size)
        self._source = follower
        await follower.start()
        return follower

    _feed: Any = None

    async def stop(self) -> None:
        """Stop reading and close the index."""
        source, self._source, self._feed = self._source, None, None
        try:
            if source is not None:
                await source.stop()
        finally:
            await self.backend.close()

    async def _recover(self) -> None:
        if self._feed is not None:
            await self._feed.applier.recover()

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
                late = [] if self._feed is None else self._feed.late()
                raise NotReadyError(
                    f"not caught up after {timeout_seconds:g} s: {', '.join(late) or 'updates still wait'}"
                )
            await asyncio.sleep(0.005)

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
        """Leave a pod (by pod id, or by live address; one without events by pod id): it scores no more.

        Raises:
            UnknownPodError: there is none.
            InputError: this indexer follows a log or a mirror, and the pod is not one of predictions.
        """
        _ = self._running
        if self._feed is not None and await self._feed.remove(pod):
            return
        if self.approximate.predicts(pod):
            await self.approximate.remove(pod)
        else:
            self._engine_feed()
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
            InputError: this indexer follows a log or a mirror.
        """
        await self._engine_feed().record(parse_message(key, value, headers))

    def _engine_feed(self) -> Any:
        _ = self._running
        if self._feed is None:
            raise InputError("this indexer follows a log or a mirror: engines belong to its bridge")
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
        self,
        pod: str,
        tokens: Tokens,
        model: str,
        *,
        lora: str | None = None,
        cache_salt: str | None = None,
        multimodal: Sequence[tuple[str, int, int]] = (),
    ) -> bool:
        """Tell that a prompt was sent to a pod; False when the pod is precise, so that nothing is predicted.

        Raises:
            UnknownPodError: the pod is not known.
        """
        keys = self.block_keys(tokens, model, lora=lora, cache_salt=cache_salt, multimodal=multimodal)
        return await self.approximate.decided(pod, keys)

    def pods(self, model: str = "") -> list[PodRecord]:
        """Return the pods known, by name; of one model when given."""
        return self._pods.listed(model)

    @property
    def engines(self) -> Mapping[str, Any]:
        """The engines subscribed to, by live address; for metrics."""
        return {} if self._feed is None else self._feed.streams.endpoints

    def pending_bytes(self, pod: str) -> int:
        """Return the bytes of a pod's messages that wait to be applied."""
        return 0 if self._feed is None else self._feed.pending_bytes(pod)

    @property
    def counts(self) -> Mapping[str, int]:
        """What was applied so far, by name, as the workers count it."""
        return self._running.counts

    async def stats(self) -> Stats:
        """Return what the index says of itself."""
        return await self.backend.stats()
