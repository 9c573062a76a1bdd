"""What LMCache's servers hold, from their events: recorded ones, and any others against a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.adapters.lmcache import CacheBatch, ChunkEntry, ChunkKey, decode_cache_events
from kvatlas.bridge.model.block_key import KEY_BYTES, block_keys, pack_tokens, root_key
from kvatlas.bridge.model.chunk_cache import CacheFleet, ChunkHolder, Name
from kvatlas.bridge.model.chunk_chains import FIRST, ChunkChains, chunk_hash
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.records import KeyedRemoved, KeyedStored

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "captures" / "golden_lmcache.json").read_text()
)
SERVER = "mp-server-1"
MODEL = "demo-model"
HASHES = [bytes.fromhex(text) for text in GOLDEN["hashes"]["chunk_hashes"]]
TOKENS = GOLDEN["hashes"]["token_ids"]
KEYS = block_keys(root_key(MODEL), pack_tokens(TOKENS), 16)
NAMES = [Name(MODEL, "", chunk) for chunk in HASHES]


def _fleet(**options: Any) -> CacheFleet:
    return CacheFleet({SERVER: ""}, 16, options.get("limit", 1000))


def _feed(fleet: CacheFleet, *names: str) -> None:
    for name in names:
        for batch in decode_cache_events(bytes.fromhex(GOLDEN[name]["hex"])):
            fleet.apply(batch)


def _index(holder: ChunkHolder, index: dict[bytes, tuple[int, bytes]]) -> dict[bytes, tuple[int, bytes]]:
    """Apply what is told as a worker does: engine key -> tier and keys."""
    for events in holder.changes(200):
        for event in events:
            (key,) = event.engine_keys
            if isinstance(event, KeyedRemoved):
                assert index.pop(key)[0] == event.tier, "removed from a tier that did not hold it"
            else:
                assert len(event.block_keys) == event.keys_per_block * KEY_BYTES
                assert key not in index or index[key][0] == event.tier, "on two tiers"
                index[key] = (event.tier, event.block_keys)
    return index


def test_hashes_are_lmcache_s() -> None:
    """The recorded chain, from its first hash on."""
    assert GOLDEN["hashes"]["none_hash"] == FIRST.hex()
    before = FIRST
    for number, chunk in enumerate(HASHES):
        before = chunk_hash(before, pack_tokens(TOKENS[16 * number : 16 * (number + 1)]))
        assert before == chunk


def test_every_recorded_event_is_read() -> None:
    """Each record holds one batch; its sequence is the recorded one."""
    found = [name for name in GOLDEN if GOLDEN[name].get("transport") == "kafka" and GOLDEN[name]["hex"]]
    assert len(found) == 16
    for name in found:
        (batch,) = decode_cache_events(bytes.fromhex(GOLDEN[name]["hex"]))
        recorded = GOLDEN[name]["json"]["batches"][0]
        assert (batch.instance_id, batch.seq, batch.tier) == (SERVER, recorded["seq"], recorded["tier"])
        assert [entry.key.chunk_hash_hex for entry in batch.entries] == [
            entry["key"]["chunk_hash_hex"] for entry in recorded["entries"]
        ]


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (b"", "truncated"),
        (b"[]", "array"),
        (b'{"batches": [{"instance_id": "a", "incarnation": 1, "seq": -1, "event_type": "store"}]}', "seq"),
        (
            b'{"batches":[{"instance_id":"a","incarnation":1,"seq":1,"event_type":"store","entries":[{"key":%s}]}]}'
            % b'{"chunk_hash_hex":"xyz","model_name":"m"}',
            "chunk_hash_hex",
        ),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_what_is_no_event_is_refused(value: bytes, field: str) -> None:
    """With the field that is wrong."""
    with pytest.raises(WireError, match=field):
        decode_cache_events(value)


def test_stored_chunks_are_named_as_prompts_are() -> None:
    """Three chunks of one block: the same keys as those of a prompt with their tokens."""
    fleet = _fleet()
    _feed(fleet, "config.0", "config.1", "store_l1")
    index = _index(fleet.holders[SERVER], {})
    assert index == {name.engine_key: (int(Tier.CPU), key) for name, key in zip(NAMES, KEYS, strict=True)}
    assert fleet.servers[SERVER].heard_from == 0
    assert (fleet.duplicates, fleet.late, fleet.gaps) == (0, 0, 0)


def test_tiers_evictions_and_the_whole_recording() -> None:
    """Every recorded event in order: salts apart, ranks together, a pool of its own, host memory void at the end."""
    fleet = _fleet()
    names = [name for name in GOLDEN if GOLDEN[name].get("transport") == "kafka" and GOLDEN[name]["hex"]]
    index: dict[bytes, tuple[int, bytes]] = {}
    holders = fleet.holders
    for name in names[:-1]:
        _feed(fleet, name)
        if SERVER in holders:
            _index(holders[SERVER], index)
        if name == "store_salted":
            salt = GOLDEN[name]["json"]["batches"][0]["entries"][0]["key"]["cache_salt"]
            salted = Name(MODEL, salt, HASHES[0])
            assert index[salted.engine_key][1] == block_keys(root_key(MODEL, None, salt), pack_tokens(TOKENS), 16)[0]
    assert (fleet.duplicates, fleet.late, fleet.gaps) == (0, 0, 0)
    pool = _index(holders[CacheFleet.pool("s3")], {})
    assert {tier for tier, _ in pool.values()} <= {int(Tier.DISK)}
    assert fleet.servers[SERVER].pools == {"s3"}
    _feed(fleet, names[-1])
    _index(holders[SERVER], index)
    alive = {name.engine_key for name in _held(holders[SERVER]) if holders[SERVER].tier(name) == Tier.CPU}
    assert {key for key, (tier, _) in index.items() if tier == Tier.CPU} <= alive


def _held(holder: ChunkHolder) -> list[Name]:
    return list(holder._held)


def _entry(
    chunk: int, *, rank: int = 0, world: int = 1, group: int = 0, tokens: bool = True, salt: str = ""
) -> ChunkEntry:
    key = ChunkKey(HASHES[chunk].hex(), MODEL, world << 24 | rank << 16, group, salt)
    return ChunkEntry(key, TOKENS[16 * chunk : 16 * chunk + 16] if tokens else [], 16 * chunk if tokens else -1)


def _batch(seq: int, kind: str, *entries: ChunkEntry, **fields: Any) -> CacheBatch:
    return CacheBatch(**{
        "instance_id": SERVER, "incarnation": 1, "seq": seq, "event_type": kind, "tier": "l1", "backend": "dram",
        "entries": list(entries), **fields,
    })  # fmt: skip


def test_a_chunk_counts_once_every_rank_has_it() -> None:
    """And no longer once one of them has not."""
    fleet = _fleet()
    fleet.apply(_batch(1, "store", _entry(0, rank=0, world=2)))
    holder = fleet.holders[SERVER]
    assert _index(holder, {}) == {}
    fleet.apply(_batch(2, "store", _entry(0, rank=1, world=2)))
    index = _index(holder, {})
    assert list(index) == [NAMES[0].engine_key]
    fleet.apply(_batch(3, "delete", _entry(0, rank=0, world=2)))
    assert _index(holder, index) == {}


def test_a_group_that_shows_up_late_makes_chunks_without_it_parts() -> None:
    """A hybrid model's chunk is loaded with all its groups or not at all."""
    fleet = _fleet()
    fleet.apply(_batch(1, "store", _entry(0), _entry(1)))
    holder = fleet.holders[SERVER]
    index = _index(holder, {})
    assert len(index) == 2
    fleet.apply(_batch(2, "store", _entry(0, group=1)))
    assert list(_index(holder, index)) == [NAMES[0].engine_key]


def test_children_wait_for_their_tokens_and_their_parents() -> None:
    """Whatever order they come in, and whoever tells the tokens."""
    fleet = _fleet()
    holder_of = fleet.holders
    fleet.apply(_batch(1, "store", _entry(2)))
    fleet.apply(_batch(2, "store", _entry(0, tokens=False)))
    assert _index(holder_of[SERVER], {}) == {}
    fleet.apply(_batch(3, "store", _entry(1, salt="s")))
    assert _index(holder_of[SERVER], {}) == {}
    fleet.apply(_batch(4, "store", _entry(0, salt="other")))
    index = _index(holder_of[SERVER], {})
    salted = {Name(MODEL, "s", HASHES[1]).engine_key, Name(MODEL, "other", HASHES[0]).engine_key}
    assert set(index) == {NAMES[0].engine_key, NAMES[2].engine_key} | salted
    assert index[NAMES[2].engine_key] == (int(Tier.CPU), KEYS[2])


def test_a_hole_puts_what_was_held_in_doubt() -> None:
    """It is told before the hole, what came since behind it; what is stored again is certain again."""
    fleet = _fleet()
    fleet.apply(_batch(1, "store", _entry(0), _entry(1)))
    holder = fleet.holders[SERVER]
    index = _index(holder, {})
    fleet.apply(_batch(4, "store", _entry(1), _entry(2)))
    server = fleet.servers[SERVER]
    assert (server.heard_from, server.first_lost, server.last_lost, server.lost) == (4, 2, 3, 2)
    assert holder.gap
    assert holder.doubted == {NAMES[0]}
    behind = holder.split()
    assert _index(holder, {}) == {}
    holder.join(behind, told=True)
    assert set(_index(holder, {})) == {NAMES[1].engine_key, NAMES[2].engine_key}, "told again, under the new epoch"
    assert set(index) == {NAMES[0].engine_key, NAMES[1].engine_key}
    holder.restate()
    assert holder.gap
    behind = holder.split()
    assert set(_index(holder, {})) == {NAMES[0].engine_key}
    holder.join(behind, told=True)
    assert set(_index(holder, {})) == {NAMES[1].engine_key, NAMES[2].engine_key}


def test_a_chunk_hashed_otherwise_is_never_named() -> None:
    """Servers may use another hash; nothing is guessed then."""
    fleet = _fleet()
    foreign = ChunkEntry(ChunkKey(blake3(b"x").hexdigest(), MODEL), TOKENS[:16], 0)
    fleet.apply(_batch(1, "store", foreign))
    assert _index(fleet.holders[SERVER], {}) == {}


def test_limits_hold() -> None:
    """Chunks beyond the limit are not taken, tokens beyond it forgotten from the oldest on."""
    fleet = _fleet(limit=2)
    fleet.apply(_batch(1, "store", _entry(0), _entry(1), _entry(2)))
    assert len(fleet.holders[SERVER]) == 2
    assert fleet.holders[SERVER].over == 1
    chains = ChunkChains(2)
    for number, chunk in enumerate(HASHES):
        chains.learn(chunk, pack_tokens(TOKENS[16 * number : 16 * number + 16]), 16 * number)
    assert len(chains) == 2
    assert chains.keys(HASHES[2], root_key(MODEL), 16) is None, "its first chunk is forgotten"


_moves = st.lists(
    st.tuples(
        st.sampled_from(["store", "delete", "repeat", "restart", "late"]),
        st.integers(0, 2),  # chunk
        st.integers(0, 1),  # rank of two
        st.sampled_from([("l1", "dram"), ("l1", "gds"), ("l2", "fs")]),
        st.booleans(),  # tokens
        st.booleans(),  # flush
    ),
    max_size=60,
)


@settings(deadline=None)
@given(_moves)
def test_the_index_is_what_a_plain_model_says(moves: list[Any]) -> None:
    """Any order of stores, evictions, repetitions and restarts: what is told is what is held whole and named."""
    fleet = _fleet()
    index: dict[bytes, tuple[int, bytes]] = {}
    held: dict[tuple[int, int], set[tuple[str, str]]] = {}
    known: set[int] = set()
    seq, incarnation = 1, 5
    fleet.apply(_batch(1, "config", incarnation=incarnation))
    for kind, chunk, rank, (tier, backend), tokens, flush in moves:
        if kind == "restart":
            incarnation, seq = incarnation + 1, 1
            fleet.apply(_batch(1, "config", incarnation=incarnation))
            for places in held.values():
                places -= {place for place in places if place[0] == "l1"}
        elif kind in ("store", "delete"):
            seq += 1
            entry = _entry(chunk, rank=rank, world=2, tokens=tokens and kind == "store")
            fleet.apply(_batch(seq, kind, entry, incarnation=incarnation, tier=tier, backend=backend))
            places = held.setdefault((chunk, rank), set())
            if kind == "store":
                places.add((tier, backend))
                known |= {chunk} if tokens else set()
            else:
                places.discard((tier, backend))
        else:
            entry = _entry(chunk, rank=rank, world=2)
            number = seq if kind == "repeat" else seq + 1
            if number:
                before = incarnation - 1 if kind == "late" else incarnation
                fleet.apply(_batch(number, "store", entry, incarnation=before, tier=tier, backend=backend))
        if flush and SERVER in fleet.holders:
            _index(fleet.holders[SERVER], index)
    if SERVER in fleet.holders:
        _index(fleet.holders[SERVER], index)
    expected = {}
    for chunk, name in enumerate(NAMES):
        parts = [held.get((chunk, rank), set()) for rank in range(2)]
        if all(parts) and known >= set(range(chunk + 1)):
            host = all(any(place[0] == "l1" for place in places) for places in parts)
            expected[name.engine_key] = (int(Tier.CPU if host else Tier.DISK), KEYS[chunk])
    assert index == expected
    again = dict[bytes, tuple[int, bytes]]()
    for holder in fleet.holders.values():
        holder.restate()
        _index(holder, again)
    assert again == expected, "told anew it is the same"


def test_events_are_what_workers_read() -> None:
    """A round trip through the codec of ``kv-events``."""
    fleet = _fleet()
    _feed(fleet, "config.0", "config.1", "store_l1")
    (events,) = fleet.holders[SERVER].changes(1 << 20)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(events), type=list[KeyedStored | KeyedRemoved]) == events
