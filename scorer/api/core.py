"""What a scorer does, whatever asks it: the operations on the messages of ``scorer.proto``, without transport."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.records import GONE, DecisionRecord, PodRecord
from kvatlas.bridge.runtime.admission import Admission
from kvatlas.scorer.api import inputs
from kvatlas.scorer.api.bounds import check_batch
from kvatlas.scorer.api.intake import Intake
from kvatlas.scorer.api.replies import explained_reply, pick_query, pick_reply, pod_info, reply_of
from kvatlas.scorer.api.status import code_of
from kvatlas.scorer.errors import InputError, NotReadyError, UnknownRequestError
from kvatlas.scorer.lookups.index import Index
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.answers import Scored
from kvatlas.scorer.scoring.decisions import Decisions
from kvatlas.scorer.scoring.lookup import IndexView
from kvatlas.scorer.scoring.outcomes import outcome_of
from kvatlas.scorer.scoring.pick import choose
from kvatlas.scorer.scoring.query import ScoreQuery
from kvatlas.scorer.scoring.remembered import Prompts, Remembered, remember
from kvatlas.scorer.scoring.scorer import Chunks, Scorer, ScoringRun
from kvatlas.scorer.scoring.strategies import Weighing, full_score
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.v1 import scorer_pb2 as pb

#: Open streams of pods at most: each has a queue, and there are as many as scorers and dashboards watch.
MAX_WATCHERS: Final = 64
#: A first round is one packed lookup that most prompts fit in; later ones stay below what a worker takes at once.
_CHUNKS: Final = Chunks(1_024, 16_384)
#: Blocks that are explained without a thread: a few milliseconds of the event loop.
_EXPLAINED_AT_ONCE: Final = 512


class Core:
    """Scores prompts against the pods and the index.

    Attributes:
        decisions: open decisions, which hold blocks speculatively.
        intake: reads what callers send.
        admission: holds what is worked on, over all fronts, to ``max_concurrent`` and to what can be done in time.
        watchers: holds the open streams of pods, over all fronts, to :data:`MAX_WATCHERS`.
    """

    def __init__(
        self,
        settings: ScorerSettings,
        index: Index,
        *,
        pool: TokenizerPool | None = None,
        decisions: Decisions | None = None,
        chunks: Chunks = _CHUNKS,
        clock_ns: Callable[[], int] = time.time_ns,
        observe: Callable[[str, float], None] = lambda _stage, _seconds: None,
        answered: Callable[[str, Scored], None] = lambda _model, _scored: None,
    ) -> None:
        """Put the parts together.

        Args:
            settings: weights, limits, deadlines.
            index: the index version to begin with.
            pool: tokenizers; None takes token ids only.
            decisions: open decisions; None for none.
            chunks: how many blocks are asked for at a time.
            clock_ns: wall clock in ns, for ages.
            observe: told of each stage's duration in seconds.
            answered: told of the model and the answer of every score, for metrics.
        """
        self.decisions = decisions or Decisions(settings)
        self._settings = settings
        self._index = index
        self._pool = pool
        self._clock_ns = clock_ns
        self._answered = answered
        self.admission = Admission(settings.max_concurrent, "requests are worked on (max_concurrent)")
        self.watchers = Admission(MAX_WATCHERS, "streams are open")
        self.intake = Intake(settings, pool, lambda: self._index.pods)
        self._weighing = Weighing.from_settings(settings)
        self._chunks = chunks
        self._scorer = Scorer(
            self._view,
            self._weighing,
            chunks=self._chunks,
            overlay=self.decisions,
            clock_ns=clock_ns,
            timer=time.perf_counter,
            observe=observe,
        )
        self._prompts = Prompts()
        self._explaining = asyncio.Lock()

    def unready(self) -> str | None:
        """Return why no score can be given now, None when it can."""
        return self._index.unready()

    @property
    def stale(self) -> bool:
        """Whether nobody keeps the index up to date at present: what it has only ages."""
        return self._index.lookups.stale

    @property
    def pods(self) -> PodTable:
        """The pods as ``kv-pods`` tells them."""
        return self._index.pods

    def use(self, index: Index) -> None:
        """Read another index version from the next request on; those under way end with theirs."""
        index.pods.adopt_watchers(self._index.pods)
        self._index = index

    def _view(self) -> IndexView:
        if (why := self.unready()) is not None:
            raise NotReadyError(f"not ready: {why}")
        return self._index.view()

    def _lookup_deadline(self, deadline: float) -> float:
        # A caller that can wait long waits for its tokenizer, not for a worker that is silent.
        return min(deadline, time.monotonic() + self._settings.deadline_ms / 1e3)

    async def score(self, request: pb.ScoreRequest, deadline: float | None = None) -> pb.ScoreResponse:
        """Score one prompt; ``deadline`` in monotonic seconds.

        Raises:
            ScorerError: the request cannot be scored; see :mod:`kvatlas.scorer.errors`.
        """
        return reply_of((await self.run(request, deadline)).scored)

    async def tokens(self, request: pb.ScoreRequest, deadline: float) -> tuple[bytes, str]:
        """Return a request's token ids, packed little-endian u32, and the backend that made them (or empty).

        Raises:
            ScorerError: the prompt cannot be tokenized.
        """
        tokens = await inputs.tokens_of(request, self._settings, self._pool, deadline)
        return tokens.packed, tokens.tokenizer

    async def run(
        self, request: pb.ScoreRequest, deadline: float | None = None, *, all_blocks: bool = False
    ) -> ScoringRun:
        """Score one prompt and keep what was found; ``all_blocks`` looks past the end of the walk.

        Raises:
            ScorerError: the request cannot be scored.
        """
        began = time.perf_counter()
        if deadline is None:
            deadline = self._lookup_deadline(math.inf)
        # What no tokens can mend is refused before they are made.
        view = self._view()
        if request.strategy:
            self._weighing.of(request.model, request.strategy)
        prompt = await inputs.tokens_of(request, self._settings, self._pool, deadline)
        query = inputs.query_of(request, prompt, time.perf_counter() - began)
        # Tokenizing takes its time, in which pods come and go.
        run = await self.run_query(query, deadline, all_blocks=all_blocks, view=None if prompt.tokenizer else view)
        if request.request_id:
            self._prompts.put(request.request_id, query, run.keys, run.scored)
        return run

    async def run_query(
        self, query: ScoreQuery, deadline: float, *, all_blocks: bool = False, view: IndexView | None = None
    ) -> ScoringRun:
        """Score a query of a caller in this process; ``view`` is the index as it sees it, None for now.

        Raises:
            ScorerError: it cannot be scored.
        """
        inputs.check_length(query.prompt, self._settings)
        run = await self._scorer.run(query, self._lookup_deadline(deadline), all_blocks=all_blocks, view=view)
        self._answered(query.model, run.scored)
        return run

    def salt_of(self, request_id: str) -> str | None:
        """Return the cache salt of the prompt that is remembered under a request id, None without one."""
        known = self._prompts.get(request_id)
        return None if known is None else known.cache_salt

    async def score_batch(self, request: pb.ScoreBatchRequest, deadline: float | None = None) -> pb.ScoreBatchResponse:
        """Score many prompts; one that cannot be scored carries its error and does not stop the others.

        Raises:
            TooLargeError: more requests than a batch may have.
        """
        check_batch(request)
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
        run = await self.run(wanted, deadline)
        allowed = set(wanted.pods)
        pods = [r for r in self.pods.serving(wanted.model) if not allowed or r.pod in allowed]
        full = full_score(run.strategy, run.weights, run.matches, len(run.keys), run.scored.block_size_tokens)
        choice = choose(pick_query(request), run.scored, pods, full=full, now_ns=self._clock_ns())
        if request.report and choice.pod:
            prompt = remember(run.query, run.keys, run.scored)
            self._decide(wanted.request_id, choice.pod, prompt, policy="pick", ttl_ms=0)
        return pick_reply(choice, run.scored)

    async def explain(self, request: pb.ScoreRequest, deadline: float | None = None) -> pb.ExplainResponse:
        """Say block by block who holds the prompt, and why each pod's walk ended.

        Raises:
            ScorerError: the prompt cannot be scored.
        """
        run = await self.run(request, deadline, all_blocks=True)
        if len(run.keys) <= _EXPLAINED_AT_ONCE:
            return explained_reply(run.explained())
        async with self._explaining:  # one at a time: seconds of Python for a long prompt that many pods hold
            return await asyncio.to_thread(lambda: explained_reply(run.explained()))

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
            run = await self.run(request.request, deadline)
            prompt = remember(run.query, run.keys, run.scored)
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
        return await outcome_of(
            record,
            self._view(),
            weights,
            self._clock_ns(),
            chunks=self._chunks,
            deadline=self._lookup_deadline(math.inf),
        )

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
        return pod_info(record, self._clock_ns())
