"""Look at one engine: what it says of itself, its sockets, and the events that it sends meanwhile.

What is wrong with what was seen is said by :mod:`kvatlas.deploy.doctor.engine_checks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import msgspec
import zmq

from kvatlas.bridge.engines.facts import EngineFacts, EventSource
from kvatlas.bridge.engines.http import ask_engine
from kvatlas.bridge.engines.replay_client import replay
from kvatlas.bridge.engines.subscriber import Subscriber
from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.events import Kind, Limits, Stored, Tier

_REPLAY_MESSAGES: Final = 2_000
_MESSAGES: Final = 10_000


class SourceSeen(msgspec.Struct):
    """What was seen of one rank's sockets.

    Attributes:
        source: the sockets.
        connected: whether the live socket took a connection.
        replayed: messages that the replay socket gave; None where it did not answer.
        sequences: sequence numbers seen live, in order.
        unreadable: reasons of payloads that could not be read.
        clock_seconds: the newest message's clock less ours, None before the first.
        bare_offload: stores on an offload tier that carry no tokens.
        described_offload: such stores with tokens.
        paired, plain: stores on the GPU whose tokens are pairs, and whose are not.
        groups: KV-cache group -> its attention kind, None where events do not say it.
        known_as: pod id by which the scorer knows it, empty where that is not known.
    """

    source: EventSource
    connected: bool = False
    replayed: int | None = None
    sequences: list[int] = []
    unreadable: list[str] = []
    clock_seconds: float | None = None
    bare_offload: int = 0
    described_offload: int = 0
    paired: int = 0
    plain: int = 0
    groups: dict[int, Kind | None] = {}
    known_as: str = ""

    def heard(self, sequence: int, payload: bytes, engine: str, now: float) -> None:
        """Note one live message."""
        if len(self.sequences) < _MESSAGES:
            self.sequences.append(sequence)
        timestamp = self.read(payload, engine)
        if timestamp:
            self.clock_seconds = timestamp - now

    def read(self, payload: bytes, engine: str) -> float:
        """Note what a message says; returns the engine's clock in it, 0 where there is none."""
        try:
            batch = adapter(engine)(payload, Limits())
        except KvatlasError as error:
            self.unreadable.append(str(error))
            return 0.0
        self.unreadable += [rejected.reason for rejected in batch.rejected]
        for event in batch.events:
            if isinstance(event, Stored):
                self._stored(event)
        return batch.timestamp

    def _stored(self, event: Stored) -> None:
        if event.tier is Tier.GPU:
            self.groups[event.group] = event.kind if event.kind is not None else self.groups.get(event.group)
            self.paired += bool(event.ahead)
            self.plain += bool(event.tokens and not event.ahead)
        elif event.tier is not Tier.UNKNOWN:
            self.described_offload += bool(event.tokens)
            self.bare_offload += not event.tokens


class EngineSeen(msgspec.Struct):
    """All that was seen of one engine.

    Attributes:
        error: why its API did not answer, empty where it did.
        probed: whether it has computed a prompt of whole blocks while its sockets were listened to.
        over_tokens: of the probe, how many tokens fewer were cached than predicted; None where that is not known.
    """

    url: str
    facts: EngineFacts | None = None
    error: str = ""
    sources: list[SourceSeen] = []
    probed: bool = False
    over_tokens: int | None = None


@asynccontextmanager
async def look(url: str, timeout_seconds: float) -> AsyncIterator[EngineSeen]:
    """Ask an engine, and listen to its sockets until left."""
    seen = EngineSeen(url)
    try:
        seen.facts = await ask_engine(url, timeout_seconds)
    except KvatlasError as error:
        seen.error = str(error)
        yield seen
        return
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    seen.sources = [SourceSeen(source) for source in seen.facts.sources]
    engine = seen.facts.engine
    try:
        async with asyncio.TaskGroup() as group:
            for source in seen.sources:
                group.create_task(_reach(context, source, engine, timeout_seconds))
        async with AsyncExitStack() as stack:
            for source in seen.sources:
                if source.connected:
                    await stack.enter_async_context(_listening(context, source, engine, timeout_seconds))
            yield seen
    finally:
        context.destroy(linger=0)


@asynccontextmanager
async def _listening(
    context: zmq.Context[zmq.Socket[bytes]], seen: SourceSeen, engine: str, timeout_seconds: float
) -> AsyncIterator[None]:
    """Note live messages until left; entered once the engine has taken the subscription, if it does in time."""
    there = asyncio.Event()

    def receive(frames: list[bytes]) -> None:
        if len(frames) == 3 and len(frames[1]) == 8:
            seen.heard(int.from_bytes(frames[1], "big"), frames[2], engine, time.time())

    subscriber = Subscriber(context, seen.source.live, receive, reconnected=there.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await there.wait()
        yield
    finally:
        subscriber.close()


async def _reach(
    context: zmq.Context[zmq.Socket[bytes]], seen: SourceSeen, engine: str, timeout_seconds: float
) -> None:
    """Try the live port, and read the newest messages of the replay buffer."""
    host, _, port = seen.source.live.partition("://")[2].rpartition(":")
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(timeout_seconds):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.close()
        seen.connected = True
    if not seen.source.replay:
        return
    count = 0

    def take(_topic: bytes | None, _sequence: int, payload: bytes) -> bool:
        nonlocal count
        count += 1
        seen.read(payload, engine)
        return count < _REPLAY_MESSAGES

    whole, newest = await replay(
        context, seen.source.replay, 0, take, timeout_seconds=timeout_seconds, piece=_REPLAY_MESSAGES + 1
    )
    seen.replayed = count if whole or newest is not None else None
