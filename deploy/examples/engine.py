"""A stand-in for an inference engine: OpenAI-style HTTP before a simulated paged cache that sends real events."""

from __future__ import annotations

import random
import time
from typing import Any

from aiohttp import web

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.deploy.sim.cache import Request
from kvatlas.deploy.sim.pod import Publisher, SimPod
from kvatlas.scorer.tokenization.pool import TokenizerPool
from kvatlas.scorer.tokenization.records import ChatInput


class StandInEngine:
    """One engine: HTTP in front, ZMQ events behind.

    Attributes:
        url: where it answers, after :meth:`start`.
        endpoint: its events, as ``--engine`` takes them.
    """

    def __init__(self, pod: str, model: str, tokenizers: TokenizerPool | None = None, *, blocks: int = 512) -> None:
        """Describe the engine.

        Args:
            pod: its pod id.
            model: what it serves.
            tokenizers: for prompts that are text; None takes token ids only.
            blocks: blocks of 16 tokens in its cache.
        """
        self.url = ""
        self.endpoint = ""
        self.pod = pod
        self._model = model
        self._tokenizers = tokenizers
        self._rng = random.Random(pod)  # noqa: S311 - made-up answers
        self._runner: web.AppRunner | None = None

        def publisher(live: str, replay: str) -> Publisher:
            return EnginePublisher(live, replay, topic=f"kv@{pod}@{model}", bind=True)

        self._sim = SimPod(
            pod,
            blocks=blocks,
            block_size_tokens=16,
            model=model,
            seed=self._rng.getrandbits(64),
            publisher=publisher,
            clock=time.time,
        )

    async def start(self) -> None:
        """Bind free ports and serve."""
        self._sim.start()
        status = self._sim.status()
        self.endpoint = f"{status.endpoint},{status.replay_endpoint}"
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        """Close everything."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._sim.close()

    async def _complete(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        tokens = await self._tokens(body)
        before = self._sim.counts["hit_tokens"]
        output = [self._rng.randrange(1000) for _ in range(int(body.get("max_tokens", 16)))]
        self._sim.submit(Request(tokens=tokens, output=output, cache_salt=body.get("cache_salt")))
        self._sim.drain()
        cached = self._sim.counts["hit_tokens"] - before
        text = " ".join(map(str, output))
        choice = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": len(output),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return web.json_response({"model": self._model, "choices": [{"index": 0, **choice}], "usage": usage})

    async def _tokens(self, body: dict[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return prompt
        if self._tokenizers is None:
            raise web.HTTPBadRequest(text="this engine has no tokenizer: send token ids as the prompt")
        if "messages" in body:
            return (await self._tokenizers.encode_chat(self._model, ChatInput(messages=body["messages"]))).list()
        return (await self._tokenizers.encode(self._model, str(prompt))).list()
