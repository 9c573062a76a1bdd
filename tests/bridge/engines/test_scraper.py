"""Reading of engines' metrics: what comes, and what is said of one that does not answer."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from kvatlas.bridge.engines.engine_metrics import EngineLoad
from kvatlas.bridge.engines.scraper import LoadPage, Scraper
from tests.waiting import until


async def test_an_engine_that_went_is_told_from_one_that_answers_otherwise() -> None:
    """Nobody listens: refused, for every rank behind the page; an error in answer to a question is none."""
    status = 200

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="vllm:num_requests_running 3\n", status=status)

    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
    reported: dict[str, EngineLoad] = {}
    counted: list[str] = []
    refused: list[str] = []
    scraper = Scraper(
        lambda: [LoadPage("a", url), LoadPage("b", url)],
        lambda name, load, _asked: reported.__setitem__(name, load),
        counted.append,
        every_seconds=0.01,
        clock=time.monotonic,
        refused=refused.append,
    )
    running = asyncio.create_task(scraper.run())
    try:
        await until(lambda: reported.keys() == {"a", "b"})
        assert reported["a"].running == 3.0
        status = 500
        await until(lambda: "failed" in counted)
        assert refused == []
        await runner.cleanup()
        await until(lambda: {"a", "b"} <= set(refused))
    finally:
        running.cancel()
        await asyncio.wait([running])
