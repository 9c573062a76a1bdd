"""Routing policies to compare. Each sees only what a router of its kind can see.

- ``precise``: scorers follow the pods' events. What a pod holds becomes visible ``delay_ms`` later, to every scorer at
  once, so their number changes nothing but who asks.
- ``approximate``: each router predicts the pods' caches from its own decisions and sees nobody else's.
- ``round-robin`` and ``random``: blind.
- ``shared``: one cache of the whole fleet's size, the bound that no routing can pass.
- ``recorded``: where requests really went.

Cache-aware policies send a request to the pod with the least work in front of its answer: blocks to compute plus
``load_weight`` times the blocks that wait there.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model.numbers import whole
from kvatlas.deploy.whatif.fleet import Arrival, Pod, PrefixCache

#: Of a policy's scorers or routers; each has what it knows of every pod.
REPLICAS_MAX: Final = 1_000


class Policy(Protocol):
    """Chooses a pod per request and learns what came of it."""

    def choose(self, arrival: Arrival, pods: Sequence[Pod]) -> int:
        """Return the number of the pod that gets the request."""

    def served(self, arrival: Arrival, pod: int, evicted: list[int]) -> None:
        """Learn that a pod served a request and evicted blocks for it."""


class Options:
    """Knobs shared by the policies.

    Args:
        load_weight: what a waiting block costs beside a block to compute.
        delay_ms: age of what a precise scorer knows.
        seed: for the random choices.
    """

    def __init__(self, load_weight: float = 0.3, delay_ms: float = 30.0, seed: int = 1) -> None:
        self.load_weight = load_weight
        self.delay_ms = delay_ms
        self.seed = seed


def cheapest(arrival: Arrival, pods: Sequence[Pod], views: Sequence[PrefixCache], load_weight: float) -> int:
    """Return the pod with the least work in front of the answer; the least used one among equals."""
    blocks = len(arrival.blocks)

    def cost(number: int) -> tuple[float, int]:
        pod = pods[number]
        wait = load_weight * pod.queued_blocks(arrival.time_ms)
        return (wait + blocks - views[number].match(arrival.blocks), pod.served_blocks)

    return min(range(len(pods)), key=cost)


class RoundRobin:
    """One pod after the other."""

    def __init__(self) -> None:
        self._next = -1

    def choose(self, arrival: Arrival, pods: Sequence[Pod]) -> int:
        """Return the next pod."""
        del arrival
        self._next = (self._next + 1) % len(pods)
        return self._next

    def served(self, arrival: Arrival, pod: int, evicted: list[int]) -> None:
        """Nothing to learn."""


class Random:
    """Any pod."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation wants the same choices each run

    def choose(self, arrival: Arrival, pods: Sequence[Pod]) -> int:
        """Return a random pod."""
        del arrival
        return self._random.randrange(len(pods))

    def served(self, arrival: Arrival, pod: int, evicted: list[int]) -> None:
        """Nothing to learn."""


class Recorded:
    """Where the requests really went.

    Raises:
        SettingsError: from :meth:`choose`, when a request has no recorded pod.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def choose(self, arrival: Arrival, pods: Sequence[Pod]) -> int:
        """Return the number that stands for the recorded pod."""
        if not arrival.pod:
            raise SettingsError("policy 'recorded' needs recorded decisions; a trace has none")
        number = self._numbers.setdefault(arrival.pod, len(self._numbers))
        if number >= len(pods):
            raise SettingsError(f"the record names {number + 1} pods or more; give --pods {number + 1} or higher")
        return number

    def served(self, arrival: Arrival, pod: int, evicted: list[int]) -> None:
        """Nothing to learn."""


class Precise:
    """Scorers that follow events: all see the same map, ``delay_ms`` old."""

    def __init__(self, pods: int, capacity_blocks: int, scorers: int, options: Options) -> None:
        self._views = [PrefixCache(capacity_blocks) for _ in range(pods)]
        self._options = options
        self._pending: deque[tuple[float, int, Arrival, list[int]]] = deque()
        self.asked = [0] * scorers

    def choose(self, arrival: Arrival, pods: Sequence[Pod]) -> int:
        """Apply the events that have arrived by now, then take the cheapest pod."""
        while self._pending and self._pending[0][0] <= arrival.time_ms:
            _, pod, served, evicted = self._pending.popleft()
            self._views[pod].insert(served.blocks)
            self._views[pod].drop(evicted)
        self.asked[sum(self.asked) % len(self.asked)] += 1
        return cheapest(arrival, pods, self._views, self._options.load_weight)

    def served(self, arrival: Arrival, pod: int, evicted: list[int]) -> None:
        """Queue the pod's events until they become visible."""
        self._pending.append((arrival.time_ms + self._options.delay_ms, pod, arrival, evicted))


class Approximate:
    """Routers that predict caches from their own decisions; a request reaches any one of them."""

    def __init__(self, pods: int, capacity_blocks: int, routers: int, options: Options) -> None:
        self._views = [[PrefixCache(capacity_blocks) for _ in range(pods)] for _ in range(routers)]
        self._options = options
        self._random = random.Random(options.seed)  # noqa: S311 - a simulation wants the same choices each run

    def choose(self, arrival: Arrival, pods: Sequence[Pod]) -> int:
        """Let one router decide, and remember its decision as if it were the pod's cache."""
        views = self._views[self._random.randrange(len(self._views))]
        chosen = cheapest(arrival, pods, views, self._options.load_weight)
        views[chosen].insert(arrival.blocks)
        return chosen

    def served(self, arrival: Arrival, pod: int, evicted: list[int]) -> None:
        """Nothing to learn: the pods publish no events."""


SHARED: Final = "shared"
_Make = Callable[[int, int, int, Options], Policy]
_POLICIES: Final[dict[str, _Make]] = {
    "precise": Precise,
    "approximate": Approximate,
    "round-robin": lambda _pods, _capacity, _count, _options: RoundRobin(),
    "random": lambda _pods, _capacity, _count, options: Random(options.seed),
    "recorded": lambda _pods, _capacity, _count, _options: Recorded(),
    SHARED: lambda _pods, _capacity, _count, _options: RoundRobin(),
}


def parse(name: str) -> tuple[str, int]:
    """Return kind and number of deciders of ``KIND`` or ``KIND:N``.

    Raises:
        SettingsError: the kind is unknown, or N is not a positive number.
    """
    kind, _, count = name.partition(":")
    if kind not in _POLICIES:
        raise SettingsError(f"unknown policy {kind!r}; known: {', '.join(sorted(_POLICIES))}, as KIND or KIND:N")
    return kind, replicas_of(name, count, "scorers or routers")


def replicas_of(name: str, count: str, what: str) -> int:
    """Return how many a policy's name asks for, one where it says nothing.

    Raises:
        SettingsError: it is no number from 1 on, or too many.
    """
    if not (number := whole(count or "1", REPLICAS_MAX)):
        raise SettingsError(f"policy {name!r}: {count!r} is not a number of {what}, 1 to {REPLICAS_MAX}")
    return number


def make(name: str, pods: int, capacity_blocks: int, options: Options) -> Policy:
    """Build a policy by name.

    Raises:
        SettingsError: see :func:`parse`.
    """
    kind, count = parse(name)
    return _POLICIES[kind](pods, capacity_blocks, count, options)
