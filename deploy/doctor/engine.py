"""Checks of one engine: what it says of itself, its sockets, and the events that it sends meanwhile.

:func:`look` gathers, :func:`judge` decides; the second is pure, so that every misconfiguration has a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import zmq
import zmq.asyncio

from kvatlas.bridge.engines.facts import EngineFacts, EventSource
from kvatlas.bridge.engines.http import ask_engine
from kvatlas.bridge.engines.identity import parse_topic
from kvatlas.bridge.engines.replay_client import replay
from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.events import Limits, Stored, Tier
from kvatlas.deploy.doctor.findings import Finding, State

_CONNECT_SECONDS: Final = 3.0
_CLOCK_SECONDS: Final = 5.0
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
    """

    source: EventSource
    connected: bool = False
    replayed: int | None = None
    sequences: list[int] = []
    unreadable: list[str] = []
    clock_seconds: float | None = None
    bare_offload: int = 0
    described_offload: int = 0

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
            if isinstance(event, Stored) and event.tier not in (Tier.GPU, Tier.UNKNOWN):
                if event.tokens:
                    self.described_offload += 1
                else:
                    self.bare_offload += 1
        return batch.timestamp


class EngineSeen(msgspec.Struct):
    """All that was seen of one engine; ``error`` where its API did not answer."""

    url: str
    facts: EngineFacts | None = None
    error: str = ""
    sources: list[SourceSeen] = []


@asynccontextmanager
async def look(url: str, *, timeout_seconds: float = _CONNECT_SECONDS) -> AsyncIterator[EngineSeen]:
    """Ask an engine, and listen to its sockets until left."""
    seen = EngineSeen(url)
    try:
        seen.facts = await ask_engine(url, timeout_seconds)
    except KvatlasError as error:
        seen.error = str(error)
        yield seen
        return
    context = zmq.asyncio.Context()
    seen.sources = [SourceSeen(source) for source in seen.facts.sources]
    engine = seen.facts.engine
    try:
        async with asyncio.TaskGroup() as group:
            for source in seen.sources:
                group.create_task(_reach(context, source, engine, timeout_seconds))
        tasks = [asyncio.create_task(_listen(context, source, engine)) for source in seen.sources if source.connected]
        try:
            yield seen
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        context.destroy(linger=0)


async def _reach(context: zmq.asyncio.Context, seen: SourceSeen, engine: str, timeout_seconds: float) -> None:
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

    shadow: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
    whole, newest = await replay(
        shadow, seen.source.replay, 0, take, timeout_seconds=timeout_seconds, piece=_REPLAY_MESSAGES + 1
    )
    seen.replayed = count if whole or newest is not None else None


async def _listen(context: zmq.asyncio.Context, seen: SourceSeen, engine: str) -> None:
    socket = context.socket(zmq.SUB)
    try:
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt_string(zmq.SUBSCRIBE, "")
        socket.connect(seen.source.live)
        while True:
            frames = await socket.recv_multipart()
            if len(frames) == 3 and len(frames[1]) == 8:
                seen.heard(int.from_bytes(frames[1], "big"), frames[2], engine, time.time())
    finally:
        socket.close(linger=0)


def judge(seen: EngineSeen, block_size_tokens: int | None = None) -> list[Finding]:
    """Return the findings of one engine.

    Args:
        seen: what was seen of it.
        block_size_tokens: of the index, None where no scorer said it.
    """
    facts, url = seen.facts, seen.url
    if facts is None:
        return [Finding("api", url, "fail", seen.error)]
    named = f"{facts.engine} {facts.version or '(version not told)'}, serves {', '.join(facts.models) or 'no model'}"
    found = [Finding("api", url, "ok", named)]
    if not facts.sources:
        said = "events are off" if facts.knows_sources else "it does not tell where it publishes (vLLM before 0.31)"
        found.append(Finding("events", url, "fail" if facts.knows_sources else "skip", said))
    else:
        found.append(Finding("events", url, "ok", f"{len(facts.sources)} rank(s)"))
    found += _of_settings(facts, block_size_tokens)
    for source in seen.sources:
        found += _of_source(url, source)
    return found


def _of_settings(facts: EngineFacts, block_size_tokens: int | None) -> list[Finding]:
    url, found = facts.url, []
    if facts.prefix_caching is None:
        found.append(Finding("prefix-caching", url, "skip", "it does not tell"))
    else:
        on = facts.prefix_caching
        found.append(Finding("prefix-caching", url, "ok" if on else "fail", "on" if on else "off"))
    own = facts.block_size_tokens
    if own is None or block_size_tokens is None:
        found.append(Finding("block-size", url, "skip", f"the engine's: {own or 'not told'}, the index's: not told"))
    else:
        fits = own % block_size_tokens == 0 or block_size_tokens % own == 0
        said = f"{own} tokens in the engine, {block_size_tokens} in the index"
        found.append(Finding("block-size", url, "ok" if fits else "fail", said))
    if facts.engine == "sglang" and _older(facts.version, (0, 5, 23)):
        lacking = "salts and adapters" if _older(facts.version, (0, 5, 18)) else "adapters"
        found.append(Finding("names", url, "warn", f"SGLang {facts.version} does not publish {lacking}"))
    else:
        found.append(Finding("names", url, "ok", "salts and adapters are published"))
    return found


def _older(version: str, than: tuple[int, ...]) -> bool:
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    return bool(numbers) and numbers < than


def _of_source(url: str, seen: SourceSeen) -> list[Finding]:
    source = seen.source
    where = f"rank {source.rank}: "

    def finding(check: str, state: State, said: str) -> Finding:
        return Finding(check, url, state, where + said)

    found = [finding("live", "ok" if seen.connected else "fail", source.live)]
    if not source.replay:
        found.append(finding("replay", "warn", "none"))
    else:
        found.append(finding("replay", "ok", source.replay))
        answers = seen.replayed is not None
        said = f"{seen.replayed} messages in its buffer" if answers else f"{source.replay} does not answer"
        found.append(finding("replay-answers", "ok" if answers else "fail", said))
    named = parse_topic(source.topic.encode())
    found.append(finding("topic", "ok" if named else "warn", repr(source.topic)))
    if seen.unreadable:
        found.append(
            finding("readable", "fail", f"{len(seen.unreadable)} messages cannot be read: {seen.unreadable[0]}")
        )
    elif seen.sequences or seen.replayed:
        found.append(finding("readable", "ok", f"{len(seen.sequences) + (seen.replayed or 0)} messages read"))
    found += _of_stream(finding, seen)
    return found


def _of_stream(finding: Callable[[str, State, str], Finding], seen: SourceSeen) -> list[Finding]:
    found: list[Finding] = []
    if len(seen.sequences) > 1:
        holes = sum(later - sooner - 1 for sooner, later in zip(seen.sequences, seen.sequences[1:], strict=False))
        said = f"{len(seen.sequences)} live messages, {holes} missing between them"
        found.append(finding("sequence", "ok" if holes == 0 else "fail", said))
    if seen.clock_seconds is not None:
        off = seen.clock_seconds
        state: State = "ok" if abs(off) < _CLOCK_SECONDS else "warn"
        found.append(finding("clock", state, f"{abs(off):.1f} s {'ahead' if off > 0 else 'behind'}"))
    if seen.bare_offload or seen.described_offload:
        state = "warn" if seen.bare_offload > seen.described_offload else "ok"
        said = f"{seen.described_offload} stores on offload tiers with tokens, {seen.bare_offload} without"
        found.append(finding("offload", state, said))
    return found
