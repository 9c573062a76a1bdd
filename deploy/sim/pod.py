"""One simulated pod: a paged cache, a scheduler that batches requests, and an engine's event publisher."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from kvatlas.deploy.sim.cache import (
    CacheEvent,
    ClearedCache,
    PagedCache,
    RemovedBlock,
    Request,
    Running,
    StoredBlocks,
)
from kvatlas.deploy.sim.errors import PoolFullError
from kvatlas.deploy.sim.names import Names

#: Weights of the default policy, by tier; a question may bring its own.
WEIGHTS: Final = {"gpu": 1.0, "cpu": 0.8}


class Publisher(Protocol):
    """What a pod needs of :class:`kvatlas.bridge.engines.publisher.EnginePublisher`."""

    endpoint: str
    replay_endpoint: str | None

    def start(self) -> None:
        """Bind the sockets."""

    def publish(self, events: Sequence[Mapping[str, Any]], *, timestamp: float, dp_rank: int | None = 0) -> int:
        """Send one batch and return its sequence."""

    def close(self) -> None:
        """Close the sockets."""


#: (live endpoint, replay endpoint or None) -> a publisher that is not started yet.
PublisherFactory = Callable[[str, str], Publisher]


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What a pod must score for a prompt.

    Attributes:
        matched_tokens: leading tokens in full blocks that the pod holds.
        matched_blocks: the same in canonical blocks.
        tiers: best tier of each engine block on the way.
        score: tier-weighted sum in canonical blocks.
    """

    matched_tokens: int
    matched_blocks: int
    tiers: list[str]
    score: float


class PodStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A pod for people and tests; ``sequence`` is that of the last batch it published, -1 before the first."""

    pod: str
    endpoint: str
    replay_endpoint: str | None
    sequence: int
    blocks: int
    running: int
    waiting: int
    incarnations: int
    counts: dict[str, int]


def wire_event(event: CacheEvent, block_size_tokens: int) -> dict[str, Any]:
    """Return an event as the newest vLLM says it (see its ``distributed/kv_events.py``)."""
    if isinstance(event, ClearedCache):
        return {"type": "AllBlocksCleared"}
    if isinstance(event, RemovedBlock):
        return {"type": "BlockRemoved", "block_hashes": [event.key], "medium": event.medium, "group_idx": 0}
    fields: dict[str, Any] = {
        "type": "BlockStored",
        "block_hashes": event.keys,
        "parent_block_hash": event.parent,
        "token_ids": event.tokens,
        "block_size": block_size_tokens if event.tokens else 0,
        "lora_id": int(event.lora.rsplit("-", 1)[-1]) + 1 if event.lora else None,
        "medium": event.medium,
        "lora_name": event.lora,
    }
    if event.extra:
        fields["extra_keys"] = event.extra
    fields["group_idx"] = 0
    return fields


class SimPod:
    """A pod of the fleet; every method may be called from any thread.

    Args:
        name: pod id.
        blocks, cpu_blocks, block_size_tokens: of its cache.
        canonical_block_size_tokens: of the deployment, for what ``expect`` and ``held`` say.
        model: what it serves.
        seed: of its engine keys; each restart takes another.
        max_running: requests in its batch at a time.
        publisher: makes its publisher.
        endpoints: what to bind (live, replay); a restart binds the same ports again.
        clock: wall clock, seconds since the epoch.
    """

    def __init__(
        self,
        name: str,
        *,
        blocks: int,
        block_size_tokens: int,
        model: str,
        seed: int,
        publisher: PublisherFactory,
        clock: Callable[[], float],
        cpu_blocks: int = 0,
        canonical_block_size_tokens: int = 16,
        max_running: int = 8,
        endpoints: tuple[str, str] = ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
    ) -> None:
        self.name = name
        self._lock = threading.RLock()
        self._blocks, self._cpu_blocks, self._size = blocks, cpu_blocks, block_size_tokens
        self._canonical = canonical_block_size_tokens
        self._model, self._seed, self._max_running = model, seed, max_running
        self._clock, self._make = clock, publisher
        self._endpoints = endpoints
        self._publisher: Publisher | None = None
        self._incarnations = 0
        self._sequence = -1
        self._waiting: deque[Request] = deque()
        self._running: deque[tuple[Running, int]] = deque()
        self._names = Names(model, canonical_block_size_tokens)
        self._cache = self._new_cache()
        self.counts: Counter[str] = Counter()

    def _new_cache(self) -> PagedCache:
        return PagedCache(
            blocks=self._blocks,
            block_size_tokens=self._size,
            seed=self._seed + self._incarnations * 0x9E3779B97F4A7C15,
            cpu_blocks=self._cpu_blocks,
        )

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind the sockets."""
        with self._lock:
            publisher = self._make(*self._endpoints)
            publisher.start()
            self._publisher = publisher
            self._endpoints = (publisher.endpoint, publisher.replay_endpoint or "")

    def close(self) -> None:
        """Close the sockets; what is not sent yet is lost, as with an engine that dies."""
        with self._lock:
            if self._publisher is not None:
                self._publisher.close()
                self._publisher = None

    def restart(self) -> None:
        """Start as a new process would: other engine keys, empty cache, sequence from 0, no word about it."""
        with self._lock:
            self.close()
            self._incarnations += 1
            self._waiting.clear()
            self._running.clear()
            self._names.clear()
            self._cache = self._new_cache()
            self._sequence = -1
            self.counts["restarts"] += 1
            self.start()

    def clear(self) -> None:
        """Drop the prefix cache and say so; requests that run are finished first."""
        with self._lock:
            while self._running:
                self._cache.finish(self._running.popleft()[0])
            self._cache.clear()
            self.counts["clears"] += 1
            self._flush()

    # --- work ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request."""
        with self._lock:
            self._waiting.append(request)

    def step(self) -> bool:
        """Run one scheduler step: each running request gains up to a block, one waiting request is admitted.

        Returns:
            Whether anything is left to do.
        """
        with self._lock:
            for _ in range(len(self._running)):
                running, position = self._running.popleft()
                self._decode(running, position)
            if self._waiting and len(self._running) < self._max_running:
                self._admit()
            self._flush()
            return bool(self._waiting or self._running)

    def hit_tokens(self, request: Request) -> int:
        """Return the prompt tokens that would be found in the cache now."""
        with self._lock:
            keys, _ = self._cache.match(request.tokens, cache_salt=request.cache_salt, lora=request.lora)
            return len(keys) * self._size

    def begin(self, request: Request) -> Running:
        """Compute a prompt at once, for a server that schedules by itself; see :meth:`grow` and :meth:`end`.

        Raises:
            PoolFullError: too few free blocks now.
        """
        with self._lock:
            running = self._cache.start(request)
            self.counts["requests"] += 1
            self.counts["prompt_tokens"] += len(request.tokens)
            self.counts["hit_tokens"] += running.hit_blocks * self._size
            self._flush()
            return running

    def grow(self, running: Running, tokens: Sequence[int]) -> None:
        """Append generated tokens to a request that :meth:`begin` admitted.

        Raises:
            PoolFullError: too few free blocks now.
        """
        with self._lock:
            self._cache.extend(running, tokens)
            self._flush()

    def end(self, running: Running) -> None:
        """Give a request's blocks back."""
        with self._lock:
            self._cache.finish(running)
            self._flush()

    def drain(self) -> None:
        """Run steps until nothing is left to do."""
        while self.step():
            pass

    def _admit(self) -> None:
        request = self._waiting[0]
        try:
            running = self._cache.start(request)
        except PoolFullError:
            if not self._running:  # nobody will ever free enough
                self._waiting.popleft()
                self.counts["rejected"] += 1
            return
        self._waiting.popleft()
        self._running.append((running, 0))
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += len(request.tokens)
        self.counts["hit_tokens"] += running.hit_blocks * self._size

    def _decode(self, running: Running, position: int) -> None:
        # The last sampled token is never fed back, so the engine never computes its KV.
        output = running.request.output[:-1]
        tokens = output[position : position + self._size]
        if not tokens:
            self._cache.finish(running)
            return
        try:
            self._cache.extend(running, tokens)
        except PoolFullError:
            self._cache.finish(running)
            self.counts["cut_short"] += 1
            return
        self._running.append((running, position + len(tokens)))

    def _flush(self) -> None:
        events = self._cache.take_events()
        if not events:
            return
        self._rename(events)
        if self._publisher is None:
            self.counts["unpublished"] += 1
            return
        wire = [wire_event(event, self._size) for event in events]
        self._sequence = self._publisher.publish(wire, timestamp=self._clock(), dp_rank=0)
        self.counts["batches"] += 1
        self.counts["events"] += len(events)

    def _rename(self, events: Sequence[CacheEvent]) -> None:
        gone = []
        for event in events:
            if isinstance(event, StoredBlocks):
                if event.tokens:
                    self._names.add(event)
                self.counts["stored"] += len(event.keys)
            elif isinstance(event, RemovedBlock):
                gone.append(event.key)
                self.counts["removed"] += 1
            else:
                self._names.clear()
                gone.clear()
        for key in gone:
            if not self._cache.holds(key):
                self._names.drop(key)

    # --- truth --------------------------------------------------------------------------------------------------

    def expect(
        self,
        tokens: Sequence[int],
        *,
        model: str,
        cache_salt: str | None = None,
        lora: str | None = None,
        weights: Mapping[str, float] = WEIGHTS,
    ) -> Expected | None:
        """Return what a score of this prompt must be; None when the pod would not hit at all."""
        if model != self._model:
            return None
        with self._lock:
            # One token more: a match leaves out the last token, a score counts every full block that is held.
            _, tiers = self._cache.match([*tokens, 0], cache_salt=cache_salt, lora=lora)
        matched = len(tiers) * self._size
        blocks = matched // self._canonical
        if not blocks:
            return None
        score = 0.0
        for number in range(blocks):
            # A canonical block that spans several engine blocks is only as near as its farthest part.
            first = number * self._canonical // self._size
            last = ((number + 1) * self._canonical - 1) // self._size
            score += min(weights[tier] for tier in tiers[first : last + 1])
        return Expected(
            matched_tokens=blocks * self._canonical,
            matched_blocks=blocks,
            tiers=list(tiers),
            score=round(score, 9),
        )

    def held(self) -> dict[str, list[str]]:
        """Return the canonical block keys that this pod holds now: tier -> sorted hexadecimal keys."""
        with self._lock:
            held = self._cache.held()
            return {
                tier: sorted(key.hex() for key in self._names.of({key for key, on in held.items() if tier in on}))
                for tier in WEIGHTS
            }

    def status(self) -> PodStatus:
        """Return figures of the pod."""
        with self._lock:
            return PodStatus(
                pod=self.name,
                endpoint=self._endpoints[0],
                replay_endpoint=self._endpoints[1] or None,
                sequence=self._sequence,
                blocks=self._cache.held_blocks,
                running=len(self._running),
                waiting=len(self._waiting),
                incarnations=self._incarnations,
                counts=dict(self.counts),
            )
