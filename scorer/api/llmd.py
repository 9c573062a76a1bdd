"""The gRPC surface of llm-d (``indexer.v1`` and ``tokenization``) over our core: its routers work unchanged."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

from kvatlas.bridge.errors import KvatlasError
from kvatlas.scorer.api import metrics
from kvatlas.scorer.api.core import Core
from kvatlas.scorer.api.grpc_server import within
from kvatlas.scorer.api.security import Guard
from kvatlas.scorer.api.status import code_of
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.service import TokenizationServicer
from kvatlas.scorer.v1 import indexer_pb2, indexer_pb2_grpc, tokenization_pb2_grpc
from kvatlas.scorer.v1 import scorer_pb2 as pb

if TYPE_CHECKING:
    from kvatlas.scorer.api.tracing import Tracing

INDEXER: Final = "indexer.v1.IndexerService"
TOKENIZATION: Final = "tokenization.TokenizationService"
#: Trailing metadata of GetPodScores: some partition did not answer, or a standby did.
PARTIAL: Final = "kvatlas-partial"
STANDBY: Final = "kvatlas-standby"


class IndexerServicer(indexer_pb2_grpc.IndexerServiceServicer):
    """``GetPodScores`` as a ``Score`` of a prompt."""

    def __init__(self, core: Core, settings: ScorerSettings, guard: Guard) -> None:
        self._core = core
        self._settings = settings
        self._guard = guard

    async def GetPodScores(  # noqa: N802 - gRPC's name
        self, request: indexer_pb2.GetPodScoresRequest, context: Any
    ) -> indexer_pb2.GetPodScoresResponse:
        """Score a prompt; pods without a match are absent, as there."""
        wanted = pb.ScoreRequest(model=request.model_name, prompt=request.prompt, pods=request.pod_identifiers)
        began, code = time.perf_counter(), "UNKNOWN"
        try:
            self._guard.admit(context.invocation_metadata(), "score").check(wanted)
            with self._core.gate:
                scored = await self._core.score(wanted, within(context, self._settings))
            code = "OK"
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except KvatlasError as error:
            code = code_of(error).name
            await context.abort(code_of(error), str(error))
            raise
        finally:
            metrics.REQUESTS.labels("GetPodScores", code).inc()
            metrics.SECONDS.labels("GetPodScores").observe(time.perf_counter() - began)
        # Its answer has no place for this, and a score that is too low must not look like any other.
        flags = {PARTIAL: scored.freshness.partial, STANDBY: scored.freshness.standby}
        context.set_trailing_metadata(tuple((name, "true") for name, on in flags.items() if on))
        ranked = sorted(scored.scores.items(), key=lambda item: (-item[1].score, item[0]))
        return indexer_pb2.GetPodScoresResponse(
            scores=[indexer_pb2.PodScore(pod=pod, score=entry.score) for pod, entry in ranked]
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


def add_to(
    server: Any,
    core: Core,
    pool: TokenizerPool,
    settings: ScorerSettings,
    guard: Guard,
    *,
    tracing: Tracing | None = None,
) -> list[str]:
    """Add both services to a server; returns their names."""
    indexer: Any = IndexerServicer(core, settings, guard)
    if tracing is not None:
        indexer.GetPodScores = tracing.grpc(INDEXER, "GetPodScores", indexer.GetPodScores)
    indexer_pb2_grpc.add_IndexerServiceServicer_to_server(indexer, server)
    tokenization_pb2_grpc.add_TokenizationServiceServicer_to_server(TokenizationServicer(pool, core.gate), server)
    return [INDEXER, TOKENIZATION]
