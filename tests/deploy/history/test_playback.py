"""Playback at the recorded pace, or a multiple of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
import zmq

from kvatlas.bridge.model import topics
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.history.playback import Playback


async def recorded(*at_ms: int) -> AsyncIterator[Record]:
    """Messages that the bridge received at these times."""
    for number, moment in enumerate(at_ms):
        headers = (
            (topics.H_SEQUENCE, str(number).encode()),
            (topics.H_RECEIVE_NS, str((1_000_000 + moment) * 1_000_000).encode()),
        )
        yield Record(topics.EVENTS, 0, number, 0, b"p", b"%d" % number, headers)


@pytest.mark.parametrize(
    ("speed", "recorded_ms", "least"), [(1.0, 300, 0.3), (3_000.0, 600_000, 0.2), (0.0, 600_000, 0.0)]
)
async def test_the_pace_is_the_recorded_one_times_the_speed(speed: float, recorded_ms: int, least: float) -> None:
    """Playback takes the recorded time divided by the speed, and at speed 0 no longer than sending takes."""
    context = zmq.Context.instance()
    with context.socket(zmq.SUB) as subscriber, Playback("zmq://127.0.0.1:*", speed) as playback:
        subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        subscriber.connect(playback.endpoint)
        await playback.wait_for_subscriber()
        began = time.monotonic()
        assert await playback.send(recorded(0, recorded_ms // 2, recorded_ms)) == 3
        took = time.monotonic() - began
        assert [subscriber.recv_multipart()[2] for _ in range(3)] == [b"0", b"1", b"2"]
    assert least <= took < 60
