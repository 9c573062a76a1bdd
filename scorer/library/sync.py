"""The indexer for programs without an event loop: the same calls, on a loop of its own in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.errors import NotReadyError
from kvatlas.scorer.library.backends.base import Stats
from kvatlas.scorer.library.indexer import Indexer
from kvatlas.scorer.library.options import Tokens
from kvatlas.scorer.scoring.answers import Explained, Scored

_T = TypeVar("_T")


class SyncIndexer:
    """Blocking calls of an :class:`Indexer`; any thread may make them.

    Args:
        make: makes the indexer, on the loop that it will live on: ``lambda: Indexer(engines=[...])``.
    """

    def __init__(self, make: Callable[[], Indexer] = Indexer) -> None:
        self._make = make
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._indexer: Indexer | None = None

    def start(self) -> None:
        """Start the thread and the indexer.

        Raises:
            KvatlasError: as :meth:`Indexer.start`.
        """
        if self._loop is not None:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvatlas-indexer", daemon=True)
        self._thread.start()
        try:
            self._indexer = self._do(self._started())
        except BaseException:
            self._end()
            raise

    async def _started(self) -> Indexer:
        indexer = self._make()
        await indexer.start()
        return indexer

    def stop(self) -> None:
        """Stop the indexer and its thread."""
        if self._indexer is not None:
            indexer, self._indexer = self._indexer, None
            try:
                self._do(indexer.stop())
            finally:
                self._end()

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._loop is None:
            work.close()
            raise NotReadyError("the indexer is not started")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def _it(self) -> Indexer:
        if self._indexer is None:
            raise NotReadyError("the indexer is not started")
        return self._indexer

    def add_engine(self, engine: EngineSpec | str) -> None:
        """See :meth:`Indexer.add_engine`."""
        self._do(self._it.add_engine(engine))

    def remove_engine(self, pod: str) -> None:
        """See :meth:`Indexer.remove_engine`."""
        self._do(self._it.remove_engine(pod))

    def add_approximate(self, pod: str, model: str, capacity_blocks: int) -> None:
        """See :meth:`Indexer.add_approximate`."""
        indexer = self._it

        async def added() -> None:
            indexer.add_approximate(pod, model, capacity_blocks)

        self._do(added())

    def note_decision(self, pod: str, tokens: Tokens, model: str, **options: Any) -> bool:
        """See :meth:`Indexer.note_decision`."""
        return self._do(self._it.note_decision(pod, tokens, model, **options))

    def apply_record(self, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]] = ()) -> None:
        """See :meth:`Indexer.apply_record`."""
        self._do(self._it.apply_record(key, value, headers))

    def caught_up(self, timeout_seconds: float = 10.0) -> None:
        """See :meth:`Indexer.caught_up`."""
        self._do(self._it.caught_up(timeout_seconds))

    def score_tokens(self, tokens: Tokens, model: str, **options: Any) -> Scored:
        """See :meth:`Indexer.score_tokens`."""
        return self._do(self._it.score_tokens(tokens, model, **options))

    def score_prompt(self, prompt: str, model: str, **options: Any) -> Scored:
        """See :meth:`Indexer.score_prompt`."""
        return self._do(self._it.score_prompt(prompt, model, **options))

    def score_chat(self, messages: Sequence[Any], model: str, **options: Any) -> Scored:
        """See :meth:`Indexer.score_chat`."""
        return self._do(self._it.score_chat(messages, model, **options))

    def explain(self, tokens: Tokens, model: str, **options: Any) -> Explained:
        """See :meth:`Indexer.explain`."""
        return self._do(self._it.explain(tokens, model, **options))

    def block_keys(self, tokens: Tokens, model: str, **options: Any) -> list[bytes]:
        """See :meth:`Indexer.block_keys`."""
        return self._it.block_keys(tokens, model, **options)

    def pods(self, model: str = "") -> list[PodRecord]:
        """See :meth:`Indexer.pods`."""

        async def listed() -> list[PodRecord]:
            return self._it.pods(model)

        return self._do(listed())

    @property
    def counts(self) -> Mapping[str, int]:
        """See :attr:`Indexer.counts`."""
        return self._it.counts

    def stats(self) -> Stats:
        """See :meth:`Indexer.stats`."""
        return self._do(self._it.stats())
