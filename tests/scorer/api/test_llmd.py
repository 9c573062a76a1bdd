"""llm-d's services, asked by clients made from their own definition: every RPC, over TCP and a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tokenizers import Tokenizer

from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.scorer.api import llmd
from kvatlas.scorer.tokenization.limits import TokenizerLimits
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from tests.scorer.rig import PARTITIONS, Index, Rig

DATA = Path(__file__).parents[2] / "data"
FOLDER = DATA / "tokenizer"
PLAIN = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
PROMPT = "The router keeps the prefix of every prompt, and that is what these words are for. " * 8

# Written from the wire format, not from this package's protos, so that a wrong number there is seen here.
DEFINITIONS = {
    "router_indexer.proto": """
syntax = "proto3";
package indexer.v1;
message GetPodScoresRequest { string prompt = 1; string model_name = 2; repeated string pod_identifiers = 3; }
message PodScore { string pod = 1; double score = 2; }
message GetPodScoresResponse { repeated PodScore scores = 1; }
service IndexerService { rpc GetPodScores(GetPodScoresRequest) returns (GetPodScoresResponse); }
""",
    "router_tokenization.proto": """
syntax = "proto3";
package tokenization;
message TokenizeRequest { string input = 1; string model_name = 2; bool add_special_tokens = 3; }
message TokenizeResponse {
  repeated uint32 input_ids = 1; bool success = 2; string error_message = 3; repeated uint32 offset_pairs = 4;
}
message ListValue { repeated Value values = 1; }
message StructValue { map<string, Value> fields = 1; }
message Value {
  oneof value { string string_value = 1; double number_value = 2; bool bool_value = 3;
    ListValue list_value = 4; StructValue struct_value = 5; }
}
message ImageUrl { string url = 1; }
message ContentPart { string type = 1; optional string text = 2; optional ImageUrl image_url = 3; }
message ChatMessage {
  string role = 1; optional string content = 2; repeated ContentPart content_parts = 3;
  optional string tool_calls_json = 4;
}
message ConversationTurn { repeated ChatMessage messages = 1; }
message ToolDescription { map<string, Value> tool = 1; }
message Document { map<string, Value> document = 1; }
message ChatTemplateRequest {
  repeated ConversationTurn conversation_turns = 1; repeated ToolDescription tools = 2; repeated Document documents = 3;
  string chat_template = 4; bool return_assistant_tokens_mask = 5; bool continue_final_message = 6;
  bool add_generation_prompt = 7; map<string, Value> chat_template_kwargs = 8; string model_name = 9;
}
message ChatTemplateResponse { string rendered_prompt = 1; bool success = 2; string error_message = 3; }
message InitializeTokenizerRequest { string model_name = 1; bool enable_thinking = 2; bool add_generation_prompt = 3; }
message InitializeTokenizerResponse { bool success = 1; string error_message = 2; }
message RenderChatCompletionRequest {
  string model_name = 1; repeated ChatMessage messages = 2; optional string tools_json = 3; string chat_template = 4;
  optional bool add_generation_prompt = 5; bool continue_final_message = 6; optional string chat_template_kwargs = 7;
}
message StringList { repeated string values = 1; }
message Range { int32 offset = 1; int32 length = 2; }
message RangeList { repeated Range ranges = 1; }
message Features { map<string, StringList> mm_hashes = 1; map<string, RangeList> mm_placeholders = 2; }
message RenderChatCompletionResponse {
  string request_id = 1; repeated uint32 token_ids = 2; Features features = 3; bool success = 4;
  string error_message = 5;
}
message RenderCompletionRequest { string model_name = 1; string prompt = 2; }
message RenderCompletionResponse {
  string request_id = 1; repeated uint32 token_ids = 2; bool success = 3; string error_message = 4;
}
service TokenizationService {
  rpc Tokenize(TokenizeRequest) returns (TokenizeResponse);
  rpc RenderChatTemplate(ChatTemplateRequest) returns (ChatTemplateResponse);
  rpc InitializeTokenizer(InitializeTokenizerRequest) returns (InitializeTokenizerResponse);
  rpc RenderChatCompletion(RenderChatCompletionRequest) returns (RenderChatCompletionResponse);
  rpc RenderCompletion(RenderCompletionRequest) returns (RenderCompletionResponse);
}
""",
}


class Router:
    """A client made from the definitions alone, in a descriptor pool of its own."""

    def __init__(self, pool: descriptor_pool.DescriptorPool, channel: grpc.aio.Channel) -> None:
        self._pool, self._channel = pool, channel
        self.rig: Rig
        self.trailing: dict[str, str] = {}

    async def call(self, service: str, method: str, **fields: Any) -> Any:
        """Call an RPC; fields as in the definition, messages as dicts."""
        found = self._pool.FindServiceByName(service).FindMethodByName(method)
        request = message_factory.GetMessageClass(found.input_type)(**fields)
        kind = message_factory.GetMessageClass(found.output_type)
        call = self._channel.unary_unary(f"/{service}/{method}", response_deserializer=kind.FromString)
        running = call(request.SerializeToString())
        answer = await running
        self.trailing = dict(await running.trailing_metadata())
        return answer

    async def tokenization(self, method: str, **fields: Any) -> Any:
        """Call the tokenization service."""
        return await self.call("tokenization.TokenizationService", method, **fields)

    async def scores(self, **fields: Any) -> list[tuple[str, float]]:
        """Ask for pod scores."""
        answer = await self.call("indexer.v1.IndexerService", "GetPodScores", **fields)
        return [(entry.pod, entry.score) for entry in answer.scores]


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pool.DescriptorPool:
    """The definitions, compiled."""
    folder = tmp_path_factory.mktemp("router")
    for name, text in DEFINITIONS.items():
        (folder / name).write_text(text, encoding="utf-8")
    out = folder / "set"
    words = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={out}", *DEFINITIONS]
    subprocess.run(words, check=True, capture_output=True)
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        pool.Add(file)
    return pool


@pytest.fixture(params=["tcp", "unix"])
async def router(
    request: pytest.FixtureRequest, definitions: descriptor_pool.DescriptorPool, tmp_path: Path
) -> AsyncIterator[Router]:
    """A router connected to a scorer whose pods a and b hold three blocks and one of the prompt."""
    settings = TokenizerSettings(models=(f"m={FOLDER}",), request_templates=True)
    tokenizers = TokenizerPool(settings, limits=TokenizerLimits(template_wait_seconds=90.0))
    rig = Rig(pool=tokenizers)
    async with rig.stack:
        keys = block_keys(root_key("m"), pack_tokens(PLAIN.encode(PROMPT).ids), 16)
        for name, blocks in (("a", 3), ("b", 1), ("c", 0)):
            rig.pod(name, 0)
            rig.hold(name, keys[:blocks])
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        server = grpc.aio.server()
        llmd.add_to(server, rig.calls, tokenizers)
        target = f"unix:{tmp_path / 'tokenizer-uds.socket'}" if request.param == "unix" else "127.0.0.1:0"
        port = server.add_insecure_port(target)
        await server.start()
        rig.stack.push_async_callback(server.stop, 0)
        address = target if request.param == "unix" else f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address) as channel:
            made = Router(definitions, channel)
            made.rig = rig
            yield made
        await rig.router.close()
    await asyncio.to_thread(tokenizers.close)


def _ids(text: str, *, special: bool = False) -> list[int]:
    ids: list[int] = PLAIN.encode(text, add_special_tokens=special).ids
    return ids


async def test_pod_scores(router: Router) -> None:
    """Pods with a match come best first; those without are absent; identifiers narrow the answer."""
    assert await router.scores(prompt=PROMPT, model_name="m") == [("a", 3.0), ("b", 1.0)]
    assert await router.scores(prompt=PROMPT, model_name="m", pod_identifiers=["b", "c"]) == [("b", 1.0)]
    assert await router.scores(prompt="nothing of it", model_name="m") == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.scores(prompt=PROMPT, model_name="unknown")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_ranks_answer_under_the_caller_s_names(router: Router) -> None:
    """Ranks named by their port, and ranks under one name, are found by the plain address; the best rank answers."""
    keys = block_keys(root_key("m"), pack_tokens(PLAIN.encode(PROMPT).ids), 16)
    for name, blocks in (
        ("10.0.0.7:8000", 2),
        ("10.0.0.7:8001@dp1", 4),
        ("10.0.0.8:8000@dp0", 1),
        ("10.0.0.8:8000@dp1", 5),
    ):
        router.rig.pod(name, 0)
        router.rig.hold(name, keys[:blocks])
    wanted = ["10.0.0.7:8000", "10.0.0.7:8001", "10.0.0.8:8000"]
    found = [("10.0.0.8:8000", 5.0), ("10.0.0.7:8001", 4.0), ("10.0.0.7:8000", 2.0)]
    assert await router.scores(prompt=PROMPT, model_name="m", pod_identifiers=wanted) == found
    by_id = ["10.0.0.8:8000@dp0", "10.0.0.7:8001"]
    assert await router.scores(prompt=PROMPT, model_name="m", pod_identifiers=by_id) == [
        ("10.0.0.7:8001", 4.0),
        ("10.0.0.8:8000@dp0", 1.0),
    ]
    everybody = await router.scores(prompt=PROMPT, model_name="m")
    assert [pod for pod, _ in everybody] == ["10.0.0.8:8000", "10.0.0.7:8001", "a", "10.0.0.7:8000", "b"]


async def test_names_too_long_are_refused(router: Router) -> None:
    """Model and pod names of more than 1 KiB are INVALID_ARGUMENT here too, and no success of the tokenizer service."""
    for fields in ({"model_name": "m" * 1025}, {"model_name": "m", "pod_identifiers": ["p" * 1025]}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.scores(prompt=PROMPT, **fields)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not (await router.tokenization("InitializeTokenizer", model_name="m" * 1025)).success


async def test_tokenize(router: Router) -> None:
    """Ids with and without special tokens, and flat pairs of offsets."""
    for special in (True, False):
        answer = await router.tokenization("Tokenize", input=PROMPT, model_name="m", add_special_tokens=special)
        plain = PLAIN.encode(PROMPT, add_special_tokens=special)
        assert (answer.success, answer.error_message, list(answer.input_ids)) == (True, "", plain.ids)
        assert list(answer.offset_pairs) == [end for pair in plain.offsets for end in pair]


async def test_initialize_and_render_completion(router: Router) -> None:
    """A model is loaded ahead, unknown ones are told in the answer; a prompt becomes ids with an id of its own."""
    assert (await router.tokenization("InitializeTokenizer", model_name="m", enable_thinking=True)).success
    refused = await router.tokenization("InitializeTokenizer", model_name="unknown")
    assert (refused.success, "unknown" in refused.error_message) == (False, True)
    one, two = [await router.tokenization("RenderCompletion", model_name="m", prompt=PROMPT) for _ in range(2)]
    assert list(one.token_ids) == _ids(PROMPT, special=True)
    assert (one.success, one.error_message, one.request_id == two.request_id) == (True, "", False)


async def test_render_chat_template(router: Router) -> None:
    """Turns, tools, documents, arguments and a template of the request's own reach the template with their types."""
    template = (
        "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}{{ tools[0].function.name }} "
        "{{ documents[0].title }} {{ n + 1 }} {{ flag }} {{ things[1].x }} {{ add_generation_prompt }}"
    )
    value = {"number_value": 41.0}
    tool = {
        "type": {"string_value": "function"},
        "function": {"struct_value": {"fields": {"name": {"string_value": "f"}}}},
    }
    nested = {"struct_value": {"fields": {"x": {"string_value": "y"}}}}
    answer = await router.tokenization(
        "RenderChatTemplate",
        model_name="m",
        conversation_turns=[{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}],
        tools=[{"tool": tool}],
        documents=[{"document": {"title": {"string_value": "T"}}}],
        chat_template=template,
        add_generation_prompt=True,
        chat_template_kwargs={
            "n": value,
            "flag": {"bool_value": True},
            "things": {"list_value": {"values": [value, nested]}},
        },
    )
    assert (answer.error_message, answer.success) == ("", True)
    assert answer.rendered_prompt == "user=Hi;assistant=Ho;f T 42 True y True"
    bad = await router.tokenization("RenderChatTemplate", model_name="m", chat_template="{{ 1 + }}")
    assert (bad.success, bad.rendered_prompt, bad.error_message == "") == (False, "", False)


async def test_render_chat_completion(router: Router) -> None:
    """A chat becomes the ids of its rendered text; the generation prompt is on unless it is turned off."""
    text = "<|bos|><|im_start|>user\nHi<|im_end|>\n"
    chat = {"model_name": "m", "messages": [{"role": "user", "content": "Hi"}]}
    answer = await router.tokenization("RenderChatCompletion", **chat)
    assert list(answer.token_ids) == _ids(f"{text}<|im_start|>assistant\n")
    assert answer.request_id
    closed = await router.tokenization("RenderChatCompletion", **chat, add_generation_prompt=False)
    assert list(closed.token_ids) == _ids(text)
    parts = [{"role": "user", "content_parts": [{"type": "text", "text": "Hi"}]}]
    assert list((await router.tokenization("RenderChatCompletion", **{**chat, "messages": parts})).token_ids) == list(
        answer.token_ids
    )
    own = await router.tokenization(
        "RenderChatCompletion",
        **chat,
        chat_template="{{ tools[0].function.name }}{{ word }}",
        tools_json=json.dumps([{"function": {"name": "f"}}]),
        chat_template_kwargs=json.dumps({"word": "end"}),
    )
    assert list(own.token_ids) == _ids("fend")
    bad = await router.tokenization("RenderChatCompletion", **chat, tools_json="{")
    assert (bad.success, "tools_json" in bad.error_message) == (False, True)


async def test_scores_that_may_be_too_low_are_flagged(router: Router) -> None:
    """Its answer has no place for it, so trailing metadata says that a partition was silent or a standby answered."""
    await router.scores(prompt=PROMPT, model_name="m")
    assert "kvatlas-partial" not in router.trailing
    rig = router.rig
    rig.workers.apply(b"w0", None)
    rig.announce("gone", "127.0.0.1:1", list(range(PARTITIONS)))
    assert await router.scores(prompt=PROMPT, model_name="m") == []
    assert router.trailing["kvatlas-partial"] == "true"
    await rig.worker(Index("w1", rig.table, set(range(PARTITIONS)), role=2), standby=True)
    assert await router.scores(prompt=PROMPT, model_name="m") == [("a", 3.0), ("b", 1.0)]
    assert {name for name in router.trailing if name.startswith("kvatlas")} == {"kvatlas-standby"}


async def test_the_limit_of_concurrency_holds_for_all_fronts_together(router: Router) -> None:
    """With as much at work as allowed, scores are refused by status and tokenizing in the answer."""
    async with contextlib.AsyncExitStack() as full:
        for _ in range(router.rig.settings.max_concurrent):
            await full.enter_async_context(router.rig.core.admission.turn())
        with pytest.raises(grpc.aio.AioRpcError, match="max_concurrent") as caught:
            await router.scores(prompt=PROMPT, model_name="m")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]) > 0
        refused = await router.tokenization("RenderCompletion", model_name="m", prompt=PROMPT)
        assert (refused.success, "max_concurrent" in refused.error_message) == (False, True)
    assert (await router.tokenization("RenderCompletion", model_name="m", prompt=PROMPT)).success
