"""The HTTP/JSON front as curl uses it: every operation, and every kind of refusal as JSON with its status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from google.protobuf.json_format import ParseDict

from kvatlas.scorer.api.http_server import HttpFront
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.scorer.rig import PARTITIONS, TOKENS, Index, Rig

ONE = {"model": "m", "tokens": TOKENS}


class Curl:
    """Sends bodies as text and reads answers as JSON."""

    def __init__(self, rig: Rig, address: str, session: aiohttp.ClientSession) -> None:
        self.rig, self._address, self._session = rig, address, session
        self.retry_after: str | None = None

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """POST a body; anything but bytes as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._session.post(f"http://{self._address}/v1/{path}", data=data, **options) as reply:
            assert reply.content_type == "application/json"
            self.retry_after = reply.headers.get("Retry-After")
            return reply.status, await reply.json()

    async def get(self, path: str) -> tuple[int, Any]:
        """GET a path."""
        async with self._session.get(f"http://{self._address}/v1/{path}") as reply:
            return reply.status, await reply.json()


@pytest.fixture
async def curl(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Curl]:
    """A front with one worker and pods a (10 blocks) and b (4 blocks)."""
    monkeypatch.setattr("kvatlas.scorer.api.core.MAX_WATCHERS", 1)
    rig = Rig(http_listen="127.0.0.1:0", max_message_bytes=4096, max_tokens=500, max_concurrent=2)
    async with rig.stack:
        rig.pod("a", 10)
        rig.pod("b", 4)
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        front = HttpFront(rig.calls, rig.inflight)
        address = await front.start()
        async with aiohttp.ClientSession() as session:
            yield Curl(rig, address, session)
        await front.stop()
        await rig.router.close()


async def test_score(curl: Curl) -> None:
    """Scores and freshness in the names of the proto file, defaults written out; the same answer as over gRPC."""
    status, found = await curl.post("score", ONE)
    assert status == 200
    assert {pod: entry["matched_blocks"] for pod, entry in found["scores"].items()} == {"a": 10, "b": 4}
    assert found["freshness"]["partial"] is False
    over_grpc = await (await curl.rig.client()).score("m", tokens=TOKENS)
    same = ParseDict(found, pb.ScoreResponse())
    for answer in (same, over_grpc):
        answer.ClearField("stages")
        for pod in answer.freshness.pods.values():
            pod.age_ms = 0
    assert same == over_grpc


async def test_score_batch(curl: Curl) -> None:
    """Answers in order; a request that cannot be scored has its error in its place."""
    status, found = await curl.post("score_batch", {"requests": [ONE, {"tokens": [1]}, {**ONE, "pods": ["b"]}]})
    assert status == 200
    assert [sorted(one["scores"]) for one in found["responses"]] == [["a", "b"], [], ["b"]]
    wrong = "INVALID_ARGUMENT: model: missing; block keys differ by model"
    assert [one["error"] for one in found["responses"]] == ["", wrong, ""]


async def test_pick(curl: Curl) -> None:
    """The pod, the runners-up and the reason; load in the request counts."""
    status, found = await curl.post("pick", {"request": ONE})
    assert (status, found["pod"]) == (200, "a")
    assert [candidate["pod"] for candidate in found["candidates"]] == ["a", "b"]
    assert found["reason"]
    _, busy = await curl.post("pick", {"request": ONE, "load": {"a": {"waiting": 10}}, "weights": {"waiting": 3}})
    assert busy["pod"] == "b"


async def test_explain(curl: Curl) -> None:
    """Every block with its holders, and where each pod's walk ended."""
    status, found = await curl.post("explain", ONE)
    assert status == 200
    assert [len(block["holders"]) for block in found["blocks"]] == [2] * 4 + [1] * 6
    assert found["walks"]["b"] == {"matched_blocks": 4, "reason": "block 4: not held on any tier"}


async def test_report_decision(curl: Curl) -> None:
    """A decision about a prompt that was scored before is taken and speculates for the next request."""
    curl.rig.pod("c", 0)
    assert (await curl.post("score", {**ONE, "request_id": "r"}))[0] == 200
    status, found = await curl.post("report_decision", {"request_id": "r", "pod": "c"})
    assert (status, found["blocks"], int(found["expires_ns"]) > 0) == (200, 10, True)
    _, after = await curl.post("score", ONE)
    assert after["scores"]["c"]["speculative_blocks"] == 10


async def test_pods(curl: Curl) -> None:
    """All pods, those of a model, and those that are gone when asked for."""
    curl.rig.pod("z", 0, state="gone")
    for path, names in (
        ("pods", ["a", "b"]),
        ("pods?all=1", ["a", "b", "z"]),
        ("pods?model=m&all=true", ["a", "b", "z"]),
        ("pods?model=other", []),
    ):
        status, found = await curl.get(path)
        assert (status, [pod["pod"] for pod in found["pods"]]) == (200, names)


async def test_coverage_is_told(curl: Curl) -> None:
    """Of every pod in the list, and of those in an answer: how much of its engine's stream is known."""
    curl.rig.pod("late", 3, heard_from=2)
    curl.rig.pod("whole", 3, heard_from=0)
    expected = {"late": ("partial", "2"), "whole": ("whole", "0"), "a": ("", "0")}
    _, found = await curl.get("pods")
    listed = {pod["pod"]: (pod["coverage"], pod["heard_from"]) for pod in found["pods"]}
    assert {name: listed[name] for name in expected} == expected
    _, found = await curl.post("score", ONE)
    pods = found["freshness"]["pods"]
    assert {name: (pods[name]["coverage"], pods[name]["heard_from"]) for name in expected} == expected


async def test_a_cache_server_is_credited_and_never_chosen(curl: Curl) -> None:
    """What it holds counts for the pods that load from it; it is listed, and is no pod to send requests to."""
    curl.rig.pod("lmcache:s", 10, engine="lmcache", serves=["b"])
    _, found = await curl.post("score", ONE)
    assert {pod: entry["matched_blocks"] for pod, entry in found["scores"].items()} == {"a": 10, "b": 10}
    _, found = await curl.post("pick", {"request": {"model": "m", "tokens": [7] * 160}})
    assert {each["pod"] for each in found["candidates"]} == {"a", "b"}
    _, found = await curl.post("explain", ONE)
    assert {holder["pod"] for block in found["blocks"] for holder in block["holders"]} == {"a", "b"}
    _, found = await curl.get("pods")
    assert "lmcache:s" in {pod["pod"] for pod in found["pods"]}


async def test_watch_pods(curl: Curl) -> None:
    """All pods, a line each, then each change; one stream too many is refused, and one that was left does not count."""
    url = f"http://{curl._address}/v1/pods/watch?model=m"
    async with curl._session.get(url) as reply:
        assert (reply.status, reply.content_type) == (200, "application/x-ndjson")
        assert [json.loads(await reply.content.readline())["pod"] for _ in range(2)] == ["a", "b"]
        curl.rig.pod("c", 0)
        assert json.loads(await reply.content.readline())["pod"] == "c"
        async with curl._session.get(url) as refused:
            assert (refused.status, (await refused.json())["code"]) == (429, "RESOURCE_EXHAUSTED")
    async with asyncio.timeout(60):
        while curl.rig.core.watchers.inside:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words"),
    [
        ("score", b"{", 400, "INVALID_ARGUMENT", "body"),
        ("score", b"\xff\xfe", 400, "INVALID_ARGUMENT", "not UTF-8 at byte 0"),
        ("score", b"[1]", 400, "INVALID_ARGUMENT", "body"),
        ("score", b'{"chat":' * 3000, 413, "RESOURCE_EXHAUSTED", "max_message_bytes"),
        ("score", b"[" * 4000, 400, "INVALID_ARGUMENT", "body"),
        ("score", {"model": "m", "tokenz": []}, 400, "INVALID_ARGUMENT", "tokenz"),
        ("score", {"model": "m", "tokens": [-1]}, 400, "INVALID_ARGUMENT", "body"),
        ("score", {"model": "m", "tokens": [1] * 501}, 413, "RESOURCE_EXHAUSTED", "max_tokens"),
        ("score", {"model": "m", "prompt": "x"}, 404, "NOT_FOUND", "token ids only"),
        ("explain", {"tokens": [1]}, 400, "INVALID_ARGUMENT", "model"),
        ("pick", {"request": {"model": "none", "tokens": [1]}}, 503, "UNAVAILABLE", "none"),
        ("report_decision", {"request_id": "r"}, 400, "INVALID_ARGUMENT", "pod"),
        ("report_decision", {"request_id": "r", "pod": "a"}, 409, "FAILED_PRECONDITION", "'r'"),
        ("report_decision", {"request_id": "r", "pod": "x", "request": ONE}, 404, "NOT_FOUND", "'x'"),
    ],
)
async def test_refusals_are_json_with_their_status(
    curl: Curl, path: str, body: Any, status: int, code: str, words: str
) -> None:
    """Whatever is wrong, the answer says so as JSON: an error for people and gRPC's code for programs."""
    found_status, found = await curl.post(path, body)
    assert (found_status, found["code"]) == (status, code), found
    assert words in found["error"]
    assert set(found) == {"error", "code"}


async def test_one_request_too_many_is_refused(curl: Curl) -> None:
    """With max_concurrent requests at work the next one gets 429 at once, and the others their answers."""
    go = asyncio.Event()
    lookup = curl.rig.router.lookup

    entered = 0

    async def held(*arguments: Any) -> Any:
        nonlocal entered
        entered += 1
        await go.wait()
        return await lookup(*arguments)

    curl.rig.router.lookup = held  # type: ignore[method-assign]
    waiting = [asyncio.ensure_future(curl.post("score", ONE)) for _ in range(2)]
    async with asyncio.timeout(60):
        while entered < 2:
            await asyncio.sleep(0.01)
    status, found = await curl.post("score", ONE)
    assert (status, found["code"], curl.retry_after) == (429, "RESOURCE_EXHAUSTED", "1")
    # Before it is read: what is no request at all is refused as well.
    status, found = await curl.post("score/chat/completions", b"{")
    assert (status, found["code"]) == (429, "RESOURCE_EXHAUSTED")
    go.set()
    assert [(await one)[0] for one in waiting] == [200, 200]
