"""A picker beside the part that it asks: which of the two waits for which."""

from __future__ import annotations

import asyncio

import pytest

from kvatlas.bridge.errors import KvatlasError
from kvatlas.deploy.processes.picking import WithPicker
from kvatlas.scorer.gateway.options import PickerSettings


class SlowPart:
    """A part whose start the test ends."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.begin = asyncio.Event()
        self.error: Exception | None = None
        self.started = self.ran = self.stopped = False

    async def start(self) -> None:
        await self.begin.wait()
        if self.error is not None:
            raise self.error
        self.started = True

    async def run_until(self, stop: asyncio.Event) -> None:
        assert self.started, "run before it was started"
        self.ran = True
        await stop.wait()

    async def stop(self) -> None:
        self.stopped = True


def both(part: SlowPart) -> WithPicker:
    settings = PickerSettings(
        listen="127.0.0.1:0", endpoints=["127.0.0.1:9,pod=a"], scrape_seconds=0.0, drain_seconds=0.0
    )
    return WithPicker(settings, None, part)  # type: ignore[arg-type]  # load alone


async def test_picker_is_ready_before_the_other_part_has_started() -> None:
    part, stop = SlowPart(), asyncio.Event()
    service = both(part)
    await service.start()
    running = asyncio.create_task(service.run_until(stop))
    await asyncio.wait_for(service.ready.wait(), 90)
    assert not part.started
    part.begin.set()
    async with asyncio.timeout(90):
        while not part.ran:
            await asyncio.sleep(0)
    stop.set()
    await asyncio.wait_for(running, 90)
    await service.stop()
    assert part.stopped


async def test_stop_does_not_wait_for_a_start() -> None:
    part, stop = SlowPart(), asyncio.Event()
    service = both(part)
    await service.start()
    running = asyncio.create_task(service.run_until(stop))
    stop.set()
    await asyncio.wait_for(running, 90)
    await asyncio.wait_for(service.stop(), 90)
    assert not part.ran


async def test_part_that_cannot_start_ends_the_process() -> None:
    part = SlowPart()
    part.error = KvatlasError("no")
    part.begin.set()
    service = both(part)
    await service.start()
    with pytest.raises(KvatlasError, match="no"):
        await asyncio.wait_for(service.run_until(asyncio.Event()), 90)
    await service.stop()
