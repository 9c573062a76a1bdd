"""OpenTelemetry traces of a scorer: a span for each request, and under it one for each stage of a score.

Opt-in (``[scorer] traces_endpoint``) and an extra of the package (``kvatlas[otel]``): where traces are off, this module
is not imported and a request passes no code of it.

The caller's trace is continued from a W3C ``traceparent`` in gRPC metadata or HTTP headers. Spans carry names, counts
and status codes; never text, token ids, salts or the wording of errors, which may quote any of them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import grpc
from aiohttp import web
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb

#: The last stage of a score: with it all four are known.
_LAST: Final = "score"
#: Seconds that an export, and so the end of a scorer, may wait for a collector that is away.
_EXPORT_SECONDS: Final = 3
_TRACE_HEADERS: Final = ("traceparent", "tracestate")
_NAMES: Final[Mapping[Any, str]] = {code.value[0]: code.name for code in grpc.StatusCode}

Call = Callable[[Any, Any], Awaitable[Any]]


class _Request:
    """A request under way: its span, and the stages of the score that it is at."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.stages: list[tuple[str, float]] = []


class Tracing:
    """Makes the spans of one scorer."""

    def __init__(self, settings: ScorerSettings, exporter: SpanExporter | None = None) -> None:
        """Start the thread that sends spans.

        Args:
            settings: of the scorer: where spans go, and which share of the requests makes any.
            exporter: takes the spans; None sends them to ``traces_endpoint`` over OTLP/gRPC.
        """
        self._propagator = TraceContextTextMapPropagator()
        self._current: ContextVar[_Request | None] = ContextVar("kvatlas-traced-request", default=None)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "kvatlas-scorer", "service.instance.id": settings.name}),
            # A caller that samples its trace gets our part of it, and only then.
            sampler=ParentBased(TraceIdRatioBased(settings.traces_sample_ratio)),
            shutdown_on_exit=False,
        )
        exporter = exporter or OTLPSpanExporter(endpoint=settings.traces_endpoint, timeout=_EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("kvatlas.scorer")

    @contextmanager
    def _request(self, name: str, headers: Iterable[tuple[str, Any]], attributes: Mapping[str, str]) -> Iterator[Span]:
        carrier = {key.lower(): str(value) for key, value in headers if key.lower() in _TRACE_HEADERS}
        span = self._tracer.start_span(
            name, self._propagator.extract(carrier), SpanKind.SERVER, attributes=dict(attributes)
        )
        token = self._current.set(_Request(span))
        try:
            yield span
        finally:
            self._current.reset(token)
            span.end()

    def named(self, model: str) -> None:
        """Take the model of the running request."""
        request = self._current.get()
        if request is not None and request.span.is_recording():
            request.span.set_attribute("kvatlas.model", model)

    def stage(self, stage: str, seconds: float) -> None:
        """Take the duration of a stage of the score that the running request is at.

        The spans of a score are made when its last stage is told, end to end up to now. Lookup and score take turns
        for long prompts; their spans are the sums, one behind the other.
        """
        request = self._current.get()
        if request is None or not request.span.is_recording():
            return
        request.stages.append((stage, seconds))
        if stage != _LAST:
            return
        done, request.stages = request.stages, []
        parent = set_span_in_context(request.span)
        at = time.time_ns() - int(sum(seconds for _, seconds in done) * 1e9)
        for name, took in done:
            span = self._tracer.start_span(name, parent, start_time=at)
            at += int(took * 1e9)
            span.end(at)

    def grpc(self, service: str, method: str, call: Call) -> Call:
        """Return the handler of an RPC with a span around it."""
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}

        async def traced(request: Any, context: Any) -> Any:
            with self._request(f"{service}/{method}", context.invocation_metadata() or (), attributes) as span:
                try:
                    answer = await call(request, context)
                except BaseException:
                    _failed(span, _NAMES.get(_number(context.code()), "UNKNOWN"), "rpc.grpc.status")
                    raise
                _describe(span, answer)
                return answer

        return traced

    def http(
        self, route: str, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler of an HTTP request with a span around it."""

        async def traced(request: web.Request) -> web.StreamResponse:
            attributes = {"http.request.method": request.method, "http.route": route}
            with self._request(f"{request.method} {route}", request.headers.items(), attributes) as span:
                answer = await handle(request)
                span.set_attribute("http.response.status_code", answer.status)
                if answer.status >= web.HTTPInternalServerError.status_code:
                    span.set_status(Status(StatusCode.ERROR))
                return answer

        return traced

    def close(self) -> None:
        """Send what is left, for a few seconds at most; blocks."""
        self._provider.shutdown()


def _number(code: Any) -> int:
    """Return a status code as a number: an aborted call has it as one, others as gRPC's enumeration."""
    return int(code.value[0] if isinstance(code, grpc.StatusCode) else code or 0)


def _failed(span: Span, code: str, attribute: str) -> None:
    span.set_attribute(attribute, code)
    span.set_status(Status(StatusCode.ERROR, code))


def _describe(span: Span, answer: Any) -> None:
    """Tell counts and names of an answer."""
    if not span.is_recording():
        return
    span.set_attribute("rpc.grpc.status", "OK")
    if isinstance(answer, pb.PickResponse):
        span.set_attribute("kvatlas.pod", answer.pod)
    scored = answer if isinstance(answer, pb.ScoreResponse) else getattr(answer, "scored", None)
    if isinstance(scored, pb.ScoreResponse):
        span.set_attributes(
            {
                "kvatlas.prompt_tokens": scored.prompt_tokens,
                "kvatlas.blocks": scored.blocks,
                "kvatlas.pods": len(scored.scores),
                "kvatlas.tokenizer": scored.tokenizer,
                "kvatlas.partial": scored.freshness.partial,
            }
        )
