"""Decoding of engine messages: every wire version, and what happens to what cannot be used."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import LimitError, WireError
from kvatlas.bridge.model.adapters import adapter
from kvatlas.bridge.model.adapters.fields import encode_batch, peek_rank
from kvatlas.bridge.model.events import Cleared, Kind, Limits, Removed, Stored, Tier, engine_key, tier_of

DATA = Path(__file__).parents[2] / "data" / "captures"
GOLDEN: dict[str, dict[str, str]] = json.loads((DATA / "golden_payloads.json").read_text())
LIMITS = Limits()
decode = adapter("vllm")


def stored(**fields: Any) -> dict[str, Any]:
    """A BlockStored map with the fields that are always there."""
    base = {"type": "BlockStored", "block_hashes": [7, 8], "parent_block_hash": None, "token_ids": list(range(8))}
    return {**base, "block_size": 4, "lora_id": None, "medium": "GPU", "lora_name": None, **fields}


def one(event: Any, engine: str = "vllm") -> Stored:
    """The only event of a batch, decoded."""
    batch = adapter(engine)(msgpack.packb([1.0, [event], 0]), LIMITS)
    assert not batch.rejected
    found = batch.events[0]
    assert isinstance(found, Stored)
    return found


@pytest.mark.parametrize("version", GOLDEN)
def test_golden_payloads_of_every_version(version: str):
    """Payloads made by a version's own structs decode without a rejected event and mean what they say."""
    for case, payload in GOLDEN[version].items():
        batch = decode(bytes.fromhex(payload), LIMITS)
        assert not batch.rejected, (case, batch.rejected)
        event = batch.events[0]
        if case.startswith("stored"):
            assert isinstance(event, Stored)
            assert not event.masked
            assert len(event.tokens) == 4 * len(event.keys) * event.block_size_tokens
        elif case.startswith("removed"):
            assert isinstance(event, Removed)
            assert len(event.keys) == 1
        else:
            assert isinstance(event, Cleared)
        if "dp=" in case and version != "0.9.0":
            assert batch.dp_rank == (0 if case.endswith("dp=0") else None)


def test_the_newest_fields_are_read():
    """Tier, group, kind, window, LoRA and locality of the fullest golden payload."""
    event = decode(bytes.fromhex(GOLDEN["0.33.0"]["stored_full|dp=0"]), LIMITS).events[0]
    assert isinstance(event, Stored)
    assert (event.tier, event.group, event.kind, event.window_tokens) == (Tier.GPU, 1, Kind.SLIDING_WINDOW, 128)
    assert (event.lora, event.cache_salt, event.extra) == ("ad", None, [])
    assert event.parent == (81985529216486895).to_bytes(8, "big")


@pytest.mark.parametrize("name", ["pod-a", "pod-b", "offload-selfdesc0", "offload-selfdesc1"])
def test_recorded_messages_decode_whole(name: str):
    """Nothing that a real engine sent is rejected."""
    frames = msgpack.Unpacker(io.BytesIO(gzip.decompress((DATA / f"{name}.frames.gz").read_bytes())), raw=True)
    for _, _, payload in frames:
        batch = decode(payload, LIMITS)
        assert batch.events
        assert not batch.rejected


def test_a_cache_salt_is_taken_from_the_first_block_of_a_prompt_alone():
    """Later strings are kept verbatim: they are no salts."""
    assert one(stored(extra_keys=[["tenant"], None])).cache_salt == "tenant"
    later = one(stored(parent_block_hash=5, extra_keys=[["x"], None]))
    assert later.cache_salt is None
    assert later.extra == [[("raw", "x")], []]


def test_multimodal_items_and_the_lora_name_are_told_apart():
    """The adapter's name leads the list and belongs to the root; pairs are items with their offset."""
    event = one(stored(lora_name="ad", extra_keys=[["ad", ["img", -3], "salt"], ["ad", b"\x01" * 32]]))
    assert event.lora == "ad"
    assert event.cache_salt == "salt"
    assert event.extra == [[("mm", "img", -3)], [("raw", b"\x01" * 32)]]


# --- hashes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (bytes(range(32)), bytes(range(32))),
        (0, bytes(8)),
        (5, b"\0" * 7 + b"\x05"),
        (2**32 - 1, b"\0\0\0\0\xff\xff\xff\xff"),
        (2**64 - 1, b"\xff" * 8),
        (-1, b"\xff" * 8),
        (-(2**63), b"\x80" + b"\0" * 7),
    ],
)
def test_hashes_of_any_width_are_accepted_and_bytes_are_never_cut(value: int | bytes, key: bytes):
    """Ints become 8 bytes, bytes stay as they are."""
    assert engine_key(value) == key
    assert one(stored(block_hashes=[value, 9])).keys[0] == key


# --- arrays ------------------------------------------------------------------------------------------------------

ARRAY = ["BlockStored", [7, 8], None, list(range(8)), 4, None, "CPU", "ad", [None, None], 2, "mamba", None, "LOCAL"]


@pytest.mark.parametrize("length", [5, 6, 7, 8, 9, 10, 12, 13])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_arrays_of_any_length_decode(length: int, engine: str):
    """What is not there has its default."""
    event = one(ARRAY[:length], engine)
    assert event.keys == [engine_key(7), engine_key(8)]
    assert event.tier == (Tier.CPU if length > 6 else Tier.GPU)
    assert event.group == (2 if length > 9 else 0)
    assert one([*ARRAY, "more", {"later": 1}], engine).group == 2


def test_batches_of_two_three_and_more_elements_decode():
    """The rank is optional and further elements are ignored."""
    for tail in ([], [3], [None, "x"], [1, {}]):
        batch = decode(msgpack.packb([1.0, [ARRAY], *tail]), LIMITS)
        assert len(batch.events) == 1
        assert batch.dp_rank == (tail[0] if tail else None)


# --- what cannot be used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        stored(group_idx=-1),
        stored(group_idx=70_000),
        stored(medium=7),
        stored(token_ids="text"),
        stored(token_ids=[1, "two"]),
        stored(token_ids=[-1] * 8),
        stored(block_size=-4),
        stored(block_hashes=[1.5]),
        stored(extra_keys=[["x"]]),
        {"type": "BlockTeleported"},
        {"no": "type"},
        ["BlockRemoved"],
        [],
        "text",
        None,
        12,
    ],
)
def test_a_bad_event_is_rejected_alone_with_its_bytes(bad: Any):
    """The events before and after it are kept; its own bytes and a reason come back."""
    batch = decode(msgpack.packb([1.0, [stored(), bad, ["AllBlocksCleared"]], 0]), LIMITS)
    assert [type(event) for event in batch.events] == [Stored, Cleared]
    assert [rejected.raw for rejected in batch.rejected] == [msgpack.packb(bad)]
    assert batch.rejected[0].reason


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93", msgpack.packb({}), msgpack.packb([1.0]), b"\x91" * 5000])
def test_what_is_no_batch_is_an_error(payload: bytes):
    """Empty, truncated, foreign and endlessly nested payloads are refused as a whole."""
    with pytest.raises(WireError):
        decode(payload, LIMITS)


def test_limits_are_named():
    """A message over a limit says which one and how large it is."""
    payload = msgpack.packb([1.0, [stored()] * 3, 0])
    with pytest.raises(LimitError, match="limit of 10 bytes"):
        decode(payload, Limits(message_bytes=10))
    with pytest.raises(LimitError, match="3 events"):
        decode(payload, Limits(events_per_batch=2))
    assert len(decode(payload, Limits(tokens_per_event=7)).rejected) == 3
    assert len(decode(payload, Limits(keys_per_event=1)).rejected) == 3


@given(st.binary(max_size=300))
def test_random_bytes_never_do_worse_than_an_error(payload: bytes):
    """Whatever arrives, decoding returns or raises WireError."""
    with contextlib.suppress(WireError):
        decode(payload, LIMITS)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=20,
)


@given(st.lists(json_like, max_size=5))
def test_random_events_are_decoded_or_rejected_one_by_one(events: list[Any]):
    """No event is lost: each is either used or rejected."""
    batch = decode(msgspec.msgpack.encode([1.0, events, None]), LIMITS)
    assert len(batch.events) + len(batch.rejected) == len(events)


def test_masked_tokens_and_placeholders():
    """Tokens that do not line up with the keys are masked; none at all is a placeholder, which is not."""
    assert one(stored(token_ids=list(range(12)))).masked
    assert not one(stored(token_ids=[], block_size=0)).masked


@pytest.mark.parametrize(
    ("medium", "locality", "tier"),
    [
        (None, None, Tier.GPU),
        ("", None, Tier.GPU),
        ("GPU", None, Tier.GPU),
        ("cpu", None, Tier.CPU),
        ("FS", None, Tier.DISK),
        ("STORAGE", "LOCAL", Tier.DISK),
        ("STORAGE", "REMOTE", Tier.SHARED),
        ("SHARED_STORAGE", None, Tier.SHARED),
        ("OBJ", None, Tier.SHARED),
        ("OBJECT_STORE", None, Tier.SHARED),
        ("TAPE", None, Tier.UNKNOWN),
    ],
)
def test_tiers(medium: str | None, locality: str | None, tier: Tier):
    """A medium nobody knows is unknown, never the GPU."""
    assert tier_of(medium, locality) is tier


def test_the_rank_is_read_without_the_events():
    """Also where the events are unreadable; None where there is no batch."""
    assert peek_rank(msgpack.packb([1.0, ["garbage"], 3])) == 3
    assert peek_rank(b"\xc1") is None


def test_encoding_gives_what_decoding_reads():
    """The publisher's batches are those of the newest engine: an array around maps."""
    payload = encode_batch(2.5, [stored()], 1)
    assert payload[0] == 0x93
    batch = decode(payload, LIMITS)
    assert (batch.timestamp, batch.dp_rank) == (2.5, 1)
    assert batch.events[0] == one(stored())
    assert batch.events[0].tokens == struct.pack("<8I", *range(8))  # type: ignore[union-attr]
