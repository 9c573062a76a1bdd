"""A small router with the index as a library: every request goes to the engine that has most of its prompt.

    python -m kvatlas.deploy.examples.router [--tokenizer MODEL=DIR] [--requests N]

It starts stand-in engines and itself, sends conversations through, and prints the share of prompt tokens that was
cached, beside the same conversations sent round robin. With ``--serve`` it stays up for requests of yours.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import aiohttp
from aiohttp import web

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.examples.engine import StandInEngine
from kvatlas.deploy.sim import traffic
from kvatlas.deploy.sim.options import SimPlan
from kvatlas.scorer import Indexer
from kvatlas.scorer.scoring.answers import Scored
from kvatlas.scorer.tokenization.options import TokenizerSettings
from kvatlas.scorer.tokenization.pool import TokenizerPool

POD_HEADER: Final = "x-kvatlas-pod"
MATCHED_HEADER: Final = "x-kvatlas-matched-tokens"
#: Cached tokens that one request in flight outweighs.
BUSY_TOKENS: Final = 256
_MODEL: Final = "demo"


class Router:
    """Proxies OpenAI-style completions to the best engine.

    Args:
        indexer: a started indexer that reads the engines' events.
        engines: pod id -> base URL.
        session: HTTP client towards the engines.
        precise: False sends requests round robin, for comparison.
    """

    def __init__(
        self, indexer: Indexer, engines: dict[str, str], session: aiohttp.ClientSession, *, precise: bool = True
    ) -> None:
        self._indexer = indexer
        self._engines = engines
        self._session = session
        self._precise = precise
        self._in_flight: Counter[str] = Counter()
        self._turns = itertools.count()

    def app(self) -> web.Application:
        """Return the web application."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/completions", self._proxy)
        app.router.add_post("/v1/chat/completions", self._proxy)
        return app

    async def _score(self, body: dict[str, Any]) -> Scored | None:
        """Score a request; None when it cannot be scored, which is no reason not to serve it."""
        model, salt, pods = body.get("model", ""), body.get("cache_salt"), list(self._engines)
        try:
            if "messages" in body:
                return await self._indexer.score_chat(body["messages"], model, cache_salt=salt, pods=pods)
            prompt = body.get("prompt", "")
            if isinstance(prompt, list):
                return await self._indexer.score_tokens(prompt, model, cache_salt=salt, pods=pods)
            return await self._indexer.score_prompt(prompt, model, cache_salt=salt, pods=pods)
        except KvatlasError:
            return None

    def _ranked(self, scored: Scored | None) -> list[tuple[str, int]]:
        """Return (pod, matched tokens), best first."""
        turn = next(self._turns)
        pods = list(self._engines)
        pods = pods[turn % len(pods) :] + pods[: turn % len(pods)]  # equal pods take turns
        if scored is None or not self._precise:
            return [(pod, 0) for pod in pods]
        matched = {pod: score.matched_tokens for pod, score in scored.scores.items()}
        worth = {pod: matched.get(pod, 0) - BUSY_TOKENS * self._in_flight[pod] for pod in pods}
        return [(pod, matched.get(pod, 0)) for pod in sorted(pods, key=lambda pod: -worth[pod])]

    async def _proxy(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        for pod, matched in self._ranked(await self._score(body)):
            self._in_flight[pod] += 1
            try:
                async with self._session.post(self._engines[pod] + request.path, json=body) as answer:
                    return await self._relay(request, answer, pod, matched)
            except aiohttp.ClientConnectorError:
                continue  # nothing was sent yet, so the next best engine may have it
            finally:
                self._in_flight[pod] -= 1
        raise web.HTTPServiceUnavailable(text="no engine can be reached")

    @staticmethod
    async def _relay(
        request: web.Request, answer: aiohttp.ClientResponse, pod: str, matched: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status)
        response.content_type = answer.content_type
        response.headers[POD_HEADER], response.headers[MATCHED_HEADER] = pod, str(matched)
        await response.prepare(request)
        async for piece in answer.content.iter_any():  # streamed answers pass as they come
            await response.write(piece)
        await response.write_eof()
        return response


@asynccontextmanager
async def running(
    pods: int, pool: TokenizerPool | None = None, *, model: str = _MODEL, precise: bool = True, port: int = 0
) -> AsyncIterator[tuple[str, list[StandInEngine]]]:
    """Run engines and a router; gives the router's URL and the engines."""
    engines = [StandInEngine(f"pod-{number}", model, pool) for number in range(pods)]
    try:
        for engine in engines:
            await engine.start()
        async with (
            Indexer(engines=[engine.endpoint for engine in engines], tokenizers=pool) as indexer,
            aiohttp.ClientSession() as session,
        ):
            router = Router(indexer, {engine.pod: engine.url for engine in engines}, session, precise=precise)
            runner = web.AppRunner(router.app())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            try:
                host, bound = runner.addresses[0][:2]
                yield f"http://{host}:{bound}", engines
            finally:
                await runner.cleanup()
    finally:
        for engine in engines:
            await engine.stop()


async def cached_share(pods: int, requests: int, *, precise: bool) -> float:
    """Send conversations through a router and return the share of prompt tokens that the engines had cached."""
    settings = SimPlan(sessions=16, system_prompts=8, system_tokens=512, vocabulary=1000)
    total: Counter[str] = Counter()
    async with running(pods, precise=precise) as (url, _), aiohttp.ClientSession() as session:
        for request in itertools.islice(traffic.requests(settings), requests):
            body = {"model": _MODEL, "prompt": request.tokens, "max_tokens": 16, "cache_salt": request.cache_salt}
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                usage = (await answer.json())["usage"]
            total["prompt"] += usage["prompt_tokens"]
            total["cached"] += usage["prompt_tokens_details"]["cached_tokens"]
    return total["cached"] / total["prompt"]


async def _serve(pods: int, tokenizer: str, port: int) -> None:
    model = tokenizer.partition("=")[0] or _MODEL
    async with AsyncExitStack() as stack:
        pool = None
        if tokenizer:
            pool = await stack.enter_async_context(TokenizerPool(TokenizerSettings(models=(tokenizer,))))
        url, _ = await stack.enter_async_context(running(pods, pool, model=model, port=port))
        print(f"router on {url}/v1/completions", flush=True)
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pods", type=int, default=4, help="stand-in engines (default %(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="requests sent (default %(default)s)")
    parser.add_argument("--tokenizer", default="", help="MODEL=DIR: also take text, tokenized with tokenizer.json")
    parser.add_argument("--serve", action="store_true", help="stay up instead of sending requests")
    parser.add_argument("--port", type=int, default=8000, help="of the router, with --serve (default %(default)s)")
    args = parser.parse_args(argv)
    if args.serve:
        try:
            asyncio.run(_serve(args.pods, args.tokenizer, args.port))
        except (KvatlasError, OSError) as error:
            parser.exit(1, f"{error}\n")
        except KeyboardInterrupt:
            return
    for name, precise in (("round robin", False), ("by the index", True)):
        share = asyncio.run(cached_share(args.pods, args.requests, precise=precise))
        print(f"{name}: {share:.0%} of prompt tokens were cached")


if __name__ == "__main__":
    main()
