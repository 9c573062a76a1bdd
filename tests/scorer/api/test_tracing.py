"""Traces: a span per request, one per stage under it, the caller's trace continued, and nothing of prompts."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.methods import stub_of
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.scorer.api import llmd
from kvatlas.scorer.api.calls import Calls
from kvatlas.scorer.api.http_server import HttpFront
from kvatlas.scorer.api.tracing import Tracing
from kvatlas.scorer.client import score_request
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.service import ScorerService
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.v1 import indexer_pb2
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig

FOLDER = Path(__file__).parents[2] / "data" / "tokenizer"
STAGES = ["tokenize", "keys", "lookup", "score"]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{PARENT}-01"
SECRET = "velvet anchor quartz"


class Traced(Rig):
    """A rig whose spans are kept in memory."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(pool=TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",))), **settings)
        self.memory = InMemorySpanExporter()
        self.tracing = Tracing(self.settings, self.memory)

    async def spans(self) -> list[ReadableSpan]:
        """End serving and return the spans, in the order in which they began."""
        assert self.tracing is not None
        if self.server is not None:
            await self.server.stop(60)  # a caller has its answer before the request's span has ended
        self.tracing.close()
        return sorted(self.memory.get_finished_spans(), key=lambda span: span.start_time or 0)

    async def roots(self) -> list[ReadableSpan]:
        """Return the spans of requests."""
        return [span for span in await self.spans() if span.name not in STAGES]


async def _made(**settings: Any) -> AsyncIterator[Traced]:
    rig = Traced(**settings)
    async with rig.stack:
        rig.pod("a", 10)
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        yield rig
        await rig.router.close()
    assert rig.tracing is not None
    rig.tracing.close()


@pytest.fixture
async def traced() -> AsyncIterator[Traced]:
    """A traced rig with one pod and one worker."""
    async for rig in _made():
        yield rig


def _under(spans: list[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    assert parent.context is not None
    return [span for span in spans if span.parent is not None and span.parent.span_id == parent.context.span_id]


async def test_a_score_has_a_span_with_its_stages_under_it(traced: Traced) -> None:
    """The request's span is the parent of tokenize, keys, lookup and score, end to end and inside it."""
    client = await traced.client()
    answer = await client.score("m", tokens=TOKENS)
    spans = await traced.spans()
    (request,) = [span for span in spans if span.name == "kvatlas.v1.Scorer/Score"]
    stages = _under(spans, request)
    assert [span.name for span in stages] == STAGES
    assert len(spans) == 5
    assert request.start_time is not None
    assert request.end_time is not None
    times = [(span.start_time or 0, span.end_time or 0) for span in stages]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(times))
    assert request.start_time <= times[0][0]
    assert times[-1][1] <= request.end_time
    lookup = times[2][1] - times[2][0]
    assert lookup / 1e6 == pytest.approx(answer.stages.lookup_ms, abs=0.01)
    assert request.parent is None
    assert request.status.status_code is StatusCode.UNSET
    assert dict(request.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "kvatlas.v1.Scorer",
        "rpc.method": "Score",
        "rpc.grpc.status": "OK",
        "kvatlas.model": "m",
        "kvatlas.prompt_tokens": 160,
        "kvatlas.blocks": 10,
        "kvatlas.pods": 1,
        "kvatlas.tokenizer": "",
        "kvatlas.partial": False,
    }


async def test_the_trace_of_a_grpc_caller_goes_on(traced: Traced) -> None:
    """A traceparent in metadata is the parent of the request's span, for our service and for llm-d's."""
    server = grpc.aio.server()
    assert traced.core is not None
    pool = TokenizerPool(TokenizerSettings(models=(f"m={FOLDER}",)))
    llmd.add_to(server, traced.calls, pool, tracing=traced.tracing)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    traced.stack.push_async_callback(server.stop, 0)
    async with grpc.aio.insecure_channel(await traced.serve()) as channel:
        call = channel.unary_unary("/kvatlas.v1.Scorer/Score")
        await call(score_request("m", tokens=TOKENS).SerializeToString(), metadata=(("traceparent", HEADER),))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await stub_of(channel, indexer_pb2).GetPodScores(
            indexer_pb2.GetPodScoresRequest(prompt="hello", model_name="m"), metadata=(("traceparent", HEADER),)
        )
    found = await traced.roots()
    assert [span.name for span in found] == ["kvatlas.v1.Scorer/Score", "indexer.v1.IndexerService/GetPodScores"]
    for span in found:
        assert span.context is not None
        assert span.parent is not None
        assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)


async def test_http_requests_are_traced_too(traced: Traced) -> None:
    """A POST with a traceparent header makes a span with its stages; a refusal has its status and no stages."""
    front = HttpFront(
        Calls(traced.core, ScorerSettings(http_listen="127.0.0.1:0"), traced.guard), traced.inflight, traced.tracing
    )
    address = await front.start()
    traced.stack.push_async_callback(front.stop)
    async with aiohttp.ClientSession() as session:
        for body in ({"model": "m", "tokens": TOKENS}, {"model": "m", "tokenz": TOKENS}):
            async with session.post(f"http://{address}/v1/score", json=body, headers={"traceparent": HEADER}) as reply:
                await reply.read()
    spans = await traced.spans()
    good, bad = (span for span in spans if span.name == "POST /v1/score")
    assert [span.name for span in _under(spans, good)] == STAGES
    assert _under(spans, bad) == []
    for span, status in ((good, 200), (bad, 400)):
        assert span.attributes is not None
        assert span.attributes["http.response.status_code"] == status
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == PARENT


async def test_each_prompt_of_a_batch_has_its_stages(traced: Traced) -> None:
    """A batch is one span over the stages of all its prompts."""
    client = await traced.client()
    await client.call("ScoreBatch", pb.ScoreBatchRequest(requests=[score_request("m", tokens=TOKENS)] * 3))
    spans = await traced.spans()
    (batch,) = [span for span in spans if span.name == "kvatlas.v1.Scorer/ScoreBatch"]
    assert sorted(span.name for span in _under(spans, batch)) == sorted(STAGES * 3)


async def test_spans_hold_nothing_of_a_prompt(traced: Traced) -> None:
    """Neither text nor salt nor token ids are in any span, of answers and of refusals; errors have their code."""
    client = await traced.client()
    await client.score("m", prompt=f"{SECRET} " * 20, cache_salt=SECRET)
    await client.score("m", messages=[{"role": "user", "content": SECRET}], tokens=None)
    for wrong in (
        score_request("m", messages=[{"role": SECRET, "content": SECRET}], truncation_side=SECRET),
        score_request("m", prompt=SECRET, strategy=SECRET),
    ):
        with pytest.raises(ClientError):
            await client.call("Score", wrong)
    spans = await traced.spans()
    errors = [span for span in spans if span.status.status_code is StatusCode.ERROR]
    assert [(span.attributes or {})["rpc.grpc.status"] for span in errors] == ["INVALID_ARGUMENT"] * 2
    assert [span for span in spans if any(word in span.to_json() for word in SECRET.split())] == []


async def test_the_share_of_traced_requests_is_the_callers_choice_first() -> None:
    """With ratio 0 only requests whose caller samples its trace make spans, and then with their stages."""
    async for rig in _made(traces_sample_ratio=0.0):
        async with grpc.aio.insecure_channel(await rig.serve()) as channel:
            call = channel.unary_unary("/kvatlas.v1.Scorer/Score")
            for headers in ((), (("traceparent", HEADER),), (("traceparent", HEADER[:-1] + "0"),)):
                await call(score_request("m", tokens=TOKENS).SerializeToString(), metadata=headers)
        assert [span.name for span in await rig.spans()] == ["kvatlas.v1.Scorer/Score", *STAGES]


async def test_a_service_sends_its_spans_over_otlp(traced: Traced) -> None:
    """Spans reach a collector over OTLP/gRPC with the name of the scorer, at the latest when it stops."""
    received: list[Any] = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
            received.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    traced.stack.push_async_callback(server.stop, 0)
    assert traced.tracing is not None
    traced.tracing.close()
    traced.tracing = Tracing(ScorerSettings(name="s7", traces_endpoint=f"http://127.0.0.1:{port}"))
    await (await traced.client()).score("m", tokens=TOKENS)
    await _closed(traced.tracing)
    names = {span.name for one in received for r in one.resource_spans for s in r.scope_spans for span in s.spans}
    assert names == {"kvatlas.v1.Scorer/Score", *STAGES}
    about = {a.key: a.value.string_value for one in received for r in one.resource_spans for a in r.resource.attributes}
    assert (about["service.name"], about["service.instance.id"]) == ("kvatlas-scorer", "s7")


async def _closed(tracing: Tracing) -> None:
    await asyncio.to_thread(tracing.close)


async def test_a_collector_that_is_away_holds_nothing_up(traced: Traced) -> None:
    """Without a collector requests are answered as ever and the end does not wait for it for ever."""
    assert traced.tracing is not None
    traced.tracing.close()
    traced.tracing = Tracing(ScorerSettings(traces_endpoint="http://127.0.0.1:1"))
    client = await traced.client()
    assert (await client.score("m", tokens=TOKENS)).scores["a"].score == 10
    async with asyncio.timeout(120):
        await _closed(traced.tracing)


def test_without_traces_nothing_of_them_is_loaded() -> None:
    """A scorer without the setting imports no OpenTelemetry."""
    code = (
        "import sys\n"
        "from kvatlas.scorer.service import ScorerService\n"
        "from kvatlas.scorer.options import ScorerSettings\n"
        "from kvatlas.bridge.runtime.settings import KafkaSettings\n"
        "ScorerService(ScorerSettings(), KafkaSettings())\n"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "False"), run.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the setting and without the extra, the error says what to install."""
    monkeypatch.delitem(sys.modules, "kvatlas.scorer.api.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"install kvatlas\[otel\]"):
        ScorerService(ScorerSettings(traces_endpoint="http://127.0.0.1:4317"), KafkaSettings())
