"""The very bodies that clients send to engines are scored and tokenized, over HTTP and gRPC, under any served name."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.records import PodRecord, encode
from kvatlas.scorer.api.http_server import HttpFront
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.scorer.rig import PARTITIONS, Index, Rig

DATA = Path(__file__).parents[2] / "data"
FLAGS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
GOLDENS: dict[str, dict[str, Any]] = {
    name: case
    for name, case in json.loads((DATA / "goldens" / "chat.json").read_text()).items()
    if case["engine"] == "vllm"
    and case["flags"] in ([], [*FLAGS, "--trust-request-chat-template"])
    and not name.startswith(("harmony_", "mm_"))
    and not name.startswith("tools_without_flags")
    and "chat_template" not in case["request"]
}
LONG = "The router keeps the prefix of every prompt, and that is what these words are for. " * 8


class Front:
    """A scorer with a tokenizer, over HTTP."""

    def __init__(self, rig: Rig, address: str, session: aiohttp.ClientSession) -> None:
        self.rig, self._address, self._session = rig, address, session

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """POST a body; anything but bytes as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._session.post(f"http://{self._address}/v1/{path}", data=data) as reply:
            return reply.status, await reply.json()

    async def hold(self, model: str, lora: str, salt: str, tokens: list[int], pod: str) -> None:
        """Let a pod hold every block of a prompt."""
        keys = block_keys(root_key(model, lora or None, salt or None), pack_tokens(tokens), 16)
        self.rig.hold(pod, keys)


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    """Pod ``a`` serves the model that engines call /models/tiny and clients tiny, and an adapter ``poet``."""
    settings = TokenizerSettings(
        models=(f"tiny={DATA / 'tokenizer'}",), engine_args=(f"/models/tiny={shlex.join(FLAGS)}",)
    )
    aliases = ["tiny=/models/tiny", "m=/models/tiny"]
    rig = Rig(
        pool=TokenizerPool(settings, also_named=lambda model: ("tiny",) if model == "/models/tiny" else ()),
        aliases=aliases,
        adapters=["critic=tiny"],
        http_listen="127.0.0.1:0",
    )
    async with rig.stack:
        record = PodRecord(
            pod="a", writer="streams", model="/models/tiny", block_size_tokens=16, last_sequence=3, adapters=["poet"]
        )
        rig.pods.apply(b"streams|a", encode(record))
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        served = HttpFront(rig.calls, rig.inflight)
        address = await served.start()
        async with aiohttp.ClientSession() as session:
            yield Front(rig, address, session)
        await served.stop()
        await rig.router.close()


async def _tokens(front: Front, path: str, body: dict[str, Any]) -> list[int]:
    status, found = await front.post(f"tokenize/{path}", body)
    assert status == 200, found
    tokens: list[int] = found["tokens"]
    assert found["count"] == len(tokens)
    return tokens


@pytest.mark.parametrize("name", GOLDENS)
async def test_bodies_are_tokenized_as_vllm_does(name: str, front: Front) -> None:
    """POST /v1/tokenize/... answers the engine's ids and text, or refuses with 400 what the engine refuses."""
    case = GOLDENS[name]
    path = case["path"].removeprefix("/v1/").removesuffix("/render")
    status, found = await front.post(f"tokenize/{path}", case["request"])
    if case["status"] != 200:
        assert status == 400
        assert found["code"] == "INVALID_ARGUMENT"
        return
    assert status == 200, found
    if not isinstance(case["text"], list):
        assert found == {"tokens": case["token_ids"], "count": len(case["token_ids"]), "text": case["text"]}
        return
    answers = found["responses"] if len(case["text"]) > 1 else [found]
    assert [one["tokens"] for one in answers] == case["token_ids"]
    assert [one["text"] for one in answers] == case["text"]


BODIES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": LONG},
    "chat/completions": {"messages": [{"role": "user", "content": LONG}], "reasoning_effort": "none"},
    "responses": {"input": LONG, "instructions": "Be brief."},
    "messages": {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}], "max_tokens": 5},
    "generate": {"token_ids": list(range(100, 260))},
}


@pytest.mark.parametrize("salt", ["", "tenant"])
@pytest.mark.parametrize(("name", "lora"), [("tiny", ""), ("/models/tiny", ""), ("poet", "poet"), ("critic", "critic")])
@pytest.mark.parametrize("path", BODIES)
async def test_every_body_finds_its_blocks(path: str, name: str, lora: str, salt: str, front: Front) -> None:
    """Alias, engine's own name, learnt and set adapter: found are the blocks of that model, adapter and salt."""
    body = {"model": name, **BODIES[path], **({"cache_salt": salt} if salt else {})}
    tokens = await _tokens(front, path, body)
    await front.hold("/models/tiny", lora, salt, tokens, "a")
    status, found = await front.post(f"score/{path}", body)
    assert status == 200, found
    blocks = len(tokens) // 16
    assert blocks > 3
    assert found["scores"]["a"]["matched_blocks"] == blocks
    other = {**body, "cache_salt": "other"}
    assert (await front.post(f"score/{path}", other))[1]["scores"] == {}
    # The same over gRPC, with the path and, where the fields tell the shape, without it.
    client = await front.rig.client()
    for request_path in (f"/v1/{path}", "") if path != "messages" else (f"/v1/{path}",):
        request = pb.ScoreRequest(request_json=json.dumps(body), request_path=request_path)
        assert (await client.call("Score", request)).scores["a"].matched_blocks == blocks
        made = (await client.call("Tokenize", request)).prompts[0]
        assert list(made.tokens) == tokens
    picked = await client.call("Pick", pb.PickRequest(request=request))
    assert (picked.pod, picked.scored.prompt_tokens) == ("a", len(tokens))


async def test_several_prompts_are_answered_one_by_one(front: Front) -> None:
    """A body with a list of prompts has a list of answers; over gRPC each is asked for."""
    body = {"model": "tiny", "prompt": [LONG, [1, 2, 3]]}
    status, found = await front.post("score/completions", body)
    assert status == 200
    assert [one["prompt_tokens"] > 3 for one in found["responses"]] == [True, False]
    client = await front.rig.client()
    with pytest.raises(ClientError, match="2 prompts"):
        await client.call("Score", pb.ScoreRequest(request_json=json.dumps(body)))
    made = await client.call("Tokenize", pb.ScoreRequest(request_json=json.dumps(body)))
    assert [one.count > 3 for one in made.prompts] == [True, False]


async def test_fields_of_ours_in_a_body(front: Front) -> None:
    """Pods, request id and what counts as usable may stand in the body, as may an adapter and items."""
    tokens = list(range(100, 132))
    await front.hold("/models/tiny", "", "", tokens, "a")
    body = {"model": "tiny", "prompt": tokens, "pods": ["b"], "request_id": "r1"}
    assert (await front.post("score/completions", body))[1]["scores"] == {}
    body |= {"pods": ["a"], "usable_only": True}
    found = (await front.post("score/completions", body))[1]
    assert found["scores"]["a"]["matched_blocks"] == 1
    reported = await front.post("report_decision", {"request_id": "r1", "pod": "a"})
    assert reported[0] == 200
    far = {"model": "tiny", "prompt": tokens, "multimodal": [{"identifier": "x", "offset": 40, "length": 4}]}
    status, found = await front.post("score/completions", far)
    assert (status, "multimodal" in found["error"]) == (400, True)


@pytest.mark.parametrize(
    ("request_fields", "text"),
    [
        ({"prompt": "x"}, "form of input of its own"),
        ({"model": "other"}, "request_json has 'tiny'"),
        ({"request_path": "/v1/embeddings"}, "ends in none of"),
        ({"request_json": "{"}, "not JSON"),
        ({"request_json": "[]"}, "body"),
    ],
)
async def test_contradictions_are_told(request_fields: dict[str, str], text: str, front: Front) -> None:
    """What stands beside request_json must not contradict it."""
    given = {"request_json": json.dumps({"model": "tiny", "prompt": "x"}), **request_fields}
    with pytest.raises(ClientError, match=text) as caught:
        await (await front.rig.client()).call("Score", pb.ScoreRequest(**given))
    assert caught.value.code == "INVALID_ARGUMENT"


async def test_an_adapter_of_two_models_is_asked_back(front: Front) -> None:
    """One name, two base models: the answer names both instead of choosing."""
    record = PodRecord(pod="b", writer="streams", model="/models/other", last_sequence=3, adapters=["poet"])
    front.rig.pods.apply(b"streams|b", encode(record))
    status, found = await front.post("score/completions", {"model": "poet", "prompt": [1]})
    assert status == 400
    assert "'/models/other' and of '/models/tiny'" in found["error"]
    assert (await front.post("score/completions", {"model": "tiny", "lora": "poet", "prompt": [1]}))[0] == 200
