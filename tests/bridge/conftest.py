"""Streams of a bridge over real sockets, with a log in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.ingest.streams import EngineStreams
from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.sink import QueuedRecord
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.tasks import Background


class MemoryLog:
    """Keeps what is sent; acknowledges at once, or when told to."""

    def __init__(self) -> None:
        self.records: list[tuple[str, QueuedRecord]] = []
        self.holding = self.full = False
        self._acknowledged = 0

    def room(self, _key: bytes) -> bool:
        """Whether it takes more."""
        return not self.full

    def send(self, topic: str, _partition: int, item: QueuedRecord) -> None:
        """Take a record."""
        self.records.append((topic, item))
        if not self.holding:
            self.acknowledge()

    def acknowledge(self) -> None:
        """Acknowledge all."""
        self.holding = False
        while self._acknowledged < len(self.records):
            offset, self._acknowledged = self._acknowledged, self._acknowledged + 1
            item = self.records[offset][1]
            if item.acknowledged is not None:
                item.acknowledged(item, offset)

    def messages(self, pod: str) -> list[tuple[int, int]]:
        """Return (incarnation, sequence) of a pod's messages, in order."""
        found = [dict(item.headers) for _, item in self.records if item.key == pod.encode()]
        return [(int(h["incarnation"]), int(h["sequence"])) for h in found if h.get("content_type") == b"engine"]

    def controls(self, pod: str) -> list[records.Control]:
        """Return a pod's turns, in order."""
        found = [item for _, item in self.records if item.key == pod.encode()]
        return [
            records.decode(records.Control, item.value)
            for item in found
            if dict(item.headers).get("content_type") == b"control"
        ]

    def pod(self, name: str) -> records.PodRecord:
        """Return a pod's newest record."""
        key = pod_ids.pod_key(pod_ids.WRITER_BRIDGE, name)
        return records.decode(records.PodRecord, [item.value for _, item in self.records if item.key == key][-1])


class Bridge:
    """The streams of a bridge, which are closed at the end."""

    def __init__(self) -> None:
        self.log = MemoryLog()
        self._made: list[EngineStreams] = []
        self.share(BridgeSettings(replay_timeout_seconds=0.5))

    def share(self, settings: BridgeSettings) -> Shared:
        """Begin anew with other settings, on the same log."""
        clock = iter(range(10**18, 2 * 10**18, 10**6))  # every look a millisecond later
        self.streams = EngineStreams(settings, self.log, lambda: next(clock), Background())
        self._made.append(self.streams)
        return self.shared

    @property
    def shared(self) -> Shared:
        """What the sessions share."""
        return self.streams.shared

    @property
    def endpoints(self) -> dict[str, EngineEndpoint]:
        """All endpoints."""
        return self.streams.endpoints

    def open(self, spec: EngineSpec) -> EngineEndpoint:
        """Hear an endpoint."""
        return self.streams.open(spec)

    def change(self, **settings: Any) -> Shared:
        """Begin anew with some settings changed."""
        return self.share(msgspec.structs.replace(self.shared.settings, **settings))

    async def close(self) -> None:
        """Close what was made."""
        for streams in self._made:
            await streams.close()
            streams.wires.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something."""
        async with asyncio.timeout(90):
            while not condition():
                for endpoint in self.endpoints.values():
                    endpoint.retry()
                await asyncio.sleep(0.01)


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    """A bridge of one test."""
    bridge = Bridge()
    yield bridge
    await bridge.close()
