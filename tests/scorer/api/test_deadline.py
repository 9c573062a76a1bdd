"""Text whose tokenizer takes too long: the caller hears of it in time, and the load goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from kvatlas.scorer.api.grpc_server import within
from kvatlas.scorer.api.http_server import HttpFront
from kvatlas.scorer.errors import ClientError
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.tokenization.backend import FolderEngine, LocalBackend, Making
from kvatlas.scorer.tokenization.chat import ChatRenderer
from kvatlas.scorer.tokenization.harmony import HarmonyRenderer
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.text_cache import TextCache
from kvatlas.scorer.v1 import scorer_pb2 as pb
from tests.scorer.rig import PARTITIONS, Index, Rig

FOLDER = Path(__file__).parents[2] / "data" / "tokenizer"
CHAT = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hello")])


class Loading(LocalBackend):
    """A backend whose loads wait until they may end, as one from a far hub does."""

    def __init__(self) -> None:
        making = Making(TextCache(2**20), ChatRenderer(TokenizerSettings()), HarmonyRenderer("", datetime.now))
        super().__init__({"m": FOLDER}, None, making)
        self.may_end = threading.Event()
        self.loads = 0

    def load(self, model: str) -> FolderEngine:
        self.loads += 1
        self.may_end.wait(120)
        return super().load(model)


@asynccontextmanager
async def _rig(deadline_ms: float) -> AsyncIterator[tuple[Rig, Loading]]:
    backend = Loading()
    pool = TokenizerPool(TokenizerSettings(), backends=[backend])
    rig = Rig(pool=pool, deadline_ms=deadline_ms, http_listen="127.0.0.1:0", max_concurrent=1)
    async with rig.stack:
        rig.pod("a", 10)
        await rig.worker(Index("w0", rig.table, set(range(PARTITIONS))))
        try:
            yield rig, backend
        finally:
            backend.may_end.set()
            await asyncio.to_thread(pool.close)
            await rig.router.close()


async def _loaded(rig: Rig) -> None:
    assert rig.core._pool is not None
    async with asyncio.timeout(60):
        while rig.core._pool.models() != ["m"]:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("text", [{"prompt": "Hello"}, {"chat": CHAT}], ids=["prompt", "chat"])
async def test_a_load_that_takes_too_long_is_deadline_exceeded(text: dict[str, Any]) -> None:
    """A request without a deadline of its own ends after ``deadline_ms``, gives its place back, and loads only once."""
    async with _rig(200.0) as (rig, backend):
        client = await rig.client(timeout_seconds=None)  # no deadline of its own
        for _ in range(2):
            with pytest.raises(ClientError, match="DEADLINE_EXCEEDED: the text was not tokenized in time"):
                await client.call("Score", pb.ScoreRequest(model="m", **text))
        backend.may_end.set()
        await _loaded(rig)
        assert backend.loads == 1


async def test_a_caller_that_can_wait_gets_its_answer() -> None:
    """A deadline of the caller's counts for the text: a load of longer than ``deadline_ms`` is waited for."""
    async with _rig(50.0) as (rig, backend):
        client = await rig.client(timeout_seconds=120)
        asked = asyncio.ensure_future(client.call("Score", pb.ScoreRequest(model="m", prompt="Hello")))
        await asyncio.sleep(0.2)  # past deadline_ms
        assert not asked.done()
        backend.may_end.set()
        assert (await asked).tokenizer == "local"


@pytest.mark.parametrize("seconds", [0.01, 0.2, 2.0, 20.0, 200.0])
def test_an_answer_leaves_before_the_caller_is_gone(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the caller's time is for the answer, and for the hundredth by which gRPC rounds that time up."""
    context: Any = SimpleNamespace(time_remaining=lambda: seconds * 1.01)
    monkeypatch.setattr("kvatlas.scorer.api.grpc_server.time", SimpleNamespace(monotonic=lambda: 0.0))
    left = within(context, ScorerSettings())
    assert 0.8 * seconds < left < seconds - min(0.15 * seconds, 0.04)


async def test_over_http_it_is_504() -> None:
    """HTTP has no deadline of the caller's: ``deadline_ms`` counts, and the status is 504."""
    async with _rig(200.0) as (rig, _):
        front = HttpFront(rig.calls, rig.inflight)
        address = await front.start()
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://{address}/v1/score", json={"model": "m", "prompt": "Hello"}) as reply,
        ):
            assert (reply.status, (await reply.json())["code"]) == (504, "DEADLINE_EXCEEDED")
        await front.stop()
