"""What a cache server holds reaches the index, and leaves it, as the bridge tells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvatlas.bridge.model.adapters.lmcache import CacheBatch, ChunkEntry, ChunkKey, decode_cache_events
from kvatlas.bridge.model.block_key import block_keys, pack_tokens, root_key
from kvatlas.bridge.model.chunk_cache import CacheFleet
from kvatlas.bridge.model.chunk_chains import FIRST, chunk_hash
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.records import KeyedBatch, encode

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "data" / "captures" / "golden_lmcache.json").read_text()
)
SERVER = "mp-server-1"
POD = f"lmcache:{SERVER}"


def _tell(world: Any, fleet: CacheFleet) -> None:
    for events in fleet.holders[SERVER].changes(1 << 20):
        value = encode(KeyedBatch(timestamp=1.0, events=list(events)))
        world.raw(POD, value, content_type="keys", engine="lmcache", announcements="presence", model="")


def _tiers(world: Any, keys: list[bytes]) -> list[set[tuple[int, int]]]:
    """Return tier and epoch of what holds each block."""
    return [{(holder.tier, holder.epoch) for holder in world.holders(key)} for key in keys]


def test_recorded_events_leave_the_index_as_they_say(world: Callable[..., Any]) -> None:
    """Stores, then an eviction, in the order recorded; blocks are known by the keys of a prompt."""
    w = world()
    fleet = CacheFleet({SERVER: ""}, 16, 1000)
    keys = block_keys(root_key("demo-model"), pack_tokens(GOLDEN["hashes"]["token_ids"]), 16)
    names = [name for name in GOLDEN if GOLDEN[name].get("transport") == "kafka" and GOLDEN[name]["hex"]]
    for name in names[:3]:
        for batch in decode_cache_events(bytes.fromhex(GOLDEN[name]["hex"])):
            fleet.apply(batch)
    _tell(w, fleet)
    assert [{tier for tier, _ in found} for found in _tiers(w, keys)] == [{Tier.CPU}] * 3
    assert not w.dead
    fleet.apply(
        CacheBatch(
            SERVER,
            1764299990,
            4,
            "delete",
            "l1",
            "dram",
            [ChunkEntry(ChunkKey(GOLDEN["hashes"]["chunk_hashes"][1], "demo-model"))],
        )
    )
    _tell(w, fleet)
    assert [bool(found) for found in _tiers(w, keys)] == [True, False, True]


def test_chunks_of_several_blocks_move_between_tiers_as_one(world: Callable[..., Any]) -> None:
    """Every block of a chunk is on its tier; what is stored again after a hole counts from the new epoch on."""
    w = world()
    fleet = CacheFleet({SERVER: ""}, 16, 1000)
    tokens = list(range(1000, 1064))
    keys = block_keys(root_key("m"), pack_tokens(tokens), 16)
    entry = ChunkEntry(ChunkKey(chunk_hash(FIRST, pack_tokens(tokens)).hex(), "m"), tokens, 0)

    def move(seq: int, kind: str, tier: str) -> None:
        fleet.apply(CacheBatch(SERVER, 1, seq, kind, tier, "x", [entry]))

    move(1, "store", "l2")
    _tell(w, fleet)
    assert [{tier for tier, _ in found} for found in _tiers(w, keys)] == [{Tier.DISK}] * 4
    move(2, "store", "l1")
    _tell(w, fleet)
    before = _tiers(w, keys)
    assert [{tier for tier, _ in found} for found in before] == [{Tier.CPU}] * 4
    move(4, "store", "l1")
    holder = fleet.holders[SERVER]
    behind = holder.split()
    w.control(POD, "gap")
    holder.join(behind, told=True)
    _tell(w, fleet)
    after = _tiers(w, keys)
    assert [{tier for tier, _ in found} for found in after] == [{Tier.CPU}] * 4
    assert all(new > old for old, new in zip(map(max, before), map(max, after), strict=True))
    move(5, "delete", "l1")
    move(6, "delete", "l2")
    _tell(w, fleet)
    assert _tiers(w, keys) == [set()] * 4
    assert not w.dead
