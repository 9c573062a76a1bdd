"""Batches stripped of their tokens mean what they meant before: both ways through the resolve agent."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import msgpack
import msgspec
import pytest

from kvatlas.bridge.ingest.recovered import Recovered, fold
from kvatlas.bridge.ingest.strip import KnownBlocks, Stripper
from kvatlas.bridge.model import records
from kvatlas.bridge.model.events import Limits
from kvatlas.streams.index.apply import is_meta

MODEL = "demo"
DATA = Path(__file__).parents[2] / "data" / "captures"


def _stripper(limit=10_000, size=16):
    return Stripper("vllm", MODEL, size, Limits(), KnownBlocks(limit))


def _payload(*events):
    return msgspec.msgpack.encode((1000.5, list(events), None))


def _both(world, batches, **options):
    """Send batches as they are to one pod and stripped to another; returns the world and the keyless count."""
    w, stripper, keyless = world(**options), _stripper(), 0
    for events in batches:
        w.send("p", *events)
        stripped = stripper.strip(_payload(*events))
        assert not stripped.rejected
        keyless += stripped.keyless
        w.raw("q", records.encode(stripped.batch), content_type="keys")
    return w, keyless


@pytest.mark.parametrize("size", [16, 32, 64])
def test_chains_tiers_and_removals_survive_stripping(world, make, size):
    """Blocks of one or several canonical blocks, children, a second tier and removals leave the same index."""
    run = make.run(1, size * 4)
    w, keyless = _both(
        world,
        [
            [make.stored([1, 2], run[: size * 2], size)],
            [make.stored([3, 4], run[size * 2 :], size, parent=2)],
            [make.stored([1, 2], [], 0, medium="CPU")],
            [make.removed([4])],
            [make.removed([1])],
        ],
    )
    keys = w.keys(run)
    assert keyless == 2  # the placeholders of the CPU tier
    assert any(w.held("p", keys))
    for key in keys:
        assert w.where("p", key) == w.where("q", key)


def test_extra_keys_salts_and_adapters_reach_the_keys(world, make):
    """LoRA, salt and multimodal items change the keys as they do with tokens, also over several canonical blocks."""
    run = make.run(1, 64)
    w, keyless = _both(
        world,
        [
            [make.stored([1], run[:16], 16, extra_keys=[["salt-a"]])],
            [make.stored([2], run[:16], 16, lora_name="lora", lora_id=1, extra_keys=[["lora"]])],
            [make.stored([3, 4], run, 32, extra_keys=[[["image", 20]], None])],
        ],
    )
    assert keyless == 0
    assert w.state("p").last_sequence == w.state("q").last_sequence == 2
    found = {key for view in w.index for key in view.values if not is_meta(key)}
    assert found
    for key in found:
        assert w.where("p", key) == w.where("q", key)


def test_what_cannot_be_keyed_is_a_missing_hit(world, make):
    """Unknown parents, masked tokens and sizes that do not fit leave no holder, and harm nothing around them."""
    run = make.run(1, 64)
    batch = [
        make.stored([8], run[:16], 16, parent=77),
        make.stored([9], run[:24], 24),
        make.stored([10, 11], run[:16], 16),
        make.stored([1], run[:16], 16),
    ]
    stripped = _stripper().strip(_payload(*batch))
    assert (stripped.keyless, stripped.rejected) == (4, [])
    w = world()
    w.raw("q", records.encode(stripped.batch), content_type="keys")
    assert not w.dead
    assert w.held("q", w.keys(run[:16])) == [True]
    w.raw("q", records.encode(_stripper().strip(_payload(make.removed([8, 9, 10]))).batch), content_type="keys")
    assert w.held("q", w.keys(run[:16])) == [True]


def test_a_known_block_behind_an_unknown_parent_goes_on(world, make):
    """The chain goes on from a block that is known itself, though its parent was forgotten."""
    run = make.run(1, 64)
    stripper = _stripper(limit=1)
    stripper.strip(_payload(make.stored([1, 2], run[:32], 16)))
    stripped = stripper.strip(_payload(make.stored([2, 3], run[16:48], 16, parent=1)))
    w = world()
    w.raw("q", records.encode(stripped.batch), content_type="keys")
    assert stripped.keyless == 0
    assert w.held("q", w.keys(run)) == [False, True, True, False]


def test_no_token_is_left(make):
    """Neither the batch nor what is said of rejected events holds a token id."""
    secret = 3_141_592_653
    good = make.stored([1], [secret] * 16, 16)
    bad = ["BlockStored", "no list", None, [secret], 16, None]
    stripped = _stripper().strip(_payload(good, bad))
    assert len(stripped.rejected) == 1
    everything = records.encode(stripped.batch) + stripped.rejected[0].encode()
    assert secret.to_bytes(4, "big") not in everything
    assert secret.to_bytes(4, "little") not in everything
    assert str(secret).encode() not in everything


def test_what_is_no_batch_comes_back_empty():
    """A message that cannot be read keeps its place in the sequence."""
    stripped = _stripper().strip(b"\xc1junk")
    assert stripped.batch.events == []
    assert len(stripped.rejected) == 1


def test_the_memory_is_bounded_and_forgets_what_was_removed_first():
    """Over the limit the removed go first, then the oldest."""
    known = KnownBlocks(3)
    for number in range(3):
        known.put(16, b"%d" % number, b"k" * 16)
    known.removed(b"2")
    known.put(16, b"3", b"k" * 16)
    assert len(known) == 3
    assert known.get(16, b"2") is None
    assert known.get(16, b"0") is not None
    known.put(16, b"4", b"k" * 16)
    assert known.get(16, b"0") is None


def test_known_blocks_are_read_back_from_the_log(make):
    """A bridge that takes over chains on from what the log holds; a restart of the engine forgets it."""
    run = make.run(1, 32)
    value = records.encode(_stripper().strip(_payload(make.stored([1], run[:16], 16))).batch)
    pods: dict[str, Recovered] = {}
    start = records.encode(records.Control(type="start", incarnation=5))
    fold(pods, b"p", start, {"content_type": b"control"}, (0, 0), known_blocks=10)
    headers = {"content_type": b"keys", "incarnation": b"5", "sequence": b"0"}
    fold(pods, b"p", value, headers, (0, 1), known_blocks=10)
    blocks = pods["p"].blocks
    assert blocks is not None
    assert len(blocks) == 1
    assert pods["p"].record.last_event_ns == 1000_500_000_000
    again = Stripper("vllm", MODEL, 16, Limits(), blocks)
    assert again.strip(_payload(make.stored([2], run[16:], 16, parent=1))).keyless == 0
    restart = records.encode(records.Control(type="restart", incarnation=6))
    fold(pods, b"p", restart, {"content_type": b"control"}, (0, 2), known_blocks=10)
    assert pods["p"].blocks is None


@pytest.mark.parametrize("pod", ["pod-a", "pod-b"])
def test_recorded_engines_leave_the_same_index(world, pod):
    """A recorded stream leaves the same holders with and without its tokens."""
    recorded = msgpack.Unpacker(io.BytesIO(gzip.decompress((DATA / f"{pod}.frames.gz").read_bytes())), raw=True)
    w, stripper = world(), _stripper()
    for _, _, payload in list(recorded)[:400]:
        w.raw("p", payload)
        w.raw("q", records.encode(stripper.strip(payload).batch), content_type="keys")
    found = {key for view in w.index for key in view.values if not is_meta(key)}
    assert found
    for key in found:
        assert w.where("p", key) == w.where("q", key)
