"""Routing policies for the queueing model: ours, simple ones, and the published formulas of Dynamo and llm-d.

===============  ===================================================================================================
``kvatlas:N``    this project's picker: its own chooser and load book; cache by events, load by decisions and metrics
``cache-only``   the pod that holds most, least used among equals
``load-only``    our cost without any knowledge of caches
``random``       any pod
``round-robin``  one pod after the other
``approximate``  llm-d's default scorers over caches that each replica predicts from its own decisions
``dynamo:N``     Dynamo's KV router: prefill blocks not cached plus active blocks; loads counted, replicas in step
``llm-d:N``      llm-d's default scorers (queue 2, KV usage 2, prefix 3) over precise caches and scraped metrics
===============  ===================================================================================================

A request reaches one of the N replicas at random. What a replica decides itself it knows at once; what others decide
after a moment where the policy has a way to tell.
"""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final

from kvatlas.bridge.errors import SettingsError
from kvatlas.deploy.whatif.fleet import PrefixCache
from kvatlas.deploy.whatif.policies import replicas_of
from kvatlas.deploy.whatif.queueing import Engine, Request, Scraped
from kvatlas.scorer.picker.choose import Ask, Chooser, Rules
from kvatlas.scorer.picker.cost import CostWeights
from kvatlas.scorer.picker.endpoints import Endpoint, Held
from kvatlas.scorer.picker.load import EngineReport, LoadBook, LoadOptions

_SPECULATIVE_SECONDS: Final = 5.0
#: Until a decision is known to the other replicas.
_SYNC_SECONDS: Final = 0.05


class Knobs:
    """What the policies share.

    Args:
        engine: the pods' figures; a router of ours is told the prompt rate of its settings, which is this one.
        pods: how many.
        replicas: deciders.
        seed: of random choices.
        weights, rules: of ours.
        load_tokens_per_second: prompt rate in our settings; None for the engine's.
    """

    def __init__(
        self,
        engine: Engine,
        pods: int,
        *,
        replicas: int = 1,
        seed: int = 1,
        weights: CostWeights | None = None,
        rules: Rules | None = None,
        load_tokens_per_second: float | None = None,
    ) -> None:
        self.engine = engine
        self.pods = pods
        self.replicas = replicas
        self.seed = seed
        self.weights = weights or CostWeights()
        # Nothing is refused in the model.
        self.rules = (rules or Rules())._replace(most_requests=0, most_usage=0.0)
        self.load_tokens_per_second = load_tokens_per_second or engine.tokens_per_second


class _Base:
    """A policy that learns nothing."""

    def __init__(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.random = random.Random(knobs.seed)  # noqa: S311 - the same choices each run

    def stored(self, pod: int, blocks: Sequence[int], evicted: Sequence[int], now: float) -> None:
        """Nothing to learn."""

    def first_token(self, request: Request, pod: int, now: float) -> None:
        """Nothing to learn."""

    def ended(self, request: Request, pod: int, now: float) -> None:
        """Nothing to learn."""

    def scraped(self, pod: int, figures: Scraped, now: float) -> None:
        """Nothing to learn."""


class RandomPod(_Base):
    """Any pod."""

    def choose(self, request: Request, now: float) -> int:
        """Return a random pod."""
        del request, now
        return self.random.randrange(self.knobs.pods)


class RoundRobinPod(_Base):
    """One pod after the other, each replica for itself."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs)
        self._next = [replica * knobs.pods // knobs.replicas for replica in range(knobs.replicas)]

    def choose(self, request: Request, now: float) -> int:
        """Return the next pod."""
        del request, now
        replica = self.random.randrange(self.knobs.replicas)
        self._next[replica] = (self._next[replica] + 1) % self.knobs.pods
        return self._next[replica]


class _Precise(_Base):
    """A policy that follows the pods' events."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs)
        self._views: list[set[int]] = [set() for _ in range(knobs.pods)]

    def stored(self, pod: int, blocks: Sequence[int], evicted: Sequence[int], now: float) -> None:
        """Follow a pod's cache."""
        del now
        self._views[pod].update(blocks)
        self._views[pod].difference_update(evicted)

    def held_blocks(self, request: Request, pod: int) -> int:
        """Return the leading blocks that a pod holds, as events tell."""
        view = self._views[pod]
        for number, block in enumerate(request.blocks):
            if block not in view:
                return number
        return len(request.blocks)

    def held_tokens(self, request: Request, pod: int) -> int:
        """Return the same in tokens."""
        return min(self.held_blocks(request, pod) * self.knobs.engine.block_tokens, request.tokens)


class CacheOnly(_Precise):
    """The pod that holds most; the one that got least among equals."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs)
        self._given = [0] * knobs.pods

    def choose(self, request: Request, now: float) -> int:
        """Return the pod with the longest match."""
        del now
        pod = max(range(self.knobs.pods), key=lambda one: (self.held_blocks(request, one), -self._given[one]))
        self._given[pod] += request.tokens
        return pod


class _Replica:
    """One picker of ours: what it knows of load, and decisions that vouch for blocks not announced yet."""

    def __init__(self, knobs: Knobs, number: int) -> None:
        self.book = LoadBook(LoadOptions(tokens_per_second=knobs.load_tokens_per_second, request_seconds=600.0))
        self.chooser = Chooser(knobs.weights, knobs.rules, random.Random(knobs.seed + number).random)  # noqa: S311
        self.vouched: list[Counter[int]] = [Counter() for _ in range(knobs.pods)]
        self._until: deque[tuple[float, int, Sequence[int]]] = deque()

    def decided(self, request: Request, pod: int, uncached: float, now: float) -> None:
        """Learn of a decision."""
        self.book.given(str(request.number), str(pod), uncached, now)
        self.vouched[pod].update(request.blocks)
        self._until.append((now + _SPECULATIVE_SECONDS, pod, request.blocks))

    def expire(self, now: float) -> None:
        """Forget what vouched for long enough."""
        while self._until and self._until[0][0] <= now:
            _, pod, blocks = self._until.popleft()
            held = self.vouched[pod]
            for block in blocks:
                held[block] -= 1
                if held[block] <= 0:
                    del held[block]


class Kvatlas(_Precise):
    """This project's picker."""

    def __init__(self, knobs: Knobs, *, cache: bool = True) -> None:
        super().__init__(knobs)
        self._cache = cache
        self._replicas = [_Replica(knobs, number) for number in range(knobs.replicas)]
        self._endpoints = [Endpoint(str(pod), str(pod)) for pod in range(knobs.pods)]
        self._told: deque[tuple[float, int, Request, int, float]] = deque()

    def _tell(self, now: float) -> None:
        """Let replicas learn of the others' decisions whose time has come."""
        while self._told and self._told[0][0] <= now:
            when, by, request, pod, uncached = self._told.popleft()
            for number, replica in enumerate(self._replicas):
                if number != by:
                    replica.decided(request, pod, uncached, when)

    def _held(self, replica: _Replica, request: Request, pod: int) -> Held:
        view, vouched = self._views[pod], replica.vouched[pod]
        certain = matched = 0
        for number, block in enumerate(request.blocks):
            if block in view:
                certain = number + 1 if certain == number else certain
            elif block not in vouched:
                break
            matched = number + 1
        size = self.knobs.engine.block_tokens
        tokens = min(matched * size, request.tokens)
        return Held(tokens, {"gpu": tokens}, tokens - min(certain * size, tokens))

    def choose(self, request: Request, now: float) -> int:
        """Let one replica decide."""
        self._tell(now)
        by = self.random.randrange(len(self._replicas))
        replica = self._replicas[by]
        replica.expire(now)
        held = {}
        if self._cache:
            held = {str(pod): self._held(replica, request, pod) for pod in range(self.knobs.pods)}
            held = {pod: one for pod, one in held.items() if one.tokens}
        choice = replica.chooser.choose(
            Ask("", request.tokens, held), self._endpoints, lambda address: replica.book.load(address, now)
        )
        pod = int(choice.best.endpoint.address)
        uncached = choice.best.cost.compute
        replica.decided(request, pod, uncached, now)
        if len(self._replicas) > 1:
            self._told.append((now + _SYNC_SECONDS, by, request, pod, uncached))
        return pod

    def first_token(self, request: Request, pod: int, now: float) -> None:
        """All replicas learn that a prompt was computed."""
        del pod
        self._tell(now)
        for replica in self._replicas:
            replica.book.first_token(str(request.number), now)

    def ended(self, request: Request, pod: int, now: float) -> None:
        """All replicas learn that a request is over."""
        del pod, now
        for replica in self._replicas:
            replica.book.ended(str(request.number))

    def scraped(self, pod: int, figures: Scraped, now: float) -> None:
        """All replicas read a pod's metrics."""
        for replica in self._replicas:
            replica.book.reported(str(pod), EngineReport(figures.running, figures.waiting, figures.usage, now))


class Dynamo(_Precise):
    """Dynamo's KV router, as its defaults are: ``prefill + decode`` in blocks, the least wins, ties at random.

    ``prefill`` is the worker's active prefill blocks plus the request's, less what the worker holds; ``decode`` the
    worker's active blocks plus the request's. Loads are counted by the router and exchanged among replicas.
    """

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs)
        count = knobs.replicas
        self._prefill = [[0.0] * knobs.pods for _ in range(count)]
        self._active: list[list[Counter[int]]] = [[Counter() for _ in range(knobs.pods)] for _ in range(count)]
        self._output = [[0.0] * knobs.pods for _ in range(count)]
        self._known: list[dict[int, tuple[int, float]]] = [{} for _ in range(count)]
        self._told: deque[tuple[float, int, Request, int, float]] = deque()

    def _tell(self, now: float) -> None:
        while self._told and self._told[0][0] <= now:
            _, by, request, pod, uncached = self._told.popleft()
            for replica in range(self.knobs.replicas):
                if replica != by:
                    self._add(replica, request, pod, uncached)

    def _add(self, replica: int, request: Request, pod: int, uncached: float) -> None:
        self._prefill[replica][pod] += uncached
        self._active[replica][pod].update(request.blocks)
        self._output[replica][pod] += request.output_tokens
        self._known[replica][request.number] = (pod, uncached)

    def choose(self, request: Request, now: float) -> int:
        """Return the pod of least cost."""
        self._tell(now)
        by = self.random.randrange(self.knobs.replicas)
        size = self.knobs.engine.block_tokens
        costs = []
        for pod in range(self.knobs.pods):
            held = self.held_tokens(request, pod)
            prefill = max(0.0, self._prefill[by][pod] + request.tokens - held)
            costs.append(prefill + len(self._active[by][pod]) * size + request.tokens)
        least = min(costs)
        pod = self.random.choice([number for number, cost in enumerate(costs) if cost == least])
        uncached = float(request.tokens - self.held_tokens(request, pod))
        self._add(by, request, pod, uncached)
        if self.knobs.replicas > 1:
            self._told.append((now + _SYNC_SECONDS, by, request, pod, uncached))
        return pod

    def first_token(self, request: Request, pod: int, now: float) -> None:
        """Prefill load counts fully until the first token."""
        self._tell(now)
        for replica in range(self.knobs.replicas):
            if (known := self._known[replica].get(request.number)) is not None:
                self._prefill[replica][pod] -= known[1]
                self._known[replica][request.number] = (pod, 0.0)

    def ended(self, request: Request, pod: int, now: float) -> None:
        """A request's blocks are active until its end."""
        del now
        for replica in range(self.knobs.replicas):
            if self._known[replica].pop(request.number, None) is None:
                continue
            active = self._active[replica][pod]
            for block in request.blocks:
                active[block] -= 1
                if active[block] <= 0:
                    del active[block]


class LlmD(_Precise):
    """llm-d's default profile: queue 2, KV cache usage 2, prefix 3; the highest wins, ties at random."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs)
        self._metrics = [Scraped(0, 0, 0.0)] * knobs.pods

    def scraped(self, pod: int, figures: Scraped, now: float) -> None:
        """Keep a pod's metrics."""
        del now
        self._metrics[pod] = figures

    def prefix(self, request: Request, pod: int, replica: int) -> float:
        """Return the share of the prompt's blocks that a pod holds."""
        del replica
        return self.held_blocks(request, pod) / max(len(request.blocks), 1)

    def choose(self, request: Request, now: float) -> int:
        """Return the pod of the highest score."""
        del now
        replica = self.random.randrange(self.knobs.replicas)
        waiting = [figures.waiting for figures in self._metrics]
        most, least = max(waiting), min(waiting)
        totals = []
        for pod, figures in enumerate(self._metrics):
            queue = (most - figures.waiting) / (most - least) if most > least else 1.0
            totals.append(2 * queue + 2 * (1 - figures.usage) + 3 * self.prefix(request, pod, replica))
        best = max(totals)
        pod = self.random.choice([number for number, total in enumerate(totals) if math.isclose(total, best)])
        self.decided(request, pod, replica)
        return pod

    def decided(self, request: Request, pod: int, replica: int) -> None:
        """Nothing is kept of a decision."""


class Approximate(LlmD):
    """The same scorers over caches that each replica predicts from its own decisions."""

    def __init__(self, knobs: Knobs) -> None:
        super().__init__(knobs)
        capacity = knobs.engine.capacity_blocks
        self._predicted = [[PrefixCache(capacity) for _ in range(knobs.pods)] for _ in range(knobs.replicas)]

    def prefix(self, request: Request, pod: int, replica: int) -> float:
        """Return the share of the prompt's blocks that the pod is predicted to hold."""
        return self._predicted[replica][pod].match(request.blocks) / max(len(request.blocks), 1)

    def decided(self, request: Request, pod: int, replica: int) -> None:
        """Predict that the pod now holds the prompt."""
        self._predicted[replica][pod].insert(request.blocks)


_Router = Kvatlas | Dynamo | LlmD | CacheOnly | RandomPod | RoundRobinPod
ROUTERS: Final[OrderedDict[str, Callable[[Knobs], _Router]]] = OrderedDict(
    (
        ("kvatlas", Kvatlas),
        ("cache-only", CacheOnly),
        ("load-only", lambda knobs: Kvatlas(knobs, cache=False)),
        ("random", RandomPod),
        ("round-robin", RoundRobinPod),
        ("approximate", Approximate),
        ("dynamo", Dynamo),
        ("llm-d", LlmD),
    )
)


def split(name: str) -> tuple[str, int]:
    """Return kind and replicas of ``KIND`` or ``KIND:N``.

    Raises:
        SettingsError: the kind is unknown, or N is no number from 1 on.
    """
    kind, _, count = name.partition(":")
    if kind not in ROUTERS:
        raise SettingsError(f"unknown policy {kind!r}; the queueing model knows {', '.join(ROUTERS)}, as KIND:N")
    return kind, replicas_of(name, count, "replicas")


def router(name: str, knobs: Knobs) -> _Router:
    """Build a policy by name.

    Raises:
        SettingsError: there is none of that name.
    """
    return ROUTERS[split(name)[0]](knobs)
