"""The object tier on a store in memory: round trips, verification, faults, and what it asks of the store."""

from __future__ import annotations

import itertools
import random
import threading

import obstore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.errors import SettingsError
from kvatlas.connector.errors import LayoutError
from kvatlas.connector.files import layout
from kvatlas.connector.files.blocks import BlockBuffers, Missing
from kvatlas.connector.files.fs import Buffer
from kvatlas.connector.files.usage import decode, usage_key
from kvatlas.connector.objects import bodies
from kvatlas.connector.objects.client import DeniedError, ObjectStoreError
from kvatlas.connector.objects.settings import ObjectTierSettings, split_url
from kvatlas.connector.objects.tier import ObjectTier
from kvatlas.connector.outcome import OffloadTier, Outcome, Result, Results
from tests.connector.conftest import FINGERPRINT, WAIT, Fleet, block, key, payload, target
from tests.connector.objects.conftest import Bucket, refuse


def store(tier: ObjectTier, numbers: list[int], **kwargs: int) -> Results:
    """Store blocks by number and wait."""
    return tier.store([block(number, **kwargs) for number in numbers]).result(WAIT)


def load(tier: ObjectTier, number: int, size: int = 8192) -> tuple[Result, bytes]:
    """Load one block and return its result and what is in its memory."""
    wanted, memory = target(number, size)
    return tier.load([wanted]).result(WAIT)[wanted.key], bytes(memory)


def damage(bucket: Bucket, tier: ObjectTier, number: int, at: int) -> None:
    """Flip a bit of a block's object."""
    data = bytearray(obstore.get(bucket.objects.store, tier.path(key(number))).bytes())
    data[at] ^= 1
    obstore.put(bucket.objects.store, tier.path(key(number)), bytes(data))


@pytest.mark.parametrize("size", [1, 4095, 4096, 8192, 100_000, (1 << 20) - 4096, 1 << 20, 3 << 20])
def test_what_was_stored_comes_back(bucket: Bucket, size: int) -> None:
    """Blocks of any size come back byte for byte, as one answer or as several ranges."""
    tier = bucket.tier(range_bytes=1 << 20)
    results = store(tier, [1, 2, 3], size=size)
    assert {result.outcome for result in results.values()} == {Outcome.STORED}
    for number in (1, 2, 3):
        result, found = load(tier, number, size)
        assert result == Result(Outcome.LOADED, tier=OffloadTier.OBJECT)
        assert found == payload(number, size)
    ranged = [name for name, _ in bucket.objects.asked if name == "get_ranges"]
    assert len(ranged) == (3 if size + 4096 > 1 << 20 else 0)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 240), max_size=5),
)
def test_a_payload_in_pieces_fills_a_block_in_parts(sizes: list[int], cuts: list[int]) -> None:
    """However an answer is cut and however a block's memory is, each byte comes to its place."""
    data = random.Random(len(cuts)).randbytes(sum(sizes))
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces: list[Buffer] = [memoryview(data)[a:b] for a, b in itertools.pairwise(edges)]
    memories = [bytearray(size) for size in sizes]
    bodies.fill(BlockBuffers(b"k", [memoryview(memory) for memory in memories]), pieces)
    assert b"".join(memories) == data


def test_nothing_is_listed(bucket: Bucket) -> None:
    """Starting, storing, looking up, loading, evicting and closing ask for objects by name only."""
    tier = bucket.tier()
    store(tier, [1, 2])
    tier.lookup([key(1), key(9)])
    load(tier, 1)
    load(tier, 9)
    tier.evict([key(1)])
    tier.close()
    assert "list" not in {name for name, _ in bucket.objects.asked}


def test_a_restarted_engine_finds_its_blocks(bucket: Bucket) -> None:
    """Another engine with the same fingerprint finds, verifies, announces and loads what the first stored."""
    store(bucket.tier(), [1])
    bucket.changes.clear()
    second = bucket.tier()
    assert second.lookup([key(1), key(2)]) == {key(1): True, key(2): False}
    assert not bucket.changes  # a header alone is not announced
    assert store(second, [1])[key(1)].outcome is Outcome.EXISTS
    assert bucket.announced() == {key(1)}
    assert load(second, 1)[1] == payload(1)


def test_another_fingerprint_sees_nothing(bucket: Bucket) -> None:
    """Blocks of another dtype have another prefix."""
    store(bucket.tier(), [1])
    other = bucket.tier(fingerprint=layout.Fingerprint(**{**FINGERPRINT.__dict__, "dtype": "float8"}))
    assert other.lookup([key(1)]) == {key(1): False}


def test_a_foreign_manifest_is_refused(bucket: Bucket) -> None:
    """A prefix whose manifest says something else is not used."""
    obstore.put(bucket.objects.store, f"{FINGERPRINT.directory()}/manifest.json", b"{}")
    with pytest.raises(LayoutError, match="another engine set-up"):
        bucket.tier()


@pytest.mark.parametrize("at", [0, 9, 70, 150, 4096, 8192])
def test_a_damaged_object_is_a_miss_and_is_removed(bucket: Bucket, at: int) -> None:
    """A flipped bit anywhere is a miss, is counted and announced, and the next store writes the block anew."""
    tier = bucket.tier()
    store(tier, [1])
    damage(bucket, tier, 1, at)
    assert load(tier, 1)[0].outcome is Outcome.MISS
    assert tier.metrics.counts["corrupt"] == 1
    assert bucket.announced() == set()
    assert store(tier, [1])[key(1)].outcome is Outcome.STORED
    assert load(tier, 1) == (Result(Outcome.LOADED, tier=OffloadTier.OBJECT), payload(1))


def test_a_store_finds_damage_of_an_earlier_run(bucket: Bucket) -> None:
    """What is there already is read through once before it is announced; damage is written over."""
    first = bucket.tier()
    store(first, [1])
    damage(bucket, first, 1, 5000)
    bucket.changes.clear()
    second = bucket.tier()
    assert store(second, [1])[key(1)].outcome is Outcome.STORED
    assert bucket.announced() == {key(1)}
    assert load(second, 1)[1] == payload(1)


@pytest.mark.parametrize("length", [0, 100, 4096, 8000])
@pytest.mark.parametrize("ranges", [1 << 20, 32 << 20])
def test_a_truncated_object_is_a_miss(bucket: Bucket, length: int, ranges: int) -> None:
    """An object that ends early is a miss, with one request or with several."""
    size = 2 << 20
    tier = bucket.tier(range_bytes=ranges)
    store(tier, [1], size=size)
    data = bytes(obstore.get(bucket.objects.store, tier.path(key(1))).bytes())
    obstore.put(bucket.objects.store, tier.path(key(1)), data[:length])
    assert load(tier, 1, size)[0].outcome is Outcome.MISS
    assert bucket.announced() == set()


def test_an_object_under_a_wrong_name_is_a_miss(bucket: Bucket) -> None:
    """A whole block of another name does not serve."""
    tier = bucket.tier()
    store(tier, [1])
    obstore.copy(bucket.objects.store, tier.path(key(1)), tier.path(key(2)))
    assert load(tier, 2)[0].outcome is Outcome.MISS
    assert load(tier, 1)[0].outcome is Outcome.LOADED


def test_a_copied_folder_serves(bucket: Bucket, fleet: Fleet) -> None:
    """The files of a folder, one block each, are a bucket's objects; a segment of several blocks is let be."""
    tier = bucket.tier()
    for per_file, numbers in ((1, [1]), (2, [2, 3])):
        files = fleet.tier(blocks_per_file=per_file)
        files.store([block(number) for number in numbers]).result(WAIT)
        for number in numbers:
            data = (files.directory / layout.block_path(key(number))).read_bytes()
            obstore.put(bucket.objects.store, tier.path(key(number)), data)
    assert load(tier, 1)[1] == payload(1)
    assert load(tier, 2)[0].outcome is Outcome.MISS
    assert "corrupt" not in tier.metrics.counts


def test_an_object_that_is_gone_is_announced(bucket: Bucket) -> None:
    """What a life-cycle rule removed is a miss, and its end is announced."""
    tier = bucket.tier()
    store(tier, [1, 2])
    obstore.delete(bucket.objects.store, [tier.path(key(1)), tier.path(key(2))])
    assert load(tier, 1)[0].outcome is Outcome.MISS
    assert tier.lookup([key(2)]) == {key(2): False}
    assert bucket.announced() == set()
    assert tier.metrics.counts["vanished"] == 2


def test_a_failing_request_is_a_failure_and_the_block_is_not_promised(bucket: Bucket) -> None:
    """A load that fails says so, and lookups say no for a while; the object stays."""
    tier = bucket.tier(distrust_seconds=30.0)
    store(tier, [1])
    bucket.objects.faults["get"] = refuse(ObjectStoreError("503"))
    assert load(tier, 1)[0] == Result(Outcome.FAILED, "503")
    bucket.objects.faults.clear()
    assert tier.lookup([key(1)]) == {key(1): False}
    bucket.monotonic += 31
    assert tier.lookup([key(1)]) == {key(1): True}
    assert bucket.announced() == {key(1)}


def test_a_store_that_is_away_is_left_alone(bucket: Bucket) -> None:
    """After failures in a row nothing is asked until the pause ends; lookups say no, stores are shed."""
    tier = bucket.tier(pause_failures=2, pause_seconds=10.0)
    store(tier, [1])
    for name in ("get", "put"):
        bucket.objects.faults[name] = refuse(ObjectStoreError("connection refused"))
    for number in (2, 3):
        assert store(tier, [number])[key(number)].outcome is Outcome.FAILED
    asked = len(bucket.objects.asked)
    assert store(tier, [4])[key(4)].outcome is Outcome.SHED
    assert tier.lookup([key(1)]) == {key(1): False}
    assert load(tier, 1)[0].outcome is Outcome.FAILED
    assert len(bucket.objects.asked) == asked
    bucket.objects.faults.clear()
    bucket.monotonic += 11
    assert load(tier, 1)[0].ok
    assert store(tier, [4])[key(4)].ok


def test_a_store_that_is_away_at_start_comes_back(bucket: Bucket) -> None:
    """An engine starts without its object store, and uses it once it answers."""
    bucket.objects.faults["get"] = refuse(ObjectStoreError("connection refused"))
    tier = bucket.tier()
    bucket.objects.faults.clear()
    assert store(tier, [1])[key(1)].outcome is Outcome.STORED


def test_without_the_right_to_write_blocks_are_loaded(bucket: Bucket) -> None:
    """Read-only credentials: loads go on, stores fail without an attempt, damage is only distrusted."""
    first = bucket.tier()
    store(first, [1, 2])
    damage(bucket, first, 2, 5000)
    obstore.delete(bucket.objects.store, f"{first.directory}/manifest.json")
    bucket.objects.faults["put"] = refuse(DeniedError("403"))
    tier = bucket.tier()
    assert tier.read_only
    assert load(tier, 1)[0].ok
    asked = len(bucket.objects.asked)
    assert store(tier, [3])[key(3)].outcome is Outcome.FAILED
    assert len(bucket.objects.asked) == asked
    assert load(tier, 2)[0].outcome is Outcome.MISS
    assert tier.lookup([key(2)]) == {key(2): False}
    assert obstore.head(bucket.objects.store, tier.path(key(2)))


def test_a_lookup_that_said_no_spares_the_store_a_request(bucket: Bucket) -> None:
    """What was looked for a moment ago is stored with one request; later it is asked for first."""
    tier = bucket.tier(absent_seconds=5.0)
    tier.lookup([key(1)])
    bucket.objects.asked.clear()
    store(tier, [1])
    assert [name for name, _ in bucket.objects.asked] == ["put"]
    tier.lookup([key(2)])
    bucket.monotonic += 6
    bucket.objects.asked.clear()
    store(tier, [2])
    assert [name for name, _ in bucket.objects.asked] == ["get", "put"]


def test_lookups_go_out_together(bucket: Bucket) -> None:
    """The requests of one lookup wait for the store side by side."""
    together = threading.Barrier(4)
    tier = bucket.tier(threads=4)
    bucket.objects.faults["get"] = lambda _: together.wait(WAIT)
    assert tier.lookup([key(number) for number in range(4)]) == dict.fromkeys(map(key, range(4)), False)


def test_too_many_waiting_stores_are_shed(bucket: Bucket) -> None:
    """Stores beyond the bound are dropped before anything is sent."""
    tier = bucket.tier(threads=1, queued_write_bytes=8192)
    gate = threading.Event()
    bucket.objects.faults["put"] = lambda _: gate.wait(WAIT)
    future = tier.store([block(number) for number in range(6)])
    gate.set()
    outcomes = [result.outcome for result in future.result(WAIT).values()]
    assert outcomes.count(Outcome.SHED) >= 4
    assert set(outcomes) <= {Outcome.SHED, Outcome.STORED}


def test_closing_ends_every_future(bucket: Bucket) -> None:
    """What has not begun is cancelled."""
    tier = bucket.tier(threads=1)
    gate, began = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        began.set()
        gate.wait(WAIT)

    bucket.objects.faults["get"] = hold
    future = tier.load([target(number)[0] for number in range(4)])
    assert began.wait(WAIT)
    closing = threading.Thread(target=tier.close)
    closing.start()
    gate.set()
    outcomes = {result.outcome for result in future.result(WAIT).values()}
    closing.join(WAIT)
    assert outcomes == {Outcome.MISS, Outcome.CANCELLED}
    assert tier.store([block(1)]).result(WAIT)[key(1)].outcome is Outcome.CANCELLED
    assert tier.load([target(1)[0]]).result(WAIT)[key(1)].outcome is Outcome.CANCELLED


def test_uses_are_written_now_and_then(bucket: Bucket) -> None:
    """Uses go to one object per writer, at most every so many seconds, and what closes writes the rest."""
    tier = bucket.tier(usage_seconds=60.0)
    store(tier, [1])
    assert not list(obstore.list(bucket.objects.store, f"{tier.directory}/usage"))
    bucket.monotonic += 61
    bucket.now_ns += 61_000_000_000
    tier.touch([key(1)])
    assert tier.drain(WAIT)
    tier.close()
    (chunk,) = list(obstore.list(bucket.objects.store, f"{tier.directory}/usage"))
    (meta,) = chunk
    found = decode(bytes(obstore.get(bucket.objects.store, meta["path"]).bytes()))
    assert found == {usage_key(key(1)): bucket.now_ns}


def test_the_newest_answer_of_a_racing_writer_counts(bucket: Bucket) -> None:
    """Ranges of two generations of an object are no damage: the block is read once more as one answer."""
    size = 3 << 20
    tier = bucket.tier(range_bytes=1 << 20)
    store(tier, [1], size=size)
    plain = bucket.objects.get_ranges

    def torn(path: str, starts: list[int], lengths: list[int]) -> list[memoryview]:
        parts = plain(path, starts, lengths)
        return [*parts[:-1], memoryview(bytes(len(parts[-1])))]

    bucket.objects.get_ranges = torn  # type: ignore[method-assign]
    assert load(tier, 1, size) == (Result(Outcome.LOADED, tier=OffloadTier.OBJECT), payload(1, size))


@given(st.binary(max_size=300))
def test_any_bytes_are_damage_or_missing(data: bytes) -> None:
    """Whatever an object's header holds, it is judged and never an exception of another kind."""
    with pytest.raises((bodies.Damaged, Missing)):
        bodies.check_header(memoryview(data), len(data), FINGERPRINT.digest(), b"k")


@pytest.mark.parametrize(
    ("url", "wanted"),
    [("s3://b", ("b", "")), ("s3://b/", ("b", "")), ("s3://b/p/q/", ("b", "p/q"))],
)
def test_addresses(url: str, wanted: tuple[str, str]) -> None:
    """Bucket and prefix of an address."""
    assert split_url(url) == wanted


@pytest.mark.parametrize("url", ["", "/mnt/kv", "s3://", "gs://b", "s3://key:secret@b/p", "s3://b?region=x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    """Anything else is refused, credentials in the address too."""
    with pytest.raises(SettingsError, match="s3://bucket/prefix"):
        ObjectTierSettings(url=url)


@pytest.mark.parametrize(
    "settings", [{"threads": 0}, {"threads": 2, "write_threads": 3}, {"part_bytes": 1 << 20}, {"range_bytes": 1}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int]) -> None:
    """Numbers that a store would refuse later are refused at once."""
    with pytest.raises(SettingsError):
        ObjectTierSettings(url="s3://b", **settings)  # type: ignore[arg-type]
