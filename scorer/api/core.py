"""What a scorer does, whatever asks it: the operations on the messages of ``scorer.proto``, without transport."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import NamedTuple

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model.block_key import KEY_BYTES, partition_of
from kvatlas.bridge.model.records import GONE, DecisionRecord, PodRecord
from kvatlas.scorer.api import inputs, replies
from kvatlas.scorer.api.explain import block_infos, walk_ends
from kvatlas.scorer.api.gate import Gate
from kvatlas.scorer.api.intake import Intake
from kvatlas.scorer.api.outcomes import outcome_of
from kvatlas.scorer.api.status import code_of
from kvatlas.scorer.errors import InputError, NotReadyError, TooLargeError, UnknownRequestError
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.lookups.router import Lookups, Seen
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.decisions import Decisions
from kvatlas.scorer.scoring.pick import choose
from kvatlas.scorer.scoring.remembered import Prompts, Remembered, remember
from kvatlas.scorer.scoring.strategies import Weighing, full_score
from kvatlas.scorer.scoring.walk import Match, Walk
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.v1 import scorer_pb2 as pb

_GROWTH = 4


class Index(NamedTuple):
    """One index version as a core reads it; a request stays with the one that it began with.

    Attributes:
        pods: table that a follower feeds.
        lookups: where block keys are looked up.
        block_size: canonical block size in tokens, None while unknown.
        partition_count: partitions of ``kv-blocks``, 0 while unknown.
    """

    pods: PodTable
    lookups: Lookups
    block_size: Callable[[], int | None]
    partition_count: Callable[[], int] = lambda: 0

    def unready(self, *, require_workers: bool) -> str | None:
        """Return why no score can be given from it now, None when it can."""
        if self.block_size() is None:
            return "the canonical block size is not known yet: no worker has announced itself"
        return self.lookups.unready() if require_workers else None


class Scored(NamedTuple):
    """One scored prompt with what it was made of."""

    source: Index
    response: pb.ScoreResponse
    keys: list[bytes]
    values: list[bytes | None]
    matches: list[Match]


class Core:
    """Scores prompts against the pods and the index.

    Attributes:
        decisions: open decisions, which hold blocks speculatively.
        intake: reads what callers send.
        gate: holds what is worked on, over all fronts, to ``max_concurrent``.
        watchers: holds the open streams of pods, over all fronts, to ``max_watchers``.
    """

    def __init__(
        self,
        settings: ScorerSettings,
        pods: PodTable,
        lookups: Lookups,
        *,
        block_size: Callable[[], int | None],
        pool: TokenizerPool | None = None,
        decisions: Decisions | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        observe: Callable[[str, float], None] = lambda _stage, _seconds: None,
        partition_count: Callable[[], int] = lambda: 0,
        answered: Callable[[str, pb.ScoreResponse], None] = lambda _model, _response: None,
    ) -> None:
        """Put the parts together.

        Args:
            settings: weights, limits, deadlines.
            pods: table that a follower feeds.
            lookups: where block keys are looked up.
            block_size: canonical block size in tokens, None while unknown.
            pool: tokenizers; None takes token ids only.
            decisions: open decisions; None for none.
            clock_ns: wall clock in ns, for ages.
            observe: told of each stage's duration in seconds.
            partition_count: partitions of ``kv-blocks``, 0 while unknown; for Explain.
            answered: told of the model and the answer of every score, for metrics.
        """
        self.decisions = decisions or Decisions(settings)
        self._settings = settings
        self._index = Index(pods, lookups, block_size, partition_count)
        self._pool = pool
        self._clock_ns = clock_ns
        self._observe = observe
        self._answered = answered
        self.gate = Gate(settings.max_concurrent, "requests are worked on (max_concurrent)")
        self.watchers = Gate(settings.max_watchers, "streams are open (max_watchers)")
        self.intake = Intake(settings, pool, lambda: self._index.pods)
        self._weighing = Weighing(settings)
        self._prompts = Prompts(settings)

    def unready(self) -> str | None:
        """Return why no score can be given now, None when it can."""
        return self._index.unready(require_workers=self._settings.require_workers)

    @property
    def pods(self) -> PodTable:
        """The pods as ``kv-pods`` tells them."""
        return self._index.pods

    def use(self, index: Index) -> None:
        """Read another index version from the next request on; those under way end with theirs."""
        index.pods.adopt_watchers(self._index.pods)
        self._index = index

    async def score(self, request: pb.ScoreRequest, deadline: float | None = None) -> pb.ScoreResponse:
        """Score one prompt; ``deadline`` in monotonic seconds.

        Raises:
            ScorerError: the request cannot be scored; see :mod:`kvatlas.scorer.errors`.
        """
        return (await self.run(request, deadline)).response

    async def tokens(self, request: pb.ScoreRequest, deadline: float) -> tuple[bytes, str]:
        """Return a request's token ids, packed little-endian u32, and the backend that made them (or empty).

        Raises:
            ScorerError: the prompt cannot be tokenized.
        """
        tokens = await inputs.tokens_of(request, self._settings, self._pool, deadline)
        return tokens.packed, tokens.backend

    async def run(self, request: pb.ScoreRequest, deadline: float | None = None, *, all_blocks: bool = False) -> Scored:
        """Score one prompt and keep what was found; ``all_blocks`` looks past the end of the walk.

        Raises:
            ScorerError: the request cannot be scored.
        """
        clock = time.perf_counter
        began = clock()
        if deadline is None:
            deadline = time.monotonic() + self._settings.deadline_ms / 1e3
        index = self._index
        if (why := index.unready(require_workers=self._settings.require_workers)) is not None:
            raise NotReadyError(f"not ready: {why}")
        size = index.block_size() or 16
        index.pods.set_block_size(size)
        strategy, weights = self._weighing.of(request.model, request.strategy)
        tokens = await inputs.tokens_of(request, self._settings, self._pool, deadline)
        tokenized = clock()
        keys = inputs.keys_of(request, tokens.packed, size)
        hashed = clock()
        steps = Walk(
            index.pods.fleet.scene(request.model, weights),
            tokens.tokens,
            pods=request.pods,
            whole_prompt=not request.usable_only,
        )
        values, seen, looked = await self._walk(index.lookups, keys, steps, deadline, all_blocks=all_blocks)
        matches = steps.matches()
        response = pb.ScoreResponse(
            prompt_tokens=tokens.tokens, block_size_tokens=size, blocks=len(keys), tokenizer=tokens.backend
        )
        replies.fill_scores(response, matches, strategy, len(keys))
        response.freshness.partial = steps.partial
        replies.fill_freshness(response.freshness, matches, seen, index.pods.merged, self._clock_ns())
        done = clock()
        stages = response.stages
        stages.tokenize_ms = (tokenized - began) * 1e3
        stages.keys_ms = (hashed - tokenized) * 1e3
        stages.lookup_ms = looked * 1e3
        stages.score_ms = (done - hashed - looked) * 1e3
        observe = self._observe
        observe("tokenize", tokenized - began)
        observe("keys", hashed - tokenized)
        observe("lookup", looked)
        observe("score", done - hashed - looked)
        self._answered(request.model, response)
        if request.request_id:
            self._prompts.put(request, keys, response)
        return Scored(index, response, keys, values, matches)

    async def _walk(
        self, lookups: Lookups, keys: list[bytes], steps: Walk, deadline: float, *, all_blocks: bool
    ) -> tuple[list[bytes | None], dict[int, Seen], float]:
        """Look up and walk in rounds that grow, until no pod is walking; returns values, partitions, seconds."""
        settings = self._settings
        # A caller that can wait long waits for its tokenizer, not for a worker that is silent.
        deadline = min(deadline, time.monotonic() + settings.deadline_ms / 1e3)
        now_ns = self._clock_ns()
        values: list[bytes | None] = []
        seen: dict[int, Seen] = {}
        spent = 0.0
        chunk = min(settings.lookup_chunk_blocks, lookups.first_blocks or settings.lookup_chunk_blocks)
        walking = True
        while len(values) < len(keys) and (walking or all_blocks):
            part = keys[len(values) : len(values) + chunk]
            began = time.perf_counter()
            answers = await lookups.lookup(part, deadline)
            spent += time.perf_counter() - began
            _merge(seen, answers.partitions)
            found = self.decisions.overlay(part, answers.values, now_ns)
            values.extend(found)
            walking = walking and steps.feed(found)
            chunk = min(chunk * _GROWTH, settings.lookup_chunk_max_blocks)
        return values, seen, spent

    def salt_of(self, request_id: str) -> str | None:
        """Return the cache salt of the prompt that is remembered under a request id, None without one."""
        known = self._prompts.get(request_id)
        return None if known is None else known.cache_salt

    async def score_batch(self, request: pb.ScoreBatchRequest, deadline: float | None = None) -> pb.ScoreBatchResponse:
        """Score many prompts; one that cannot be scored carries its error and does not stop the others.

        Raises:
            TooLargeError: more requests than a batch may have.
        """
        if len(request.requests) > self._settings.max_batch:
            raise TooLargeError(f"{len(request.requests)} requests; at most {self._settings.max_batch} (max_batch)")
        answer = pb.ScoreBatchResponse()
        for one in request.requests:
            try:
                answer.responses.append(await self.score(one, deadline))
            except NotReadyError:
                raise
            except KvatlasError as error:
                answer.responses.add(error=f"{code_of(error).name}: {error}")
        return answer

    async def pick(self, request: pb.PickRequest, deadline: float | None = None) -> pb.PickResponse:
        """Choose a pod: cached share of the prompt combined with load.

        Raises:
            ScorerError: the prompt cannot be scored, or a weight makes no sense.
            NotReadyError: no pod serves this model.
        """
        wanted = request.request
        scored = await self.run(wanted, deadline)
        allowed = set(wanted.pods)
        pods = [r for r in self.pods.listed(wanted.model) if not allowed or r.pod in allowed]
        strategy, weights = self._weighing.of(wanted.model, wanted.strategy)
        full = full_score(strategy, weights, scored.matches, len(scored.keys), scored.response.block_size_tokens)
        response = choose(request, scored.response, pods, self._settings, full=full)
        if request.report and response.pod:
            prompt = remember(wanted, scored.keys, scored.response)
            self._decide(wanted.request_id, response.pod, prompt, policy="pick", ttl_ms=0)
        return response

    async def explain(self, request: pb.ScoreRequest, deadline: float | None = None) -> pb.ExplainResponse:
        """Say block by block who holds the prompt, and why each pod's walk ended.

        Raises:
            ScorerError: the prompt cannot be scored.
        """
        scored = await self.run(request, deadline, all_blocks=True)
        fleet = scored.source.pods.fleet
        count = scored.source.partition_count()
        response = pb.ExplainResponse(
            blocks=block_infos(scored.keys, scored.values, fleet, lambda key: partition_of(key, count) if count else 0),
            scored=scored.response,
        )
        _, weights = self._weighing.of(request.model, request.strategy)
        scene = fleet.scene(request.model, weights)
        for pod, (blocks, reason) in walk_ends(scored, scene, request, response).items():
            response.walks[pod].matched_blocks = blocks
            response.walks[pod].reason = reason
        return response

    async def report(
        self, request: pb.ReportDecisionRequest, deadline: float | None = None
    ) -> pb.ReportDecisionResponse:
        """Note that a request went to a pod, for all scorers.

        Raises:
            InputError: request id or pod is missing.
            UnknownRequestError: the prompt was not given and no Score or Pick of this id is remembered.
            UnknownPodError: no pod of this id is known.
        """
        if not request.request_id or not request.pod:
            raise InputError("request_id and pod: both are needed")
        prompt = self._prompts.get(request.request_id)
        if request.HasField("request"):
            scored = await self.run(request.request, deadline)
            prompt = remember(request.request, scored.keys, scored.response)
        if prompt is None:
            raise UnknownRequestError(
                f"request_id {request.request_id!r} was not scored here lately; send the prompt in `request`"
            )
        return self._decide(request.request_id, request.pod, prompt, policy=request.policy, ttl_ms=request.ttl_ms)

    def _decide(
        self, request_id: str, pod: str, prompt: Remembered, *, policy: str, ttl_ms: int
    ) -> pb.ReportDecisionResponse:
        record = self.decisions.decide(
            request_id,
            self.pods.merged.get(pod),
            pod=pod,
            prompt=prompt,
            policy=policy,
            ttl_ms=ttl_ms,
            now_ns=self._clock_ns(),
        )
        return pb.ReportDecisionResponse(blocks=len(record.keys) // KEY_BYTES, expires_ns=record.expires_ns)

    async def judge(self, record: DecisionRecord) -> DecisionRecord:
        """Compare a decision with what the index shows now; returns its outcome record."""
        _, weights = self._weighing.of(record.model)
        return await outcome_of(record, self._index, weights, self._settings, self._clock_ns())

    def list_pods(self, request: pb.ListPodsRequest) -> pb.ListPodsResponse:
        """List the pods."""
        return pb.ListPodsResponse(
            pods=[self.pod_info(record) for record in self.pods.listed(request.model, gone=request.all)]
        )

    async def watch_pods(self, request: pb.ListPodsRequest) -> AsyncGenerator[pb.PodInfo, None]:
        """Yield all pods, then each change; enter :attr:`watchers` around it."""
        async with self.pods.watch() as changes:
            for info in self.list_pods(request).pods:
                yield info
            while True:
                record = self.pods.merged.get(await changes.get())
                if record is None or (request.model and record.model not in ("", request.model)):
                    continue
                if request.all or record.state != GONE:
                    yield self.pod_info(record)

    def pod_info(self, record: PodRecord) -> pb.PodInfo:
        """Return a pod as the API shows it."""
        return replies.pod_info(record, self._clock_ns())


def _merge(seen: dict[int, Seen], more: Mapping[int, Seen]) -> None:
    for number, state in more.items():
        before = seen.get(number)
        if before is None or before.role == "active":
            seen[number] = state
