"""Scraper of engines' metrics pages, for pickers and bridges: each every so often, bounded in time, size and number."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import aiohttp

from kvatlas.bridge.engines.engine_metrics import EngineLoad, read_load
from kvatlas.bridge.runtime.tasks import end_tasks

_TIMEOUT_SECONDS: Final = 1.0
_MOST_BYTES: Final = 8 * 1024 * 1024
_AT_ONCE: Final = 64

log = logging.getLogger(__name__)


class LoadPage(NamedTuple):
    """Where the load of one engine, or one data-parallel rank of it, is read.

    Attributes:
        name: whose load it is, for who gets it.
        url: of the metrics page.
        rank: whose series count; None for all.
    """

    name: str
    url: str
    rank: int | None = None


class Scraper:
    """Keeps every engine's reported load.

    Args:
        pages: what to read now; a page of several ranks is read once.
        reported: gets name, load, and when it was asked for.
        counted: told what came of each read: ``ok``, ``empty`` or ``failed``.
        refused: gets the name of one whose address takes no connection: nobody listens there.
        every_seconds: between two reads of one page.
        clock: seconds.
    """

    def __init__(
        self,
        pages: Callable[[], Iterable[LoadPage]],
        reported: Callable[[str, EngineLoad, float], None],
        counted: Callable[[str], None],
        *,
        every_seconds: float,
        clock: Callable[[], float],
        refused: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._pages = pages
        self._reported = reported
        self._counted = counted
        self._refused = refused
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
                    wanted: dict[str, list[LoadPage]] = {}
                    for page in self._pages():
                        wanted.setdefault(page.url, []).append(page)
                    self._failed &= wanted.keys()
                    for url, pages in wanted.items():
                        # One that is still being read is slow or away: it is not asked twice.
                        if url not in self._reading:
                            self._begin(session, url, pages)
                    await asyncio.sleep(self._every)
            finally:
                await end_tasks(list(self._reading.values()))

    def _begin(self, session: aiohttp.ClientSession, url: str, pages: Sequence[LoadPage]) -> None:
        task = self._reading[url] = asyncio.get_running_loop().create_task(self._read(session, url, pages))
        task.add_done_callback(lambda _: self._reading.pop(url, None))

    async def _read(self, session: aiohttp.ClientSession, url: str, pages: Sequence[LoadPage]) -> None:
        async with self._gate:
            # What was given out while the page was made may not be in it: its age counts from the question.
            asked = self._clock()
            text: str | None = None
            try:
                text = await _text_of(session, url)
            except aiohttp.ClientConnectorError:
                for page in pages:
                    self._refused(page.name)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
                pass
        known = [(page.name, load) for page in pages if (load := _load_of(text or "", page, len(pages))).known]
        self._counted("ok" if known else "failed" if text is None else "empty")
        if known:
            self._failed.discard(url)
        elif url not in self._failed:
            self._failed.add(url)
            log.warning("%s: no load at %s", ", ".join(page.name for page in pages), url)
        for name, load in known:
            self._reported(name, load, asked)


def _load_of(text: str, page: LoadPage, sharing: int) -> EngineLoad:
    load = read_load(text, page.rank)
    if not load.known and sharing == 1:  # a rank with a page of its own may count itself as 0
        return read_load(text)
    return load


async def _text_of(session: aiohttp.ClientSession, url: str) -> str | None:
    async with session.get(url) as answer:
        if answer.status != 200:
            return None
        page = bytearray()
        async for piece in answer.content.iter_any():
            page += piece
            if len(page) > _MOST_BYTES:
                raise ValueError("metrics page too large")
    return page.decode("utf-8", "replace")
