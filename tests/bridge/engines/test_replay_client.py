"""Replay requests against real sockets: both reply layouts, engines that drop, engines that say nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import zmq

from kvatlas.bridge.engines.publisher import END_OF_REPLAY, EnginePublisher
from kvatlas.bridge.engines.replay_client import replay


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    """A ZMQ context of one test."""
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def _engine(layout: Literal["topic", "bare"] = "topic", **options: Any) -> EnginePublisher:
    engine = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@a@m", replay_layout=layout, **options)
    engine.start()
    return engine


async def _ask(
    context: zmq.Context[Any], address: str | None, start: int, **options: Any
) -> tuple[bool, int | None, list[tuple[bytes | None, int, bytes]]]:
    assert address is not None
    got: list[tuple[bytes | None, int, bytes]] = []
    limit = options.pop("stop_after", None)

    def take(topic: bytes | None, sequence: int, payload: bytes) -> bool:
        got.append((topic, sequence, payload))
        return limit is None or len(got) < limit

    options = {"timeout_seconds": 30.0, "piece": 1000, **options}
    complete, newest = await replay(context, address, start, take, **options)
    return complete, newest, got


@pytest.mark.parametrize(("layout", "topic"), [("topic", b"kv@a@m"), ("bare", None)])
async def test_both_layouts_are_read(
    context: zmq.Context[Any], layout: Literal["topic", "bare"], topic: bytes | None
) -> None:
    """Replies with and without a topic frame give the same messages, and the end marker ends them."""
    with _engine(layout) as engine:
        for number in range(5):
            engine.publish_raw(b"payload-%d" % number)
        complete, newest, got = await _ask(context, engine.replay_endpoint, 2)
    assert (complete, newest) == (True, 4)
    assert got == [(topic, number, b"payload-%d" % number) for number in (2, 3, 4)]


@pytest.mark.parametrize("layout", ["topic", "bare"])
async def test_nothing_to_replay_is_complete(context: zmq.Context[Any], layout: Literal["topic", "bare"]) -> None:
    """An end marker alone is an answer: there is nothing from there on."""
    with _engine(layout) as engine:
        engine.publish_raw(b"x")
        assert await _ask(context, engine.replay_endpoint, 7) == (True, None, [])


async def test_an_old_start_begins_at_the_oldest(context: zmq.Context[Any]) -> None:
    """What the buffer no longer has is left out without a word, so sequences tell."""
    with _engine(buffer_steps=3) as engine:
        for number in range(10):
            engine.publish_raw(b"%d" % number)
        complete, _, got = await _ask(context, engine.replay_endpoint, 0)
    assert complete
    assert [sequence for _, sequence, _ in got] == [7, 8, 9]


async def test_a_reader_that_has_enough_is_complete(context: zmq.Context[Any]) -> None:
    """Reading ends where the reader says so."""
    with _engine() as engine:
        for number in range(10):
            engine.publish_raw(b"%d" % number)
        complete, newest, got = await _ask(context, engine.replay_endpoint, 0, stop_after=4)
    assert (complete, newest, len(got)) == (True, 3, 4)


async def test_a_piece_ends_early_and_is_not_complete(context: zmq.Context[Any]) -> None:
    """A long replay is read in pieces; a piece does not claim that it saw the end."""
    with _engine() as engine:
        for number in range(10):
            engine.publish_raw(b"%d" % number)
        complete, newest, got = await _ask(context, engine.replay_endpoint, 0, piece=6)
    assert (complete, newest, len(got)) == (False, 5, 6)


async def test_no_engine_is_no_answer(context: zmq.Context[Any]) -> None:
    """A socket that nobody serves ends the try after the time out."""
    with zmq.Context() as other:
        silent = other.socket(zmq.ROUTER)
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        assert await _ask(context, f"tcp://127.0.0.1:{port}", 0, timeout_seconds=0.2) == (False, None, [])
        silent.close(linger=0)


def _serve(replies: Callable[[], list[list[bytes]]]) -> tuple[str, threading.Thread]:
    """Answer one request with the given frames (behind identity and the empty frame)."""
    context: zmq.Context[Any] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")

    def work() -> None:
        if router.poll(90_000):
            identity = router.recv_multipart()[0]
            for frames in replies():
                router.send_multipart([identity, *frames])
        router.close(linger=1000)
        context.term()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return f"tcp://127.0.0.1:{port}", thread


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


@pytest.mark.parametrize("bare", [True, False])
async def test_a_lossy_replay_without_its_end_is_not_complete(context: zmq.Context[Any], *, bare: bool) -> None:
    """Dropped replies leave holes in what is given, and a dropped end marker ends the try by silence."""
    head = [b""] if bare else [b"", b"t"]
    address, thread = _serve(lambda: [[*head, _number(n), b"%d" % n] for n in (0, 1, 4, 5)])
    complete, newest, got = await _ask(context, address, 0, timeout_seconds=3.0)
    await asyncio.to_thread(thread.join)
    assert (complete, newest) == (False, 5)
    assert [sequence for _, sequence, _ in got] == [0, 1, 4, 5]


async def test_frames_that_are_no_reply_are_passed_over(context: zmq.Context[Any]) -> None:
    """Too few frames and a sequence of another size say nothing."""
    replies = [[b"junk"], [b"", b"x"], [b"", b"t", b"short", b"p"], [b"", b"t", _number(3), b"p"]]
    address, thread = _serve(lambda: [*replies, [b"", b"", END_OF_REPLAY, b""]])
    complete, newest, got = await _ask(context, address, 0)
    await asyncio.to_thread(thread.join)
    assert (complete, newest, got) == (True, 3, [(b"t", 3, b"p")])


async def test_a_replay_waits_for_room(context: zmq.Context[Any]) -> None:
    """While the buffer is full nothing is read; then it goes on."""
    open_at = time.monotonic() + 0.3
    with _engine() as engine:
        engine.publish_raw(b"x")
        started = time.monotonic()
        complete, _, got = await _ask(context, engine.replay_endpoint, 0, room=lambda: time.monotonic() >= open_at)
    assert complete
    assert len(got) == 1
    assert time.monotonic() - started >= 0.25
