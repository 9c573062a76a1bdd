"""``kvatlas.v1.Scorer`` over gRPC: each operation, with our errors as status codes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc

from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer import answers, errors, inputs, pick
from kvatlas.scorer.decisions import Decisions
from kvatlas.scorer.engine import Engine, Prompt, Scored
from kvatlas.scorer.tokenization.errors import BackendError
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.scorer.v1 import scorer_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

_CODES: Final[tuple[tuple[type[BaseException], grpc.StatusCode], ...]] = (
    (errors.TooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (errors.UnknownPodError, grpc.StatusCode.NOT_FOUND),
    (errors.UnknownRequestError, grpc.StatusCode.NOT_FOUND),
    (errors.AuthError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.NotReadyError, grpc.StatusCode.UNAVAILABLE),
    (BackendError, grpc.StatusCode.UNAVAILABLE),
    (KvatlasError, grpc.StatusCode.FAILED_PRECONDITION),
)
_ANSWER_MARGIN_SECONDS: Final = 0.01
T = TypeVar("T")


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the status code that stands for an error of ours."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


class ScorerApi(pb_grpc.ScorerServicer):
    """The operations over an :class:`Engine`.

    Args:
        engine: scores prompts.
        pool: makes tokens.
        decisions: remembers prompts by request id and tells all scorers where requests went.
        partition_count: partitions of ``kv-blocks`` as known now, 0 before.
        clock_ns: wall clock in ns.
    """

    def __init__(
        self,
        engine: Engine,
        pool: TokenizerPool,
        decisions: Decisions,
        partition_count: Callable[[], int],
        clock_ns: Callable[[], int],
    ) -> None:
        self._engine = engine
        self._decisions = decisions
        self._pool = pool
        self._partition_count = partition_count
        self._clock_ns = clock_ns
        self._running = 0
        self._watchers = 0

    async def _guarded(self, context: Any, work: Callable[[float | None], Awaitable[T]]) -> T:
        """Run one operation: bounded in number, within the caller's deadline, our errors as its status."""
        if self._running >= self._engine.settings.max_concurrent:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "at the limit of concurrent requests; try again")
        self._running += 1
        try:
            left = context.time_remaining()
            deadline = None if left is None else time.monotonic() + max(left - _ANSWER_MARGIN_SECONDS, 0.0)
            return await work(deadline)
        except KvatlasError as error:
            await context.abort(code_of(error), str(error))
            raise AssertionError("abort raises") from error
        finally:
            self._running -= 1

    async def _scored(
        self, request: pb.ScoreRequest, deadline: float | None, *, every_block: bool = False
    ) -> tuple[Prompt, Scored, pb.ScoreResponse]:
        given = await inputs.read(request, self._pool, self._engine.settings)
        scored = await self._engine.score(given.prompt, deadline, every_block=every_block)
        if request.request_id:
            self._decisions.remember(request.request_id, given.prompt, scored)
        answer = answers.response(
            self._engine,
            given.prompt,
            scored,
            self._clock_ns(),
            tokenize_ms=given.tokenize_ms,
            tokenizer=given.tokenizer,
        )
        return given.prompt, scored, answer

    async def _score(self, request: pb.ScoreRequest, deadline: float | None) -> pb.ScoreResponse:
        return (await self._scored(request, deadline))[2]

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:  # noqa: N802
        """Score one prompt."""
        return await self._guarded(context, lambda deadline: self._score(request, deadline))

    async def ScoreBatch(self, request: pb.ScoreBatchRequest, context: Any) -> pb.ScoreBatchResponse:  # noqa: N802
        """Score many prompts; one that fails says so in its own answer."""

        async def one(each: pb.ScoreRequest, deadline: float | None) -> pb.ScoreResponse:
            try:
                return await self._score(each, deadline)
            except KvatlasError as error:
                return pb.ScoreResponse(error=f"{code_of(error).name}: {error}")

        async def work(deadline: float | None) -> pb.ScoreBatchResponse:
            limit = self._engine.settings.max_batch
            if len(request.requests) > limit:
                raise errors.TooLargeError(f"{len(request.requests)} requests are over max_batch, {limit}")
            found = await asyncio.gather(*(one(each, deadline) for each in request.requests))
            return pb.ScoreBatchResponse(responses=found)

        return await self._guarded(context, work)

    async def Explain(self, request: pb.ScoreRequest, context: Any) -> pb.ExplainResponse:  # noqa: N802
        """Say block by block who holds it, and why each walk ended."""

        async def work(deadline: float | None) -> pb.ExplainResponse:
            prompt, scored, answer = await self._scored(request, deadline, every_block=True)
            return answers.explained(self._engine, prompt, scored, answer, self._partition_count())

        return await self._guarded(context, work)

    async def Pick(self, request: pb.PickRequest, context: Any) -> pb.PickResponse:  # noqa: N802
        """Choose a pod: cache score combined with load."""

        async def work(deadline: float | None) -> pb.PickResponse:
            prompt, scored, answer = await self._scored(request.request, deadline)
            pods = [
                record
                for record in self._engine.pods.listed(prompt.model)
                if not prompt.pods or record.pod in prompt.pods
            ]
            if not pods:
                raise errors.UnknownPodError(f"no live pod serves model {prompt.model!r} and passes the filter")
            found = pick.choose(request, answer, pods, self._engine.settings)
            if request.report:
                await self._decisions.report(request.request.request_id, found.pod, prompt, scored, policy="pick")
            return found

        return await self._guarded(context, work)

    async def ReportDecision(  # noqa: N802
        self, request: pb.ReportDecisionRequest, context: Any
    ) -> pb.ReportDecisionResponse:
        """Tell all scorers that a request went to a pod."""

        async def work(deadline: float | None) -> pb.ReportDecisionResponse:
            if not request.request_id:
                raise errors.InputError("request_id is empty: outcomes are joined by it")
            known = self._decisions.recall(request.request_id)
            if known is None:
                if not request.HasField("request"):
                    raise errors.UnknownRequestError(
                        f"request {request.request_id!r} was not scored here lately; give the prompt in `request`"
                    )
                known = (await self._scored(request.request, deadline))[:2]
            record = await self._decisions.report(
                request.request_id, request.pod, *known, ttl_ms=request.ttl_ms, policy=request.policy
            )
            return pb.ReportDecisionResponse(blocks=len(record.keys) // 16, expires_ns=record.expires_ns)

        return await self._guarded(context, work)

    async def ListPods(self, request: pb.ListPodsRequest, context: Any) -> pb.ListPodsResponse:  # noqa: N802
        """List the pods as this scorer knows them."""
        del context
        listed = self._engine.pods.listed(request.model, gone=request.all)
        now = self._clock_ns()
        return pb.ListPodsResponse(pods=[answers.pod_info(record, now) for record in listed])

    async def WatchPods(self, request: pb.ListPodsRequest, context: Any) -> AsyncIterator[pb.PodInfo]:  # noqa: N802
        """Stream all pods, then each change."""
        if self._watchers >= self._engine.settings.max_watchers:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "at the limit of watchers (max_watchers)")
        self._watchers += 1
        table = self._engine.pods
        try:
            async with table.watch() as changes:
                for record in table.listed(request.model, gone=request.all):
                    yield answers.pod_info(record, self._clock_ns())
                while (name := await changes.get()) is not None:
                    changed = table.merged.get(name)
                    if changed is not None and (not request.model or changed.model in ("", request.model)):
                        yield answers.pod_info(changed, self._clock_ns())
        finally:
            self._watchers -= 1
