"""A fleet with queues: when each request's first token comes. Discrete events; pure.

A pod computes prompts one after the other, in the order of arrival, and decodes what it has begun meanwhile:

- a prompt takes ``overhead + (tokens - cached tokens) / rate``; each request that decodes slows prompts by a share;
- what is cached is seen when the prompt's turn comes, so a request behind one with its prefix finds that;
- an answer takes ``output tokens * (step + step per request * requests decoding)``, as of its beginning;
- at most so many requests decode at once: the next prompt waits for a place.

Routers learn what routers of their kind learn, each fact after the time that it takes to reach them: events of the
pods' caches, the other replicas' decisions, first tokens and ends, and the engines' metrics as they are scraped.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from kvatlas.deploy.whatif.fleet import Arrival, PrefixCache

#: No prompt is free: the engine computes its last token again.
_LEAST_TOKENS: Final = 1
#: Between two looks at each pod's metrics.
_SCRAPE_SECONDS: Final = 0.05


class Request(NamedTuple):
    """One request.

    Attributes:
        number: its place in the trace.
        at: arrival in seconds.
        blocks: ids of the prompt's blocks, the last maybe not full.
        tokens: length of the prompt.
        output_tokens: length of the answer.
    """

    number: int
    at: float
    blocks: Sequence[int]
    tokens: int
    output_tokens: int


class Engine(NamedTuple):
    """What a pod can do.

    Attributes:
        tokens_per_second: prompt tokens computed alone.
        overhead_seconds: of each prompt.
        step_seconds, step_request_seconds: one decoding step, and what each request in it adds.
        prefill_share: share of the prompt rate that one decoding request takes; at most half goes.
        most_running: requests that decode at once.
        capacity_blocks: blocks of its cache.
        block_tokens: tokens in a block.
    """

    tokens_per_second: float = 8_000.0
    overhead_seconds: float = 0.005
    step_seconds: float = 0.02
    step_request_seconds: float = 0.0004
    prefill_share: float = 0.004
    most_running: int = 128
    capacity_blocks: int = 1_000
    block_tokens: int = 512


class Scraped(NamedTuple):
    """What a pod's metrics say."""

    running: int
    waiting: int
    usage: float


class Router(Protocol):
    """One routing policy with all its replicas."""

    def choose(self, request: Request, now: float) -> int:
        """Return the number of the pod that gets the request."""

    def stored(self, pod: int, blocks: Sequence[int], evicted: Sequence[int], now: float) -> None:
        """Learn that a pod's cache has changed."""

    def first_token(self, request: Request, pod: int, now: float) -> None:
        """Learn that a request's prompt was computed."""

    def ended(self, request: Request, pod: int, now: float) -> None:
        """Learn that a request is over."""

    def scraped(self, pod: int, figures: Scraped, now: float) -> None:
        """Learn a pod's metrics."""


class _Pod:
    """One pod."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = PrefixCache(engine.capacity_blocks)
        self.waiting: deque[Request] = deque()
        self.computing: Request | None = None
        self.decoding = 0
        self.decoding_tokens = 0.0

    def scrape(self) -> Scraped:
        engine = self.engine
        used = self.decoding_tokens / (engine.capacity_blocks * engine.block_tokens)
        running = self.decoding + (self.computing is not None)
        return Scraped(running, len(self.waiting), min(used, 1.0))


class Result(NamedTuple):
    """What came of all requests.

    Attributes:
        first_token: seconds to the first token, in the order of the requests.
        hit_tokens, prompt_tokens: found in caches, and in all.
        seconds: from the first arrival to the last end.
        requests: per pod.
    """

    first_token: list[float]
    hit_tokens: int
    prompt_tokens: int
    seconds: float
    requests: list[int]


class Simulation:
    """Runs requests through a router.

    Args:
        engine: each pod's figures.
        pods: how many.
        event_seconds: after which a change of a cache, a first token or an end is known to routers.
    """

    def __init__(self, engine: Engine, pods: int, *, event_seconds: float = 0.03) -> None:
        self._engine = engine
        self._pods = [_Pod(engine) for _ in range(pods)]
        self._delay = event_seconds
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def run(self, requests: Sequence[Request], router: Router) -> Result:
        """Run all requests to their end."""
        self._router = router
        self._first: list[float] = [0.0] * len(requests)
        self._hits = 0
        self._left = len(requests)
        self._sent = [0] * len(self._pods)
        for request in requests:
            self._at(request.at, self._arrive, request)
        self._at(requests[0].at, self._look)
        now = 0.0
        while self._events:
            now, _, act, arguments = heapq.heappop(self._events)
            act(now, *arguments)
        return Result(self._first, self._hits, sum(one.tokens for one in requests), now - requests[0].at, self._sent)

    def _at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), act, arguments))

    def _look(self, now: float) -> None:
        for number, pod in enumerate(self._pods):
            self._router.scraped(number, pod.scrape(), now)
        if self._left:
            self._at(now + _SCRAPE_SECONDS, self._look)

    def _arrive(self, now: float, request: Request) -> None:
        number = self._router.choose(request, now)
        self._sent[number] += 1
        pod = self._pods[number]
        pod.waiting.append(request)
        self._begin(now, number)

    def _begin(self, now: float, number: int) -> None:
        pod, engine = self._pods[number], self._engine
        if pod.computing is not None or not pod.waiting or pod.decoding >= engine.most_running:
            return
        request = pod.computing = pod.waiting.popleft()
        hit = min(pod.cache.match(request.blocks) * engine.block_tokens, request.tokens - _LEAST_TOKENS)
        self._hits += hit
        rate = engine.tokens_per_second * max(0.5, 1.0 - engine.prefill_share * pod.decoding)
        self._at(now + engine.overhead_seconds + (request.tokens - hit) / rate, self._computed, number)

    def _computed(self, now: float, number: int) -> None:
        pod, engine = self._pods[number], self._engine
        request = pod.computing
        assert request is not None
        pod.computing = None
        self._first[request.number] = now - request.at
        evicted = pod.cache.insert(request.blocks, request.output_tokens // engine.block_tokens)
        pod.decoding += 1
        pod.decoding_tokens += request.tokens + request.output_tokens
        step = engine.step_seconds + engine.step_request_seconds * pod.decoding
        self._at(now + request.output_tokens * step, self._end, number, request)
        router, known = self._router, now + self._delay
        self._at(known, lambda then: router.stored(number, request.blocks, evicted, then))
        self._at(known, lambda then: router.first_token(request, number, then))
        self._begin(now, number)

    def _end(self, now: float, number: int, request: Request) -> None:
        pod = self._pods[number]
        pod.decoding -= 1
        pod.decoding_tokens -= request.tokens + request.output_tokens
        self._left -= 1
        router = self._router
        self._at(now + self._delay, lambda then: router.ended(request, number, then))
        self._begin(now, number)


class FirstTokens(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy made of the requests, in the queueing model.

    Attributes:
        policy: its name as given.
        replicas: deciders.
        mean_ms, p50_ms, p90_ms, p99_ms: time to first token.
        hit_ratio: prompt tokens found in caches.
        requests_per_second: of the whole fleet.
        balance: requests of the busiest pod over the mean.
    """

    policy: str
    replicas: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    hit_ratio: float
    requests_per_second: float
    balance: float


def sum_up(policy: str, replicas: int, result: Result) -> FirstTokens:
    """Return a result's figures."""
    times = sorted(result.first_token)
    count = len(times)

    def share(part: float) -> float:
        return round(times[min(int(part * count), count - 1)] * 1e3, 1)

    return FirstTokens(
        policy=policy,
        replicas=replicas,
        mean_ms=round(sum(times) / count * 1e3, 1),
        p50_ms=share(0.5),
        p90_ms=share(0.9),
        p99_ms=share(0.99),
        hit_ratio=round(result.hit_tokens / max(result.prompt_tokens, 1), 4),
        requests_per_second=round(count / max(result.seconds, 1e-9), 3),
        balance=round(max(result.requests) * len(result.requests) / count, 2),
    )


def requests_of(arrivals: Sequence[Arrival], block_tokens: int) -> list[Request]:
    """Return a trace's arrivals as requests.

    Traces round their times: those of one moment are spread evenly up to the next moment, as they really came.
    """
    ordered = sorted(arrivals, key=lambda one: one.time_ms)
    found: list[Request] = []
    for moment, group in itertools.groupby(ordered, key=lambda one: one.time_ms):
        together = list(group)
        after = len(found) + len(together)
        until = ordered[after].time_ms if after < len(ordered) else moment
        for place, one in enumerate(together):
            at = (moment + (until - moment) * place / len(together)) / 1e3
            tokens = one.tokens or len(one.blocks) * block_tokens
            output = one.output_tokens or one.output_blocks * block_tokens
            found.append(Request(len(found), at, one.blocks, max(tokens, 1), output))
    return found


def shared_bound(requests: Sequence[Request], engine: Engine, pods: int) -> float:
    """Return the hit ratio of one cache of the whole fleet's size: what no routing can pass."""
    cache = PrefixCache(engine.capacity_blocks * pods)
    hit = total = 0
    for request in requests:
        hit += min(cache.match(request.blocks) * engine.block_tokens, request.tokens - _LEAST_TOKENS)
        total += request.tokens
        cache.insert(request.blocks, request.output_tokens // engine.block_tokens)
    return hit / total if total else 0.0


def at_load(requests: Sequence[Request], engine: Engine, pods: int, load: float) -> list[Request]:
    """Return the requests with their times stretched so that the fleet is busy to this share.

    Busy with what a fleet has to compute that finds as much in its caches as :func:`shared_bound`; the slowing of
    prompts by those that decode is counted.
    """
    tokens = sum(one.tokens for one in requests) * (1.0 - shared_bound(requests, engine, pods))
    work = tokens / engine.tokens_per_second + engine.overhead_seconds * len(requests)
    span = max(requests[-1].at - requests[0].at, 1e-9)
    decode = sum(one.output_tokens for one in requests) * engine.step_seconds / pods
    wanted = work / (pods * load)
    # Requests that decode at a time depend on the span, and slow prompts down: a few rounds settle it.
    for _ in range(20):
        slowed = max(0.5, 1.0 - engine.prefill_share * min(decode / wanted, engine.most_running))
        wanted = work / (pods * load * slowed)
    factor = wanted / span
    return [one._replace(at=(one.at - requests[0].at) * factor) for one in requests]
