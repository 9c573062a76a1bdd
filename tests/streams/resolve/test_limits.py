"""Tests of what one message may cost: blocks, events, dead letters, and what is kept with one block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import LimitError
from kvatlas.bridge.model import records
from kvatlas.bridge.model.adapters.vllm import decode
from kvatlas.bridge.model.events import Limits, Removed, Stored, Tier
from kvatlas.bridge.model.pod_ids import pod_ref
from kvatlas.streams.resolve import bounds
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.slice import LETTERS, parts
from kvatlas.streams.resolve.stripped import stripped_parts

World = Callable[..., Any]


def test_a_message_over_its_limits_is_one_letter_and_makes_older_blocks_suspect(world: World, make: Any) -> None:
    """What it said is lost, as if the message were; the stream goes on behind it."""
    w = world(limits=Limits(keys_per_batch=10))
    [key] = w.keys(range(16))
    w.send("p", make.stored([1], make.run(0, 15), 16))
    w.send("p", make.removed(range(6)), make.removed(range(6)))
    assert len(w.dead) == 1
    assert "10" in w.dead[0].reason
    assert (w.suspect("p", key), w.pods["p"].lost) == (True, 1)
    w.send("p", make.stored([2], make.run(16, 31), 16, 1))
    assert w.counts["holes"] == 0
    assert not w.suspect("p", w.keys(range(32))[1])


@pytest.mark.parametrize("big", [False, True])
def test_events_are_counted_before_they_are_taken_apart(big: bool) -> None:
    """Also where the message is large, whatever its timestamp is encoded as."""
    count = 200_000 if big else 40
    for stamp in (1.0, 1):
        payload = msgspec.msgpack.encode((stamp, [None] * count, 0))
        with pytest.raises(LimitError, match="events"):
            decode(payload, Limits(events_per_batch=39))


def test_blocks_of_a_message_are_bounded_over_its_events() -> None:
    """A message may name as many blocks as the limit says, and not one more."""
    removed = {"type": "BlockRemoved", "block_hashes": [1, 2, 3]}
    payload = msgspec.msgpack.encode((1.0, [removed, removed], 0))
    assert len(decode(payload, Limits(keys_per_batch=6)).events) == 2
    with pytest.raises(LimitError, match="block hashes"):
        decode(payload, Limits(keys_per_batch=5))


def test_of_many_bad_events_a_few_are_kept_and_the_rest_is_counted(world: World, make: Any) -> None:
    """The message's good events count all the same."""
    w = world()
    w.send("p", *[["Nonsense", number] for number in range(50)], make.stored([1], make.run(0, 15), 16))
    assert len(w.dead) == LETTERS + 1
    assert w.dead[-1].reason.startswith(f"{50 - LETTERS} more events of this message")
    assert w.counts["events_dead"] == 50
    assert w.held("p", w.keys(range(16))) == [True]
    w.send("p", ["Nonsense"])
    assert len(w.dead) == LETTERS + 2


def test_a_keyed_message_has_the_same_limits(world: World) -> None:
    """Bridges' own messages are bounded as engines' are."""
    w = world(limits=Limits(keys_per_batch=3, events_per_batch=2))
    removed = records.KeyedRemoved(engine_keys=[b"a", b"b"], tier=1, group=0)
    for events in ([removed, removed], [records.KeyedCleared()] * 3):
        batch = records.KeyedBatch(timestamp=1.0, events=list(events), dp_rank=None)
        w.raw("p", records.encode(batch), content_type="keys")
    assert [w.dead[number].reason.startswith("batch of") for number in range(2)] == [True, True]


def test_engine_keys_that_stand_for_one_block_are_bounded(
    world: World, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest are kept: the block goes when the last of those goes, never later."""
    monkeypatch.setattr(bounds, "MAX_OWNERS", 4)
    w = world()
    [key] = w.keys(range(16))
    w.send("p", *[make.stored([n], make.run(0, 15), 16, lookahead_token_ids=[n]) for n in range(1, 10)])
    assert w.counts["owners_dropped"] == 5
    for number in (9, 8, 7):
        w.send("p", make.removed([number]))
        assert w.held("p", [key]) == [True]
    w.send("p", make.removed([6]))
    assert w.held("p", [key]) == [False]


def test_blocks_that_wait_for_one_parent_are_bounded(world: World, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have waited longest make room; the others appear with their parent."""
    monkeypatch.setattr(bounds, "MAX_WAITING", 3)
    w = world()
    w.send("p", *[make.stored([n], make.run(16 * n, 16 * n + 15), 16, 1) for n in range(2, 7)])
    assert (w.counts["orphans_evicted"], w.state("p").orphans) == (2, 3)
    w.send("p", make.stored([1], make.run(0, 15), 16))
    children = [w.keys([*range(16), *make.run(16 * n, 16 * n + 15)])[1] for n in range(2, 7)]
    assert w.held("p", children) == [False, False, True, True, True]
    assert w.state("p").orphans == 0


def test_blocks_that_share_a_canonical_block_are_bounded(
    world: World, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is above the bound is not taken; the others go when the one that they share goes."""
    monkeypatch.setattr(bounds, "MAX_FINALS", 3)
    w = world()
    w.send("p", make.stored([1], make.run(0, 7), 8))
    w.send("p", *[make.stored([n], make.run(8 * n, 8 * n + 7), 8, 1) for n in range(2, 7)])
    keys = [w.keys([*range(8), *make.run(8 * n, 8 * n + 7)])[0] for n in range(2, 7)]
    assert w.held("p", keys) == [True, True, True, False, False]
    assert len(w.dead) == 2
    w.send("p", make.removed([1]))
    assert w.held("p", keys) == [False] * 5


@given(st.integers(0, 30), st.integers(1, 9), st.booleans(), st.integers(0, 2))
def test_parts_say_together_what_the_event_says(count: int, most: int, masked: bool, extra: int) -> None:
    """No part is above the bound, keys, tokens and extra keys come in order, and each part chains from the last."""
    keys = [bytes([number]) for number in range(count)]
    tokens = bytes(range(count)) * 8
    event = Stored(
        keys=keys,
        parent=b"parent",
        tokens=b"".join(bytes([number]) * 8 for number in range(count)),
        block_size_tokens=2,
        tier=Tier.GPU,
        extra=[[("s", str(number))] for number in range(count)] if extra else [],
        masked=masked,
    )
    found = [part for part in parts(event, most) if isinstance(part, Stored)]
    assert [key for part in found for key in part.keys] == keys
    assert all(len(part.keys) <= most for part in found)
    assert [part.parent for part in found[1:]] == [part.keys[-1] for part in found[:-1]]
    assert [value for part in found for value in part.extra] == event.extra
    if not masked:
        assert b"".join(part.tokens for part in found) == event.tokens
    removed = Removed(keys=keys, tier=Tier.GPU)
    assert [key for part in parts(removed, most) for key in getattr(part, "keys", [])] == keys
    assert len(tokens) == len(event.tokens)


@given(st.integers(0, 30), st.integers(1, 9), st.integers(-1, 2), st.integers(0, 3))
def test_keyed_parts_say_together_what_the_event_says(count: int, most: int, per: int, over: int) -> None:
    """What does not fit stays one event, which is refused as a whole."""
    keys = [bytes([number]) for number in range(count)]
    event = records.KeyedStored(
        engine_keys=keys,
        parent=None,
        block_keys=bytes(max(per, 0) * 16 * count + over),
        keys_per_block=per,
        block_size_tokens=16,
        tier=1,
        group=0,
        kind=0,
        window_tokens=0,
    )
    found = [part for part in stripped_parts(event, most) if isinstance(part, records.KeyedStored)]
    assert [key for part in found for key in part.engine_keys] == keys
    assert b"".join(part.block_keys for part in found) == event.block_keys
    if over or per < 0:
        assert len(found) == 1
    else:
        assert all(
            len(part.engine_keys) <= most and len(part.block_keys) == per * 16 * len(part.engine_keys) for part in found
        )


def test_references_of_pods_are_told_apart_within_a_slice(
    world: World, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pods with one reference are refused also before the first one's state was written."""
    w = world()
    monkeypatch.setattr("kvatlas.bridge.model.pod_ids.pod_ref", lambda _: pod_ref("p"))
    w.send("p", make.stored([1], make.run(0, 15), 16), deliver=False)
    w.send("q", make.stored([1], make.run(0, 15), 16), deliver=False)
    effects = w.resolver.effects()
    part = w.resolver.slice(w.engine, effects)
    for offset, (key, value, headers) in enumerate(w.log):
        for _ in w.resolver.steps(part, parse_message(key, value, headers, 0, offset)):
            pass
    part.finish()
    assert [letter.pod for letter in effects.dead] == ["q"]
