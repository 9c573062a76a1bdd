"""Reads engines' metrics pages, each every so often, bounded in time, size and number at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import aiohttp

from kvatlas.bridge.runtime.tasks import end_tasks
from kvatlas.scorer.gateway import metrics
from kvatlas.scorer.picker.endpoints import Endpoint
from kvatlas.scorer.picker.engine_metrics import EngineLoad, read_load
from kvatlas.scorer.picker.load import EngineReport

_TIMEOUT_SECONDS: Final = 1.0
_MOST_BYTES: Final = 8 * 1024 * 1024
_AT_ONCE: Final = 64

log = logging.getLogger(__name__)


class Scraper:
    """Keeps every endpoint's reported load.

    Args:
        endpoints: the endpoints now.
        reported: gets address and report.
        every_seconds: between two reads of one endpoint.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        endpoints: Callable[[], Sequence[Endpoint]],
        reported: Callable[[str, EngineReport], None],
        *,
        every_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._endpoints = endpoints
        self._reported = reported
        self._every = every_seconds
        self._clock = clock
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._failed: set[str] = set()

    async def run(self) -> None:
        """Read until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            try:
                while True:
                    for endpoint in self._endpoints():
                        # One that is still being read is slow or away: it is not asked twice.
                        if endpoint.metrics and endpoint.address not in self._reading:
                            self._begin(session, endpoint)
                    await asyncio.sleep(self._every)
            finally:
                await end_tasks(list(self._reading.values()))

    def _begin(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        task = asyncio.get_running_loop().create_task(self._read(session, endpoint))
        self._reading[endpoint.address] = task
        task.add_done_callback(lambda _task, address=endpoint.address: self._reading.pop(address, None))  # type: ignore[misc]

    async def _read(self, session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
        async with self._gate:
            asked = self._clock()
            load: EngineLoad | None = None
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
                load = await _load_of(session, endpoint)
        if load is None or not load.known:
            metrics.SCRAPES.labels("failed" if load is None else "empty").inc()
            if endpoint.address not in self._failed:
                self._failed.add(endpoint.address)
                log.warning("%s: no load at %s", endpoint.address, endpoint.metrics)
            return
        self._failed.discard(endpoint.address)
        metrics.SCRAPES.labels("ok").inc()
        # What was given out while the page was made may not be in it: its age counts from the question.
        self._reported(
            endpoint.address, EngineReport(load.running or 0.0, load.waiting or 0.0, load.usage or 0.0, asked)
        )


async def _load_of(session: aiohttp.ClientSession, endpoint: Endpoint) -> EngineLoad | None:
    async with session.get(endpoint.metrics) as answer:
        if answer.status != 200:
            return None
        page = await _bounded(answer.content)
    text = page.decode("utf-8", "replace")
    rank = endpoint.pod.rpartition("@dp")[2] if "@dp" in endpoint.pod else ""
    load = read_load(text, int(rank)) if rank.isdecimal() else read_load(text)
    return load if load.known else read_load(text)  # a rank with a port of its own may count itself as 0


async def _bounded(content: Any) -> bytes:
    page = bytearray()
    async for piece in content.iter_any():
        page += piece
        if len(page) > _MOST_BYTES:
            raise ValueError("metrics page too large")
    return bytes(page)
