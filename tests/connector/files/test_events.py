"""Storage events: in the order of the tier's changes, decodable by the bridge."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.events import Limits, Removed, Stored, Tier
from kvatlas.connector.files.events import BlockMeta, StorageEvents, default_meta
from kvatlas.connector.files.holdings import Change
from tests.connector.conftest import Fleet, block, key


class Recorder:
    """Keeps the payloads that a publisher would send."""

    def __init__(self) -> None:
        self.payloads: list[bytes] = []

    def publish(self, events: Any, *, timestamp: float, dp_rank: int | None = 0) -> int:
        self.payloads.append(encode_batch(timestamp, list(events), dp_rank))
        return len(self.payloads) - 1


def test_stored_and_removed_are_told_with_what_is_known(fleet: Fleet) -> None:
    """Stored blocks carry tokens and parent where known; removal follows with medium and locality."""
    recorder = Recorder()
    events = StorageEvents(recorder, locality="REMOTE", clock=lambda: 5.0)
    tier = fleet.tier()
    tier._holdings._listener = events
    events.describe({key(1): BlockMeta(77, parent_hash=76, token_ids=(1, 2, 3, 4), group=2)})
    tier.store([block(1), block(2)]).result(10)
    tier.evict([key(1)])
    assert events.flush() == 3
    assert events.flush() == 0
    _, decoded, rank = msgspec.msgpack.decode(recorder.payloads[0])
    assert rank == 0
    known = next(event for event in decoded if event["block_hashes"] == [77] and event["type"] == "BlockStored")
    assert (known["token_ids"], known["parent_block_hash"], known["block_size"]) == ([1, 2, 3, 4], 76, 4)
    placeholder = next(event for event in decoded if event["block_hashes"] == [default_meta(key(2)).block_hash])
    assert (placeholder["token_ids"], placeholder["block_size"]) == ([], 0)
    assert decoded[-1]["type"] == "BlockRemoved"
    assert {event["medium"] for event in decoded} == {"STORAGE"}
    assert {event["locality"] for event in decoded} == {"REMOTE"}


@pytest.mark.parametrize(("locality", "tier"), [("LOCAL", Tier.DISK), ("REMOTE", Tier.SHARED)])
def test_the_bridge_reads_the_right_tier(locality: Any, tier: Tier) -> None:
    """Our own decoder puts a local disk on the disk tier and a mounted store on the shared one."""
    recorder = Recorder()
    events = StorageEvents(recorder, locality=locality)
    events.describe({key(1): BlockMeta(77, parent_hash=76, token_ids=(1, 2), group=0)})
    events(Change(False, (key(1),)))
    events(Change(True, (key(1),)))
    events.flush()
    batch = adapter("vllm")(recorder.payloads[0], Limits())
    stored, removed = batch.events
    assert not batch.rejected
    assert isinstance(stored, Stored)
    assert isinstance(removed, Removed)
    assert (stored.tier, removed.tier) == (tier, tier)
    assert stored.keys == removed.keys == [(77).to_bytes(8, "big")]
    assert (stored.parent, stored.block_size_tokens, stored.masked) == ((76).to_bytes(8, "big"), 2, False)


class Broken(Recorder):
    """Refuses while ``down``."""

    down = True

    def publish(self, events: Any, *, timestamp: float, dp_rank: int | None = 0) -> int:
        if self.down:
            raise ConnectionError("injected")
        return super().publish(events, timestamp=timestamp, dp_rank=dp_rank)


def kinds(recorder: Recorder) -> list[tuple[str, int]]:
    """Return type and hash of every event sent."""
    return [
        (event["type"], event["block_hashes"][0])
        for payload in recorder.payloads
        for event in msgspec.msgpack.decode(payload)[1]
    ]


def test_what_the_publisher_refuses_is_sent_later_in_order() -> None:
    """No change is lost or overtaken while nothing can be sent."""
    recorder = Broken()
    events = StorageEvents(recorder)
    events.describe({key(1): BlockMeta(11)})
    events(Change(False, (key(1),)))
    with pytest.raises(ConnectionError):
        events.flush()
    events(Change(True, (key(1),)))
    with pytest.raises(ConnectionError):
        events.flush()
    recorder.down = False
    events(Change(False, (key(1),)))
    assert events.flush() == 3
    stored = default_meta(key(1)).block_hash
    assert kinds(recorder) == [("BlockStored", 11), ("BlockRemoved", 11), ("BlockStored", stored)]


def test_the_thread_outlives_a_refusal_and_closing_sends_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    """The background thread says what is wrong and goes on; close sends what is left."""
    recorder = Broken()
    events = StorageEvents(recorder)
    events.start()
    events(Change(False, (key(1),)))
    deadline = time.monotonic() + 60
    while "cannot be sent" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    recorder.down = False
    events(Change(True, (key(1),)))
    events.close()
    assert [kind for kind, _ in kinds(recorder)] == ["BlockStored", "BlockRemoved"]
    assert "1 wait" in caplog.text


def test_many_changes_are_several_batches() -> None:
    """A burst does not become one huge message."""
    recorder = Recorder()
    events = StorageEvents(recorder)
    events(Change(True, tuple(key(number) for number in range(2500))))
    assert events.flush() == 2500
    assert len(recorder.payloads) == 3
    assert [number for _, number in kinds(recorder)] == [default_meta(key(n)).block_hash for n in range(2500)]


def test_descriptions_are_bounded() -> None:
    """Of more descriptions than are kept the oldest are forgotten, and such a block is told by its key."""
    recorder = Recorder()
    events = StorageEvents(recorder, described=2)
    for number in (1, 2, 1, 3):
        events.describe({key(number): BlockMeta(number)})
    events(Change(False, (key(1), key(2), key(3))))
    events.flush()
    assert [number for _, number in kinds(recorder)] == [1, default_meta(key(2)).block_hash, 3]
