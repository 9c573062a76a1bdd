"""The gRPC surface of llm-d (``indexer.v1`` and ``tokenization``) over our core: its routers work unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.runtime.methods import add_service
from kvatlas.bridge.runtime.rpc import pushback
from kvatlas.scorer.api.bounds import check_names
from kvatlas.scorer.api.calls import Calls
from kvatlas.scorer.api.grpc_server import within
from kvatlas.scorer.api.names import ranks_of
from kvatlas.scorer.api.security import Caller, Guard
from kvatlas.scorer.api.status import code_of
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.service import TokenizationServicer
from kvatlas.scorer.v1 import indexer_pb2, tokenization_pb2
from kvatlas.scorer.v1 import scorer_pb2 as pb

if TYPE_CHECKING:
    from kvatlas.scorer.api.tracing import Tracing

INDEXER: Final = "indexer.v1.IndexerService"
TOKENIZATION: Final = "tokenization.TokenizationService"
#: Trailing metadata of GetPodScores: some partition did not answer, or a standby did.
PARTIAL: Final = "kvatlas-partial"
STANDBY: Final = "kvatlas-standby"


class IndexerServicer:
    """``GetPodScores`` as a ``Score`` of a prompt."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def GetPodScores(  # noqa: N802 - gRPC's name
        self, request: indexer_pb2.GetPodScoresRequest, context: Any
    ) -> indexer_pb2.GetPodScoresResponse:
        """Score a prompt; pods without a match are absent, as there.

        Its clients know pods by the names in topics, without ranks: the best rank answers under the caller's name.
        """
        calls = self._calls
        core = calls.core

        async def work(caller: Caller) -> tuple[pb.ScoreResponse, dict[str, str]]:
            until = within(context, calls.settings)
            async with core.admission.turn(until):
                return await scored_of(caller, until)

        async def scored_of(caller: Caller, until: float) -> tuple[pb.ScoreResponse, dict[str, str]]:
            check_names(request.pod_identifiers, len(request.pod_identifiers), "pod_identifiers")
            wanted = pb.ScoreRequest(model=request.model_name, prompt=request.prompt)
            opened = (await core.intake.open_request(wanted))[0].request
            known = [record.pod for record in core.pods.serving(opened.model)]
            names = ranks_of(request.pod_identifiers, known)
            opened.pods.extend(names if request.pod_identifiers else ())
            calls.check(caller, opened)
            return await core.score(opened, until), names

        try:
            scored, names = await calls.guarded("GetPodScores", "score", context.invocation_metadata(), work)
        except KvatlasError as error:
            await context.abort(code_of(error), str(error), pushback(error))
            raise
        # Its answer has no place for this, and a score that is too low must not look like any other.
        flags = {PARTIAL: scored.freshness.partial, STANDBY: scored.freshness.standby}
        context.set_trailing_metadata(tuple((name, "true") for name, on in flags.items() if on))
        best: dict[str, float] = {}
        for pod, entry in scored.scores.items():
            name = names.get(pod, pod)
            best[name] = max(best.get(name, 0.0), entry.score)
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))
        return indexer_pb2.GetPodScoresResponse(
            scores=[indexer_pb2.PodScore(pod=pod, score=score) for pod, score in ranked]
        )


class GuardTokenization(grpc.aio.ServerInterceptor):  # type: ignore[misc,unused-ignore]
    """Asks for the role ``score`` on the tokenization service, whose implementation knows no callers."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Let a call through, or answer it with the reason."""
        if details.method.startswith(f"/{TOKENIZATION}/"):
            try:
                self._guard.admit(details.invocation_metadata, "score")
            except KvatlasError as error:
                refused = error

                async def refuse(_request: Any, context: Any) -> None:
                    await context.abort(code_of(refused), str(refused))

                return grpc.unary_unary_rpc_method_handler(refuse)
        return await continuation(details)


def add_to(server: Any, calls: Calls, pool: TokenizerPool, *, tracing: Tracing | None = None) -> list[str]:
    """Add both services to a server; returns their names."""
    core = calls.core
    indexer: Any = IndexerServicer(calls)
    if tracing is not None:
        indexer.GetPodScores = tracing.grpc(INDEXER, "GetPodScores", indexer.GetPodScores)
    add_service(server, indexer_pb2, indexer)
    add_service(server, tokenization_pb2, TokenizationServicer(pool, core.admission.turn, core.intake.named_model))
    return [INDEXER, TOKENIZATION]
