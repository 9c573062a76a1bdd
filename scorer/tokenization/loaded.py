"""Loaded tokenizers: one load per model however many ask, and the least used ones go when there are too many."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Final

from kvatlas.scorer.tokenization.backend import LoadedTokenizer, TokenizerBackend

_Key = tuple[str, str]
_FAILURE_SECONDS: Final = 5.0


class Loaded:
    """Engines by backend and model. Safe to use from many threads.

    A failed load is told again to everybody for a moment and then tried again, so that a burst of requests
    for a model that does not exist is one look and not thousands.
    """

    def __init__(
        self,
        loader: Executor,
        *,
        max_models: int,
        max_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._loader = loader
        self._max_models = max_models
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._engines: OrderedDict[_Key, Future[LoadedTokenizer]] = OrderedDict()
        self._failed_at: dict[_Key, float] = {}
        self.loads = 0

    def get(self, backend: TokenizerBackend, model: str) -> Future[LoadedTokenizer]:
        """Return the engine of a model, loaded or loading; the result may be an error of the backend."""
        key = (backend.name, model)
        with self._lock:
            self._forget_failures()
            future = self._engines.get(key)
            if future is None:
                future = self._engines[key] = self._loader.submit(self._load, key, backend)
                self.loads += 1
            else:
                self._engines.move_to_end(key)
        return future

    def models(self) -> list[str]:
        """Return the models that are loaded, least recently used first."""
        with self._lock:
            return [model for (_, model), future in self._engines.items() if _ready(future) is not None]

    def close(self) -> None:
        """Close every engine."""
        with self._lock:
            engines = [engine for future in self._engines.values() if (engine := _ready(future))]
            self._engines.clear()
        for engine in engines:
            engine.close()

    def _load(self, key: _Key, backend: TokenizerBackend) -> LoadedTokenizer:
        try:
            engine = backend.load(key[1])
        except BaseException:
            with self._lock:
                self._failed_at[key] = self._clock()
            raise
        for old in self._make_room(engine.size_bytes):
            old.close()
        return engine

    def _make_room(self, size_bytes: int) -> list[LoadedTokenizer]:
        """Take engines out, least recently used first, until one more fits beside the rest."""
        gone = []
        with self._lock:
            held = {key: engine for key, future in self._engines.items() if (engine := _ready(future))}
            total = sum(engine.size_bytes for engine in held.values()) + size_bytes
            count = len(held) + 1
            for key, engine in held.items():
                if count <= self._max_models and total <= self._max_bytes:
                    break
                del self._engines[key]
                gone.append(engine)
                total -= engine.size_bytes
                count -= 1
        return gone

    def _forget_failures(self) -> None:
        limit = self._clock() - _FAILURE_SECONDS
        for key in [key for key, failed_at in self._failed_at.items() if failed_at <= limit]:
            del self._failed_at[key]
            self._engines.pop(key, None)


def _ready(future: Future[LoadedTokenizer]) -> LoadedTokenizer | None:
    if future.done() and not future.cancelled() and future.exception() is None:
        return future.result()
    return None
