"""Where sessions were seen: what the resolve agent gathers of them, from events as they are and stripped."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.bridge.ingest.strip import KnownBlocks, Stripper
from kvatlas.bridge.model import records
from kvatlas.bridge.model.events import Limits
from kvatlas.bridge.model.sessions import session_hash
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.effects import Effects, Sighting
from kvatlas.streams.resolve.message import Message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver


def stored(number: int, session: str | None = None, size: int = 16, medium: str = "GPU") -> dict[str, Any]:
    """A block of its own, by a session."""
    event = {
        "type": "BlockStored",
        "block_hashes": [number],
        "parent_block_hash": None,
        "token_ids": list(range(number, number + size)),
        "block_size": size,
        "lora_id": None,
        "medium": medium,
    }
    return event if session is None else event | {"session_id": session}


def payload(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode((1.0, events, None))


class Stream:
    """Messages of pods through one resolver, as they are or stripped."""

    def __init__(self, content: str) -> None:
        self.effects = Effects(1)
        self._content = content
        self._view = DictView()
        self._resolver = Resolver(ResolveOptions(), 1, lambda: 7)
        self._stripper = Stripper("vllm", "m", 16, Limits(), KnownBlocks())
        self._sequences: dict[str, int] = {}

    def send(self, pod: str, *events: dict[str, Any], receive_ns: int) -> None:
        value = payload(*events)
        if self._content == "keys":
            value = records.encode(self._stripper.strip(value).batch)
        self.raw(pod, value, receive_ns)

    def raw(self, pod: str, value: bytes, receive_ns: int) -> None:
        sequence = self._sequences[pod] = self._sequences.get(pod, -1) + 1
        message = Message(
            pod=pod,
            value=value,
            content=self._content,
            sequence=sequence,
            incarnation=1,
            model="m",
            receive_ns=receive_ns,
        )
        self._resolver.apply(self._view, message, self.effects)
        assert not self.effects.dead


@pytest.mark.parametrize("content", ["engine", "keys"])
def test_the_last_pod_of_each_session_is_gathered(content: str) -> None:
    """By hash, with the time at the bridge; stores that name none, and those elsewhere than on the GPU, say nothing."""
    stream = Stream(content)
    stream.send("p", stored(1, "s"), stored(2, "t"), stored(3), receive_ns=10)
    stream.send("q", stored(4, "s"), stored(5, "u", medium="CPU"), receive_ns=20)
    assert stream.effects.sessions == {
        session_hash("s"): Sighting("q", 20),
        session_hash("t"): Sighting("p", 10),
    }


@pytest.mark.parametrize("content", ["engine", "keys"])
def test_a_stream_without_sessions_gathers_nothing(content: str) -> None:
    stream = Stream(content)
    stream.send("p", stored(1), stored(2), receive_ns=10)
    assert stream.effects.sessions == {}


def test_a_session_of_an_event_that_is_applied_in_parts_is_gathered() -> None:
    """A store of many blocks is cut; each part is of the same session."""
    stream = Stream("engine")
    event = stored(1, "s") | {"block_hashes": list(range(5_000)), "token_ids": list(range(80_000))}
    stream.send("p", event, receive_ns=10)
    assert stream.effects.sessions == {session_hash("s"): Sighting("p", 10)}


def test_what_cannot_be_keyed_still_says_whose_it_is() -> None:
    """A stripped store without keys is of its session all the same; the name itself is nowhere."""
    stripped = Stripper("vllm", "m", 16, Limits(), KnownBlocks()).strip(payload(stored(1, "a name", size=8)))
    (event,) = stripped.batch.events
    assert isinstance(event, records.KeyedStored)
    assert (event.keys_per_block, event.session) == (0, session_hash("a name"))
    assert b"a name" not in records.encode(stripped.batch)
    stream = Stream("keys")
    stream.raw("p", records.encode(stripped.batch), 10)
    assert stream.effects.sessions == {session_hash("a name"): Sighting("p", 10)}


def test_a_stripped_session_that_is_no_hash_is_left_out() -> None:
    """The block is stored; nothing long goes on."""
    stream = Stream("keys")
    (event,) = Stripper("vllm", "m", 16, Limits(), KnownBlocks()).strip(payload(stored(1, "s"))).batch.events
    assert isinstance(event, records.KeyedStored)
    odd = msgspec.structs.replace(event, session="x" * 100_000)
    stream.raw("p", records.encode(records.KeyedBatch(timestamp=1.0, events=[odd])), 10)
    assert stream.effects.sessions == {}
    assert stream.effects.updates == 1


def test_effects_that_are_taken_over_bring_their_sessions() -> None:
    effects, other = Effects(1), Effects(1)
    effects.sessions["a" * 16] = Sighting("p", 1)
    other.sessions["a" * 16] = Sighting("q", 2)
    effects.absorb(other)
    assert effects.sessions == {"a" * 16: Sighting("q", 2)}
