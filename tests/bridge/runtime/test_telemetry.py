"""Metrics and health under callers that ask badly, never finish, never read, or ask without end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.exposition import generate_latest

from kvatlas.bridge.runtime.telemetry import Telemetry


@contextlib.asynccontextmanager
async def _served(registry: CollectorRegistry | None = None) -> AsyncIterator[Telemetry]:
    telemetry = Telemetry("127.0.0.1:0", registry=registry or CollectorRegistry())
    await telemetry.start()
    try:
        yield telemetry
    finally:
        await telemetry.stop()


Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _opened(telemetry: Telemetry, data: bytes) -> Link:
    reader, writer = await asyncio.open_connection("127.0.0.1", telemetry.port, limit=2**26)
    writer.write(data)
    return reader, writer


async def _asked(telemetry: Telemetry, path: str) -> bytes:
    reader, writer = await _opened(telemetry, f"GET {path} HTTP/1.1\r\n\r\n".encode())
    async with asyncio.timeout(90):
        found = await reader.read()
    writer.close()
    return found


async def _ends(link: Link) -> None:
    """Wait for the end of a connection, whatever it answered."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(90):
            await link[0].read()
    link[1].close()


def _large(families: int, series: int = 1, name: str = "pod-") -> CollectorRegistry:
    registry = CollectorRegistry()
    for number in range(families):
        gauge = Gauge(f"m{number}", "text", ["pod"], registry=registry)
        for pod in range(series):
            gauge.labels(f"{name}{pod}").set(pod)
    return registry


async def test_the_page_is_as_prometheus_writes_it() -> None:
    registry = _large(5, 3)
    async with _served(registry) as telemetry:
        answer = await _asked(telemetry, "/metrics?x=1")
    assert answer.partition(b"\r\n\r\n")[2] == generate_latest(registry)


async def test_half_requests_are_closed_the_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """More connections than may be open take no more files, and health is told all the same."""
    monkeypatch.setattr("kvatlas.bridge.runtime.telemetry._MOST_CONNECTIONS", 10)
    monkeypatch.setattr("kvatlas.bridge.runtime.telemetry._REQUEST_SECONDS", 600.0)
    async with _served() as telemetry:
        links = [await _opened(telemetry, b"GET /healthz") for _ in range(40)]
        assert b"200 OK" in await _asked(telemetry, "/healthz")
        for link in links[:30]:
            await _ends(link)
        assert not links[-1][0].at_eof()
        for _, writer in links[30:]:
            writer.close()


async def test_half_requests_are_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvatlas.bridge.runtime.telemetry._REQUEST_SECONDS", 0.2)
    async with _served() as telemetry:
        for link in [await _opened(telemetry, b"GET") for _ in range(5)]:
            await _ends(link)


async def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that nobody takes is not kept: its connection ends, and with it what it holds."""
    monkeypatch.setattr("kvatlas.bridge.runtime.telemetry._REQUEST_SECONDS", 1.0)
    whole = 20_000 * 1_000  # more than the system's buffers of both sides take
    async with _served(_large(1, 20_000, "x" * 1_000)) as telemetry:
        reader, writer = await asyncio.open_connection("127.0.0.1", telemetry.port, limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        while telemetry.unfinished == 0:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(90):
            while telemetry.unfinished:
                await asyncio.sleep(0.01)
            with contextlib.suppress(ConnectionError):
                assert len(await reader.read()) < whole
        writer.close()


async def test_a_head_without_end_is_refused() -> None:
    async with _served() as telemetry:
        reader, writer = await _opened(telemetry, b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 20_000)
        assert b"431" in await asyncio.wait_for(reader.readline(), 90)
        writer.close()


class _Slow:
    """Families that each take a while."""

    def __init__(self) -> None:
        self.made = 0

    def collect(self) -> Iterator[Metric]:
        for number in range(20):
            time.sleep(0.005)
            self.made += 1
            yield Metric(f"slow{number}", "text", "gauge")


async def test_pages_asked_for_without_end_hold_nobody_up() -> None:
    """Fifty ask at once: all get one page that is made after they asked; between two families the loop goes on."""
    slow = _Slow()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(slow)
    slow.made = 0
    seen: list[int] = []

    async def look() -> None:
        while True:
            seen.append(slow.made)
            await asyncio.sleep(0)

    async with _served(registry) as telemetry:
        looking = asyncio.create_task(look())
        answers = await asyncio.gather(*(_asked(telemetry, "/metrics") for _ in range(50)))
        looking.cancel()
    assert all(b"slow19" in answer for answer in answers)
    assert slow.made <= 20 * 3
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 1
