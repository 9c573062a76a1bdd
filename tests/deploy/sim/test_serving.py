"""Simulated engines that serve: every API, cached tokens that are true, streams, metrics."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvatlas.bridge.engines.engine_metrics import EngineLoad, read_load
from kvatlas.deploy.gateway.tiny_tokenizer import write_tokenizer
from kvatlas.deploy.sim.fleet import Fleet
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.deploy.sim.serving import POD_HEADER, ServedFleet
from kvatlas.scorer.gateway.discovery import parse_endpoint
from kvatlas.scorer.picker.usage import UsageReader
from kvatlas.scorer.tokenization.options import TokenizerSettings


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedFleet]:
    folder: Path = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    fleet = Fleet(SimPlan(pods=2, step_ms=0.0, blocks=64), clock=time.time, monotonic=time.monotonic)
    fleet.start()
    made = ServedFleet(fleet, TokenizerSettings(models=(f"sim-model={folder}",)))
    made.start()
    yield made
    made.close()
    fleet.close()


def ask(served: ServedFleet, path: str, body: Any, pod: str = "pod-0") -> tuple[int, str, bytes]:
    request = urllib.request.Request(
        f"http://{served.addresses[pod]}{path}",
        None if body is None else json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            assert body is None or answer.headers[POD_HEADER] == pod
            return answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, "", error.read()


TEXT = "the cache of a pod holds blocks and each block has tokens which the engine computes once " * 4
BODIES = {
    "/v1/completions": {"prompt": TEXT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
    "/v1/responses": {"input": TEXT},
    "/v1/messages": {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 4},
    "/inference/v1/generate": {"token_ids": list(range(100, 164))},
}


@pytest.mark.parametrize("path", BODIES)
def test_second_request_finds_the_first_ones_blocks(served: ServedFleet, path: str) -> None:
    usages = []
    for _ in range(2):
        status, kind, data = ask(served, path, {"model": "sim-model", "max_tokens": 4, **BODIES[path]})
        assert status == 200, data
        reader = UsageReader(kind)
        reader.feed(data)
        usages.append(reader.close())
    assert usages[0].prompt_tokens == usages[1].prompt_tokens > 40
    assert usages[1].cached_tokens == (usages[1].prompt_tokens - 1) // 16 * 16


def test_stream_ends_with_its_usage(served: ServedFleet) -> None:
    body = {"model": "sim-model", "prompt": "a stream of words " * 20, "max_tokens": 5, "stream": True}
    status, kind, data = ask(served, "/v1/completions", body, "pod-1")
    reader = UsageReader(kind)
    reader.feed(data)
    assert (status, reader.streamed, reader.close().output_tokens) == (200, True, 5)
    assert data.endswith(b"data: [DONE]\n\n")
    assert data.count(b"data: ") == 7


def test_bad_requests_are_refused(served: ServedFleet) -> None:
    assert ask(served, "/v1/completions", {"model": "sim-model"})[0] == 400
    assert ask(served, "/v1/completions", {"model": "sim-model", "prompt": list(range(64 * 16 + 20))})[0] == 400
    assert ask(served, "/v1/completions", {"model": "other", "prompt": [1, 2]})[0] == 404


def test_metrics_and_endpoints_are_what_a_picker_reads(served: ServedFleet) -> None:
    def told() -> EngineLoad:
        return read_load(ask(served, "/metrics", None)[2].decode())

    before = told()
    assert before[:3] == (0.0, 0.0, 0.0)
    for _ in range(2):
        ask(
            served,
            "/inference/v1/generate",
            {"model": "sim-model", "max_tokens": 1, "token_ids": list(range(500, 564))},
        )
    after = told()
    assert (after.asked - before.asked, after.found - before.found) == (128.0, 48.0)
    found = [one for text in served.endpoints() for one in parse_endpoint(text)]
    assert [one.pod for one in found] == ["pod-0", "pod-1"]
