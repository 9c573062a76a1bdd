"""The pool: one load per model, bounded memory, backends in order, and answers equal to plain encoding."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tokenizers import Tokenizer

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.runtime.methods import add_service, stub_of
from kvatlas.scorer.errors import UnknownModelError
from kvatlas.scorer.tokenization.backend import FolderEngine, LocalBackend, Making
from kvatlas.scorer.tokenization.chat import ChatRenderer
from kvatlas.scorer.tokenization.errors import (
    BadModelError,
    NoTokenizerError,
    PromptLimitError,
    TokenizeInputError,
    TokenizerBackendError,
)
from kvatlas.scorer.tokenization.harmony import HarmonyRenderer
from kvatlas.scorer.tokenization.hub import HubBackend
from kvatlas.scorer.tokenization.limits import TOKENIZER_LIMITS, TokenizerLimits
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import ChatInput, Truncation
from kvatlas.scorer.tokenization.remote import RemoteBackend
from kvatlas.scorer.tokenization.service import TokenizationServicer
from kvatlas.scorer.tokenization.text_cache import TextCache
from kvatlas.scorer.v1 import tokenization_pb2 as pb

FOLDER = Path(__file__).parents[2] / "data" / "tokenizer"
PLAIN = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
TEXT = "<|im_start|>user\nThe router keeps the prefix, and that's 1234 tokens.<|im_end|>\n" * 9
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi <|im_end|> there, Köln?"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def _pool(limits: TokenizerLimits = TOKENIZER_LIMITS, **settings: Any) -> TokenizerPool:
    return TokenizerPool(TokenizerSettings(**{"models": (f"m={FOLDER}",), **settings}), limits=limits)


def _making(settings: TokenizerSettings) -> Making:
    return Making(TextCache(2**20), ChatRenderer(settings), HarmonyRenderer("", datetime.now))


class _Slow(LocalBackend):
    """A local backend that counts its loads and takes time for them."""

    def __init__(self, name: str = "slow") -> None:
        settings = TokenizerSettings()
        super().__init__({}, FOLDER.parent, _making(settings))
        self.name = name  # type: ignore[misc]
        self.loads: list[str] = []

    def load(self, model: str) -> FolderEngine:
        self.loads.append(model)
        time.sleep(0.05)
        return super().load("tokenizer" if model.startswith("m") else model)


async def test_tokens_are_those_of_the_tokenizer() -> None:
    """Completions get the tokenizer's special tokens unless told otherwise, and the answer names the backend."""
    async with _pool() as pool:
        for special in (True, False):
            encoded = await pool.encode("m", TEXT, add_special_tokens=special)
            assert encoded.list() == PLAIN.encode(TEXT, add_special_tokens=special).ids
        assert encoded.backend == "local"
        assert encoded.known_chars > 0
        assert (await pool.encode("m", "")).list() == PLAIN.encode("").ids


def test_text_seen_before_is_known_without_a_thread() -> None:
    """What is known as a whole is the same as what was tokenized, however it is framed or cut."""
    engine = FolderEngine(FOLDER, _making(TokenizerSettings()))
    text = TEXT * 3
    assert engine.known(text, add_special_tokens=True, truncation=None) is None
    engine.encode(text, add_special_tokens=False, truncation=None, offsets=False)
    for special in (True, False):
        for truncation in (None, Truncation(5, None), Truncation(7, "left"), Truncation(9, "right")):
            known = engine.known(text, add_special_tokens=special, truncation=truncation)
            again = engine.encode(text, add_special_tokens=special, truncation=truncation, offsets=False)
            assert known == again
            assert again.known_chars == len(text)
    with pytest.raises(TokenizeInputError):
        engine.encode(text, add_special_tokens=True, truncation=Truncation(-1, None), offsets=False)
    assert engine.known(text, add_special_tokens=True, truncation=Truncation(-1, None)) is None
    assert engine.known(text + " and more", add_special_tokens=True, truncation=None) is None


async def test_offsets_point_into_the_text() -> None:
    """Offsets count characters, so that text behind a non-ASCII letter is found again."""
    async with _pool() as pool:
        encoded = await pool.encode("m", "Köln is far", offsets=True)
    assert encoded.offsets is not None
    assert list(encoded.offsets) == PLAIN.encode("Köln is far").offsets
    assert encoded.offsets[-1][1] == len("Köln is far")


@pytest.mark.parametrize("offsets", [True, False])
async def test_truncation(offsets: bool) -> None:
    """A named side slices the finished ids; without one the end is kept, with the tokenizer's specials."""
    full = PLAIN.encode(TEXT).ids
    async with _pool() as pool:
        for tokens in (0, 1, 7, len(full), len(full) + 5):
            for side, wanted in (("left", full[max(0, len(full) - tokens) :]), ("right", full[:tokens])):
                cut = Truncation(tokens, side)  # type: ignore[arg-type]
                encoded = await pool.encode("m", TEXT, truncate=cut, offsets=offsets)
                assert encoded.list() == wanted
                assert encoded.offsets is None or len(encoded.offsets) == len(wanted)
        # Engines that generate keep the end.
        own = await pool.encode("m", TEXT, truncate=Truncation(5), offsets=offsets)
        assert own.list() == [full[0], *full[-4:]]
        with pytest.raises(TokenizeInputError, match="truncation"):
            await pool.encode("m", TEXT, truncate=Truncation(-1))


async def test_one_load_per_model_under_concurrency() -> None:
    """A hundred requests at once for three models cause three loads."""
    backend = _Slow()
    async with TokenizerPool(TokenizerSettings(), backends=[backend]) as pool:
        await asyncio.gather(*(pool.encode(f"m{number % 3}", "text") for number in range(100)))
        assert sorted(backend.loads) == ["m0", "m1", "m2"]
        assert sorted(pool.models()) == ["m0", "m1", "m2"]


async def test_a_cancelled_request_does_not_spoil_the_load() -> None:
    """Who gives up waiting for a load takes it from nobody else."""
    backend = _Slow()
    async with TokenizerPool(TokenizerSettings(), backends=[backend]) as pool:
        first = asyncio.create_task(pool.encode("m", "text"))
        second = asyncio.create_task(pool.encode("m", "text"))
        await asyncio.sleep(0.01)
        first.cancel()
        assert len(await second) > 0
        assert backend.loads == ["m"]


async def test_loaded_models_are_bounded() -> None:
    """The least recently used tokenizer goes when there are too many, with its known text, and comes back on use."""
    backend = _Slow()
    async with TokenizerPool(TokenizerSettings(), backends=[backend], limits=TokenizerLimits(models=2)) as pool:
        for model in ("m0", "m1", "m0", "m2"):
            await pool.encode(model, TEXT)
        assert pool.models() == ["m0", "m2"]
        await pool.encode("m1", TEXT)
        assert backend.loads == ["m0", "m1", "m2", "m1"]


async def test_failed_loads_are_remembered_for_a_moment() -> None:
    """A burst for an unknown model looks once, and later looks again."""
    now = [0.0]
    backend = _Slow()
    async with TokenizerPool(TokenizerSettings(), backends=[backend], clock=lambda: now[0]) as pool:
        for at in (0.0, 1.0, 4.9, 5.0):
            now[0] = at
            with pytest.raises(UnknownModelError, match="nope"):
                await pool.encode("nope", "text")
    assert backend.loads == ["nope", "nope"]


async def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    """Unknown models, missing and broken files, long prompts and bad text each have their kind."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    (tmp_path / "config").mkdir()
    shutil.copy(FOLDER / "tokenizer.json", tmp_path / "config")
    (tmp_path / "config" / "tokenizer_config.json").write_text("[1]")
    async with _pool(TokenizerLimits(prompt_bytes=100), root=str(tmp_path)) as pool:
        for model, kind, text in (
            ("other", NoTokenizerError, "other"),
            ("../tokenizer", NoTokenizerError, "no folder"),
            (".", NoTokenizerError, "no folder"),
            ("empty", BadModelError, "has no tokenizer.json"),
            ("broken", BadModelError, "not a tokenizer"),
            ("config", BadModelError, "tokenizer_config.json"),
            ("", TokenizeInputError, "no model"),
        ):
            with pytest.raises(kind, match=text):
                await pool.encode(model, "text")
        with pytest.raises(PromptLimitError, match="the limit is 100"):
            await pool.encode("m", "é" * 51)
        assert len(await pool.encode("m", "é" * 50)) > 0
        with pytest.raises(TokenizeInputError, match="surrogates"):
            await pool.encode("m", "a\ud800")
    with pytest.raises(SettingsError, match="MODEL=DIR"):
        _pool(models=("m",))


async def test_known_text_is_bounded() -> None:
    """The cache of known text stays within its bytes, and answers stay right."""
    async with _pool(prefix_cache_bytes=20_000) as pool:
        for number in range(60):
            text = TEXT + str(number) + TEXT
            assert (await pool.encode("m", text)).list() == PLAIN.encode(text).ids
            assert pool.cache.used_bytes <= 20_000
        assert len(pool.cache) > 0


def test_many_threads_share_one_cache() -> None:
    """Readers and writers of the cache on many threads keep its byte count right."""
    cache = TextCache(50_000)

    def work(seed: int) -> None:
        for number in range(400):
            part = f"{(seed * number) % 97}" * 10
            cache.put(1, [(part, part.encode())])
            assert cache.get(1, [part])[0] in (None, part.encode())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache.drop(1)
    assert (len(cache), cache.used_bytes) == (0, 0)


def test_hub_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached is a retriable error; names the settings do not allow are never asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    settings = TokenizerSettings()
    backend = HubBackend(models=["good/*"], revision="main", making=_making(settings))
    with pytest.raises(TokenizerBackendError, match="cannot be reached") as caught:
        backend.load("good/model")
    assert caught.value.retriable
    with pytest.raises(NoTokenizerError, match="hub_models"):
        backend.load("bad/model")


@pytest.fixture(params=["tcp", "unix"])
async def address(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """A tokenizer service of ours that knows model ``m``."""
    server = grpc.aio.server()
    pool = _pool()
    add_service(server, pb, TokenizationServicer(pool))
    if request.param == "tcp":
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    else:
        target = f"unix:{tmp_path / 'socket'}"
        server.add_insecure_port(target)
    await server.start()
    yield target
    await server.stop(0)
    await asyncio.to_thread(pool.close)


async def test_remote_answers_as_local(address: str) -> None:
    """Another tokenizer service gives the same tokens, text and offsets, over TCP and a Unix socket."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": "ö"}'}}
    chat = ChatInput(
        [SYSTEM, USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
        documents=[{"title": "T", "text": "x"}],
        kwargs={"enable_thinking": False},
    )
    async with _pool() as here, _pool(models=(), remote=address) as there:
        for special in (True, False):
            remote = await there.encode("m", TEXT, add_special_tokens=special)
            assert remote.ids == (await here.encode("m", TEXT, add_special_tokens=special)).ids
            assert remote.backend == "remote"
        spots = await there.encode("m", "Köln, far", offsets=True)
        assert list(spots.offsets or ()) == PLAIN.encode("Köln, far").offsets
        assert (await there.render_chat("m", chat)).text == (await here.render_chat("m", chat)).text
        tools = ChatInput(chat.messages, tools=[TOOL], kwargs=chat.kwargs)
        for asked in (chat, tools):
            assert (await there.encode_chat("m", asked)).ids == (await here.encode_chat("m", asked)).ids
        cut = await there.encode("m", TEXT, truncate=Truncation(3, "left"))
        assert cut.list() == PLAIN.encode(TEXT).ids[-3:]


async def test_remote_failures_keep_their_kind(address: str) -> None:
    """What the other service refuses, does not know or cannot do arrives here as the same kind of error."""
    async with _pool(models=(), remote=address) as pool:
        with pytest.raises(NoTokenizerError, match="nope"):
            await pool.encode("nope", "text")
        with pytest.raises(TokenizeInputError, match="refuses"):
            await pool.encode_chat("m", ChatInput([USER], chat_template="{{ raise_exception('never') }}"))


async def test_fallback_says_who_answered(address: str) -> None:
    """A model the first backend lacks comes from the next one; an unreachable one is told and stops no other."""
    async with _pool(models=(), root=str(FOLDER.parent), remote=address) as pool:
        assert (await pool.encode("tokenizer", "text")).backend == "local"
        assert (await pool.encode("m", "text")).backend == "remote"
    async with _pool(TokenizerLimits(remote_seconds=0.5), remote="127.0.0.1:1") as pool:
        assert (await pool.encode("m", "text")).backend == "local"
        with pytest.raises(TokenizerBackendError, match=r"local: .*; remote: ") as caught:
            await pool.encode("other", "text")
        assert caught.value.retriable


async def test_service_tells_failures_in_the_answer(address: str) -> None:
    """Failures are answers with success false and a text, as routers expect; good answers carry an id."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = stub_of(channel, pb)
        bad = await stub.Tokenize(pb.TokenizeRequest(input="x", model_name="nope"))
        assert (bad.success, "nope" in bad.error_message, list(bad.input_ids)) == (False, True, [])
        assert not (await stub.InitializeTokenizer(pb.InitializeTokenizerRequest(model_name="nope"))).success
        assert (await stub.InitializeTokenizer(pb.InitializeTokenizerRequest(model_name="m"))).success
        done = await stub.RenderCompletion(pb.RenderCompletionRequest(model_name="m", prompt="Hi there"))
        assert (done.success, list(done.token_ids)) == (True, PLAIN.encode("Hi there").ids)
        assert done.request_id
        request = pb.RenderChatCompletionRequest(model_name="m", messages=[pb.ChatMessage(role="user", content="Hi")])
        text = "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        chat = await stub.RenderChatCompletion(request)
        assert list(chat.token_ids) == PLAIN.encode(text, add_special_tokens=False).ids
        request.tools_json = "{"
        assert "tools_json" in (await stub.RenderChatCompletion(request)).error_message


async def test_remote_backend_without_a_service() -> None:
    """Nobody at the address is a retriable error of the backend."""
    backend = RemoteBackend("127.0.0.1:1", 0.5)
    with pytest.raises(TokenizerBackendError, match=r"UNAVAILABLE|DEADLINE"):
        await asyncio.to_thread(backend.load, "m")
    backend.close()
