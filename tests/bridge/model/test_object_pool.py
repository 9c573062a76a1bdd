"""Mooncake's events, and what is made of a pool's objects and the engines' blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.adapters.mooncake import ObjectEvent, decode_object_events
from kvatlas.bridge.model.events import engine_key
from kvatlas.bridge.model.object_pool import ObjectNames, ObjectPool
from kvatlas.bridge.model.records import KeyedRemoved, KeyedStored

GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "data" / "captures" / "golden_mooncake.json").read_text()
)
HEX: Final = ObjectNames(re.compile(r"^([0-9a-f]+)_"))


@pytest.mark.parametrize("name", GOLDEN)
def test_events_of_the_master(name: str) -> None:
    """Every field that is of use, whatever else the map has."""
    case = GOLDEN[name]
    assert msgspec.msgpack.encode(case["json"]).hex() == case["hex"]
    batch = decode_object_events(bytes.fromhex(case["hex"]))
    assert batch.seconds == case["json"][0] / 1000
    for found, told in zip(batch.events, case["json"][1], strict=True):
        assert (found.stored, found.object_key) == (told["event_type"] == "stored", told["object_key"])
        assert found.engine_key == (engine_key(told["block_hashes"][0]) if told["block_hashes"] else None)


@pytest.mark.parametrize(
    "value", [[], [1], {"a": 1}, [1, [{"event_type": "moved", "object_key": "a"}]], "text", [1, [{}]]]
)
def test_other_messages_are_refused(value: Any) -> None:
    """They are named, not guessed at."""
    with pytest.raises(WireError, match="Mooncake"):
        decode_object_events(msgspec.msgpack.encode(value))


def put(key: str, *, stored: bool = True, hashes: tuple[int, ...] = ()) -> ObjectEvent:
    """Return an event of an object."""
    return ObjectEvent("stored" if stored else "removed", key, list(hashes))


def announced(*numbers: int, **changes: Any) -> KeyedStored:
    """Return what an engine announced of blocks of one canonical block each."""
    fields = {
        "engine_keys": [number.to_bytes(8, "big") for number in numbers], "parent": None, "keys_per_block": 1,
        "block_keys": b"".join(number.to_bytes(16, "big") for number in numbers), "tier": 1, "group": 0, "kind": 0,
        "window_tokens": 0, "block_size_tokens": 16,
    }  # fmt: skip
    return KeyedStored(**fields | changes)


def told(pool: ObjectPool, known: set[bytes]) -> set[bytes]:
    """Take what the index is told; returns the canonical keys that it knows of then."""
    names: dict[bytes, bytes] = {}
    for events in pool.holder.changes(1 << 20):
        for event in events:
            if isinstance(event, KeyedStored):
                assert event.block_size_tokens == 16
                known.add(event.block_keys)
                names[event.engine_keys[0]] = event.block_keys
                pool.told = getattr(pool, "told", {}) | names  # type: ignore[attr-defined]
            elif isinstance(event, KeyedRemoved):
                known.discard(pool.told[event.engine_keys[0]])  # type: ignore[attr-defined]
    return known


@pytest.mark.parametrize(
    ("names", "event", "key"),
    [
        (ObjectNames(), put("42", hashes=(42,)), (42).to_bytes(8, "big")),
        (ObjectNames(), put("aabb_0_k"), None),
        (HEX, put("7f00000000000001aabb_0_k"), bytes.fromhex("7f00000000000001")),
        (HEX._replace(end="last"), put("7f00000000000001aabb_0_k"), bytes.fromhex("000000000001aabb")),
        (HEX, put("2a_0"), (42).to_bytes(8, "big")),
        (HEX, put("abc_0"), None),
        (HEX, put("weights/7"), None),
        (HEX, put("2a_0", hashes=(7,)), (7).to_bytes(8, "big")),
    ],
)
def test_an_objects_block_is_in_its_name(names: ObjectNames, event: ObjectEvent, key: bytes | None) -> None:
    """As a number, or as the pattern finds it: the end of the hash that the engines publish."""
    assert names.engine_key(event) == key


@given(
    st.lists(st.tuples(st.sampled_from(["put", "gone", "learn"]), st.integers(1, 3), st.integers(0, 2)), max_size=60),
    st.integers(1, 3),
)
def test_a_block_counts_while_all_its_objects_are_there_and_it_has_a_name(
    steps: list[tuple[str, int, int]], parts: int
) -> None:
    """Whatever the order in which objects and names come; told after every step."""
    pool, known = ObjectPool(HEX._replace(parts=parts), 16, 100), set[bytes]()
    objects: dict[int, set[int]] = {}
    named: set[int] = set()
    for kind, block, part in steps:
        if kind == "learn":
            pool.learn(announced(block))
            named.add(block)
        elif part < parts:
            pool.apply(put(f"{block:016x}_{part}", stored=kind == "put"))
            held = objects.setdefault(block, set())
            held.add(part) if kind == "put" else held.discard(part)
        whole = {block.to_bytes(16, "big") for block in named if len(objects.get(block, ())) == parts}
        assert told(pool, known) == whole


def test_bounds_hold() -> None:
    """Objects above the limit are counted, and names of the oldest blocks go."""
    pool = ObjectPool(HEX, 16, 2)
    pool.learn(announced(1, 2, 3))
    for number in (1, 2, 3):
        pool.apply(put(f"{number:016x}_0"))
    assert (len(pool.holder), pool.holder.over) == (2, 1)
    assert told(pool, set()) == {(2).to_bytes(16, "big")}
    pool.apply(put("no name"))
    assert pool.nameless == 1


@pytest.mark.parametrize("changes", [{"keys_per_block": 0, "block_keys": b""}, {"unnamed": True}, {"names": b"n" * 16}])
def test_blocks_without_a_name_of_their_own_name_no_object(changes: dict[str, Any]) -> None:
    """Placeholders, guesses, and blocks that count only with the token behind them."""
    pool = ObjectPool(HEX, 16, 10)
    pool.apply(put(f"{1:016x}_0"))
    pool.learn(announced(1, **changes))
    assert told(pool, set()) == set()


def test_a_pool_that_begins_anew_keeps_names() -> None:
    """Its objects are gone; what blocks are called stays true."""
    pool = ObjectPool(HEX, 16, 10)
    pool.learn(announced(1))
    pool.apply(put(f"{1:016x}_0"))
    assert told(pool, set())
    pool.clear()
    assert told(pool, set()) == set()
    pool.apply(put(f"{1:016x}_0"))
    assert told(pool, set()) == {(1).to_bytes(16, "big")}
