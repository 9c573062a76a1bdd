"""Payloads made by the engines' own encoders: every one decodes to what it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.bridge.model.events import Batch, Cleared, Event, Kind, Limits, Removed, Stored, Tier, engine_key
from kvatlas.bridge.model.sessions import session_hash

DATA = Path(__file__).parents[2] / "data" / "captures"
SGLANG: dict[str, dict[str, Any]] = json.loads((DATA / "golden_sglang.json").read_text())
OFFLOAD: dict[str, dict[str, Any]] = json.loads((DATA / "golden_vllm_offload.json").read_text())
TIERS = {
    "GPU": Tier.GPU,
    "CPU": Tier.CPU,
    "CPU_PINNED": Tier.CPU,
    "DISK": Tier.DISK,
    "EXTERNAL": Tier.SHARED,
}
FIELDS = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "more")


def events_of(case: dict[str, Any]) -> bool:
    return bool(case["hex"]) and isinstance(case.get("json"), list) and isinstance(case["json"][1], list)


def decoded(case: dict[str, Any]) -> Batch:
    batch = adapter(case["engine"])(bytes.fromhex(case["hex"]), Limits())
    assert not batch.rejected
    assert batch.timestamp == case["json"][0]
    assert batch.dp_rank == case["json"][2]
    return batch


def as_map(event: Any) -> dict[str, Any]:
    """Return an event as a map, whatever its layout."""
    if isinstance(event, dict):
        return event
    if event[0] == "BlockRemoved":
        return dict(zip(("type", "block_hashes", "medium"), event, strict=True))
    found = dict(zip(FIELDS, event, strict=False))
    return found | found.pop("more", {})


def check_removed(found: Event, told: dict[str, Any], tier: Tier) -> None:
    assert isinstance(found, Removed)
    assert found.keys == [engine_key(value) for value in told["block_hashes"]]
    assert (found.tier, found.group) == (tier, told.get("group_idx", 0))
    assert found.ownership == told.get("ownership", "")


def check_stored(found: Event, told: dict[str, Any], tier: Tier) -> Stored:
    assert isinstance(found, Stored)
    parent = told["parent_block_hash"]
    assert found.keys == [engine_key(value) for value in told["block_hashes"]]
    assert found.parent == (None if parent is None else engine_key(parent))
    assert (found.tier, found.group, found.lora) == (tier, told.get("group_idx", 0), told.get("lora_name"))
    assert found.block_size_tokens == told["block_size"]
    assert not found.masked
    return found


@pytest.mark.parametrize("name", [name for name, case in SGLANG.items() if events_of(case)])
def test_sglang(name: str) -> None:
    """Every version's stores, removals, clears, salts, adapters, pairs, media, ranks and pictures."""
    case = SGLANG[name]
    batch = decoded(case)
    for found, raw in zip(batch.events, case["json"][1], strict=True):
        told = as_map(raw)
        if told["type"] == "AllBlocksCleared":
            assert found == Cleared()
        elif told["type"] == "BlockRemoved":
            check_removed(found, told, TIERS[told["medium"]])
        else:
            stored = check_stored(found, told, TIERS[told["medium"]])
            tokens = told["token_ids"]
            pairs = isinstance(tokens[0], list)
            firsts = [pair[0] for pair in tokens] if pairs else tokens
            assert stored.tokens == pack_tokens([token % 2**32 for token in firsts])
            assert stored.ahead == (pack_tokens([tokens[-1][1]]) if pairs else b"")
            assert stored.cache_salt == told.get("cache_salt")
            assert stored.session == session_hash(told.get("session_id", ""))
            assert not stored.unnamed
            size = told["block_size"]
            assert stored.extra == (
                [
                    [("wide", token, at) for at, token in enumerate(firsts[first : first + size]) if token >= 2**32]
                    for first in range(0, len(firsts), size)
                ]
                if max(firsts) >= 2**32
                else []
            )


def test_sglang_versions_are_all_there() -> None:
    """The file has what this test is about."""
    assert sum(events_of(case) for case in SGLANG.values()) > 180
    assert {name.split("/")[0] for name in SGLANG} >= {f"0.5.{minor}" for minor in range(17, 24)}


@pytest.mark.parametrize("name", [name for name, case in OFFLOAD.items() if events_of(case)])
def test_vllm_offload(name: str) -> None:
    """Placeholders, self-describing events, chunks, salts, adapters, pictures, owners, groups and storage of vLLM."""
    case = OFFLOAD[name]
    for found, told in zip(decoded(case).events, case["json"][1], strict=True):
        tier = TIERS.get(told.get("medium", "GPU"), Tier.DISK)
        if told.get("locality") == "REMOTE":
            tier = Tier.SHARED
        if told["type"] == "AllBlocksCleared":
            assert found == Cleared()
        elif told["type"] == "BlockRemoved":
            check_removed(found, told, tier)
        else:
            stored = check_stored(found, told, tier)
            assert stored.tokens == pack_tokens(told["token_ids"])
            assert stored.ownership == told.get("ownership", "")
            assert stored.session == session_hash(told.get("session_id", ""))
            assert stored.unnamed == (tier != Tier.GPU)
            assert (stored.kind is None) == ("kv_cache_spec_kind" not in told)
            entries = told.get("extra_keys") or []
            salts = [text for entry in entries for text in entry or () if isinstance(text, str)]
            assert stored.cache_salt == next((text for text in salts if text != told["lora_name"]), None)
            items = [[("mm", *item) for item in entry or () if isinstance(item, list)] for entry in entries]
            assert stored.extra == (items if any(items) else [])


def test_sessions_are_in_both_engines_files() -> None:
    """The files have what is asserted above."""
    for cases in (SGLANG, OFFLOAD):
        assert any("session_id" in json.dumps(case.get("json")) for case in cases.values())


PLAIN = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [1, 2], "block_size": 2}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("odd", [None, "", 7, b"s", ["s"], {"s": 1}, "s" * 1_025, "\u00e9" * 513])
def test_what_is_no_session_costs_an_event_nothing(engine: str, odd: Any) -> None:
    """A session only tells whose blocks they are: what is odd, or longer than a name, is left out."""
    both = [PLAIN | {"session_id": odd}, PLAIN]
    batch = adapter(engine)(msgspec.msgpack.encode([0.0, both, 0]), Limits())
    assert not batch.rejected
    assert batch.events[0] == batch.events[1]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_session_is_told_of_stores_on_the_gpu_alone(engine: str) -> None:
    """Every name up to 1 KiB, by its hash; an offload event says nothing of who asks for its blocks."""
    longest = "\u00e9" * 512
    events = [PLAIN | {"session_id": longest, "medium": medium} for medium in ("GPU", "CPU")]
    found = adapter(engine)(msgspec.msgpack.encode([0.0, events, 0]), Limits()).events
    assert [one.session for one in found if isinstance(one, Stored)] == [session_hash(longest), ""]


def test_a_session_beside_the_salt_of_sglangs_arrays() -> None:
    """The map at index 7 of builds before 0.5.20; a list there, as in others, says nothing."""
    event = ["BlockStored", [1], None, [1, 2], 2, None, "GPU"]
    events = [[*event, {"cache_salt": "a", "session_id": "s"}], [*event, ["s"]]]
    batch = adapter("sglang")(msgspec.msgpack.encode([0.0, events, 0]), Limits())
    salted, other = batch.events
    assert isinstance(salted, Stored)
    assert isinstance(other, Stored)
    assert (salted.cache_salt, salted.session) == ("a", session_hash("s"))
    assert (other.cache_salt, other.session) == (None, "")


def test_a_window_of_a_group_is_told() -> None:
    """Windowed groups stay placeholders, with kind and window."""
    events = decoded(OFFLOAD["selfdesc_hybrid.1"]).events
    window = [event for event in events if isinstance(event, Stored) and event.group == 1]
    assert {(event.kind, event.window_tokens, event.tokens) for event in window} == {(Kind.SLIDING_WINDOW, 8, b"")}


TENSORRT: dict[str, dict[str, Any]] = json.loads((DATA / "golden_tensorrt.json").read_text())


@pytest.mark.parametrize("name", TENSORRT)
def test_tensorrt(name: str) -> None:
    """Stores, removals, adapters by number, ids as text, and pictures, which no plain prompt matches."""
    case = TENSORRT[name]
    assert msgspec.msgpack.encode(case["json"]).hex() == case["hex"]
    (found,), (told,) = decoded(case).events, case["json"][1]
    if told["type"] == "BlockRemoved":
        check_removed(found, told, Tier.GPU)
        return
    assert isinstance(found, Stored)
    stored = check_stored(found, told | {"lora_name": "lora:3" if told["lora_id"] else None}, Tier.GPU)
    assert stored.cache_salt is None
    text = [token for token in told["token_ids"] if isinstance(token, str) and not token.isdecimal()]
    if text:
        assert [len(extra) for extra in stored.extra] == [3, 0]  # the picture, and two tokens that are text
        assert stored.tokens[-16:] == pack_tokens([14, 15, 16, 17])
    else:
        assert (stored.tokens, stored.extra) == (pack_tokens([int(token) for token in told["token_ids"]]), [])


@pytest.mark.parametrize("keys", [[[]], "text", [[{"hash": "a"}], ["b"]], 7])
def test_odd_pictures_of_tensorrt_are_refused_alone(keys: Any) -> None:
    """A list that fits no blocks names none of them; the rest of the message stands."""
    good = TENSORRT["stored"]["json"][1][0]
    batch = adapter("tensorrt-llm")(msgspec.msgpack.encode([0.0, [good | {"mm_keys": keys}, good], 0]), Limits())
    assert len(batch.rejected) == (keys != [[]])
    assert batch.events[-1] == decoded(TENSORRT["stored"]).events[0]
