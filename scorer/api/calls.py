"""What every front does around an operation, once: admission, intake, tenants, limits, status codes, metrics.

The order is the same for gRPC, HTTP and llm-d's services: who asks and whether it may; the bytes, whose reading holds
no place among the requests worked on; the request with its names; whether the caller may ask about that salt; the
tokens; the operation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import grpc

from kvatlas.bridge.errors import KvatlasError, OverloadedError
from kvatlas.bridge.runtime.logs import whereabouts
from kvatlas.scorer.api import metrics
from kvatlas.scorer.api.bounds import check_batch, check_request
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.api.intake import Opened, Ready
from kvatlas.scorer.api.security import Caller, Guard
from kvatlas.scorer.api.status import ROLE_OF, code_of
from kvatlas.scorer.errors import InputError, NotReadyError, ScorerError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization import requests
from kvatlas.scorer.tokenization.records import Encoded
from kvatlas.scorer.v1 import scorer_pb2 as pb

log = logging.getLogger(__name__)

#: RPC -> the message that it takes.
MESSAGE_OF: Final = {
    "Score": "ScoreRequest",
    "ScoreBatch": "ScoreBatchRequest",
    "Pick": "PickRequest",
    "Explain": "ScoreRequest",
    "ReportDecision": "ReportDecisionRequest",
    "Tokenize": "ScoreRequest",
    "ListPods": "ListPodsRequest",
}


class UnforeseenError(ScorerError):
    """An operation failed in a way that nobody foresaw; the log has what it was."""


class Calls:
    """The operations of :class:`~kvatlas.scorer.api.core.Core` as fronts offer them."""

    def __init__(
        self,
        core: Core,
        settings: ScorerSettings,
        guard: Guard,
        named: Callable[[str], object] = lambda _model: None,
    ) -> None:
        """Take what every call needs; ``named`` is told the model of each request, for traces."""
        self.core = core
        self.settings = settings
        self.guard = guard
        self._named = named
        self._work: dict[str, Callable[[Any, Caller, float], Awaitable[Any]]] = {
            "Score": self._score,
            "ScoreBatch": self._score_batch,
            "Pick": self._pick,
            "Explain": self._explain,
            "ReportDecision": self._report,
            "Tokenize": self._tokenize,
            "ListPods": self._list,
        }

    def refusal(self, name: str) -> OverloadedError | None:
        """Return why an operation would be refused now whatever it says, and count that; None when it would not."""
        error = self.core.admission.refusal()
        if error is not None:
            self.refused(name)
        return error

    @staticmethod
    def refused(name: str) -> None:
        """Count an operation that is refused unread; what comes before a slash in its name does not count."""
        metrics.REQUESTS.labels(name.rpartition("/")[2], grpc.StatusCode.RESOURCE_EXHAUSTED.name).inc()

    async def call(
        self, name: str, metadata: Any, data: Callable[[], Awaitable[bytes]], form: str, deadline: Callable[[], float]
    ) -> Any:
        """Run an RPC on the bytes of its message.

        Args:
            name: of the RPC.
            metadata: (name, value) pairs that tell the caller.
            data: gives the message's bytes.
            form: ``binary`` or ``json``.
            deadline: gives the end of the request's time, in monotonic seconds, once the bytes are there.

        Raises:
            KvatlasError: the answer is a refusal; see :func:`~kvatlas.scorer.api.status.code_of`.
        """

        async def work(caller: Caller) -> Any:
            given = await data()
            until = deadline()
            async with self.core.admission.turn(until):
                message = await self.core.intake.message(MESSAGE_OF[name], given, form)
                return await self._work[name](message, caller, until)

        return await self.guarded(name, ROLE_OF[name], metadata, work)

    async def body(
        self, name: str, metadata: Any, data: Callable[[], Awaitable[bytes]], path: str, deadline: Callable[[], float]
    ) -> list[Any]:
        """Run ``Score`` or ``Tokenize`` on a body of an engine's API; one answer for each of its prompts.

        Raises:
            KvatlasError: the answer is a refusal.
        """

        async def work(caller: Caller) -> list[Any]:
            given = await data()
            until = deadline()
            async with self.core.admission.turn(until):
                prompts: list[requests.EngineRequest] = await self.core.intake.prompts(path, given)
                opened = self.core.intake.open_prompts(prompts)
                self._check(caller, opened)
                one = self._scored if name == "Score" else self._tokenized
                return [await one(prompt, until) for prompt in opened]

        found: list[Any] = await self.guarded(name, ROLE_OF[name], metadata, work)
        return found

    async def guarded(self, name: str, role: str, metadata: Any, work: Callable[[Caller], Awaitable[Any]]) -> Any:
        """Admit a caller, do its work, and count how it ended.

        Raises:
            KvatlasError: the answer is a refusal.
        """
        began, code = time.perf_counter(), "UNKNOWN"
        try:
            answer = await work(self.guard.admit(metadata, role))
            code = "OK"
            return answer
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except KvatlasError as error:
            code = code_of(error).name
            raise
        except Exception as error:
            code = grpc.StatusCode.INTERNAL.name
            log.error("%s failed: %s", name, whereabouts(error))
            raise UnforeseenError(f"{name} failed; the scorer's log says why") from error
        finally:
            metrics.REQUESTS.labels(name, code).inc()
            metrics.SECONDS.labels(name).observe(time.perf_counter() - began)

    # --- operations ----------------------------------------------------------------------------------------------

    async def _one(self, request: pb.ScoreRequest, caller: Caller) -> Opened:
        opened = await self.core.intake.open_request(request)
        if len(opened) > 1:
            raise InputError(f"request_json: has {len(opened)} prompts; ask for each of them")
        self._check(caller, opened)
        return opened[0]

    def _check(self, caller: Caller, opened: Iterable[Opened]) -> None:
        for one in opened:
            self.check(caller, one.request)

    def check(self, caller: Caller, request: pb.ScoreRequest) -> None:
        """Check that a caller may ask about a request's salt.

        Raises:
            ForbiddenError: it may not.
        """
        caller.check(request)
        self._named(request.model)

    async def _score(self, request: pb.ScoreRequest, caller: Caller, deadline: float) -> pb.ScoreResponse:
        return await self._scored(await self._one(request, caller), deadline)

    async def _scored(self, opened: Opened, deadline: float) -> pb.ScoreResponse:
        ready = await self.core.intake.ready(opened, deadline)
        return _told(await self.core.score(ready.request, deadline), ready)

    async def _score_batch(
        self, request: pb.ScoreBatchRequest, caller: Caller, deadline: float
    ) -> pb.ScoreBatchResponse:
        check_batch(request)
        opened: list[Opened | KvatlasError] = []
        for one in request.requests:
            try:
                found = await self.core.intake.open_request(one)
                if len(found) > 1:
                    raise InputError(f"request_json: has {len(found)} prompts; ask for each of them")
                opened += found
            except KvatlasError as error:
                opened.append(error)
        # All of them first: a batch with somebody else's salt in it is refused as a whole.
        self._check(caller, (one for one in opened if isinstance(one, Opened)))
        answer = pb.ScoreBatchResponse()
        for prompt in opened:
            answer.responses.append(await self._scored_or_told(prompt, deadline))
        return answer

    async def _scored_or_told(self, prompt: Opened | KvatlasError, deadline: float) -> pb.ScoreResponse:
        try:
            if isinstance(prompt, KvatlasError):
                raise prompt
            return await self._scored(prompt, deadline)
        except NotReadyError:
            raise
        except KvatlasError as error:
            return pb.ScoreResponse(error=f"{code_of(error).name}: {error}")

    async def _pick(self, request: pb.PickRequest, caller: Caller, deadline: float) -> pb.PickResponse:
        check_request(request)
        ready = await self.core.intake.ready(await self._one(request.request, caller), deadline)
        wanted = pb.PickRequest()
        wanted.CopyFrom(request)
        wanted.request.CopyFrom(ready.request)
        answer = await self.core.pick(wanted, deadline)
        _told(answer.scored, ready)
        return answer

    async def _explain(self, request: pb.ScoreRequest, caller: Caller, deadline: float) -> pb.ExplainResponse:
        ready = await self.core.intake.ready(await self._one(request, caller), deadline)
        answer = await self.core.explain(ready.request, deadline)
        _told(answer.scored, ready)
        return answer

    async def _report(
        self, request: pb.ReportDecisionRequest, caller: Caller, deadline: float
    ) -> pb.ReportDecisionResponse:
        check_request(request)
        if request.HasField("request"):
            ready = await self.core.intake.ready(await self._one(request.request, caller), deadline)
            request.request.CopyFrom(ready.request)
        caller.check(request, self.core.salt_of)
        return await self.core.report(request, deadline)

    async def _tokenize(self, request: pb.ScoreRequest, caller: Caller, deadline: float) -> pb.TokenizeResponse:
        opened = await self.core.intake.open_request(request)
        self._check(caller, opened)
        return pb.TokenizeResponse(prompts=[await self._tokenized(one, deadline) for one in opened])

    async def _tokenized(self, opened: Opened, deadline: float) -> pb.Tokenized:
        ready = await self.core.intake.ready(opened, deadline)
        ids, backend = await self.core.tokens(ready.request, deadline)
        text = await self.core.intake.text_of(ready.request.model, ids)
        tokens = Encoded(ids)
        return pb.Tokenized(tokens=tokens.array(), count=len(tokens), text=text, tokenizer=ready.tokenizer or backend)

    async def _list(self, request: pb.ListPodsRequest, caller: Caller, deadline: float) -> pb.ListPodsResponse:  # noqa: ARG002
        return self.core.list_pods(self.listing(request))

    def listing(self, request: pb.ListPodsRequest) -> pb.ListPodsRequest:
        """Return a request for pods with the model's name as its engines have it.

        Raises:
            InputError: the name is too long.
        """
        check_request(request)
        if request.model:
            request.model = self.core.intake.named_model(request.model)
        return request


def _told(answer: pb.ScoreResponse, ready: Ready) -> pb.ScoreResponse:
    """Put into an answer who tokenized its prompt before the core saw it."""
    if ready.tokenizer:
        answer.tokenizer = ready.tokenizer
        answer.stages.tokenize_ms += ready.seconds * 1e3
    return answer
