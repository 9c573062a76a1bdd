"""What any precise index must answer, through the library over each backend and through the whole pipeline."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest

from kvatlas.scorer import Indexer
from kvatlas.scorer.library.backends import Backend, MemoryBackend
from kvatlas.scorer.library.backends.redis import RedisBackend
from kvatlas.scorer.library.backends.rocks import RocksBackend
from tests.engine_events import stored
from tests.integration.cases_support import (
    CLEARED,
    HALF,
    Library,
    Options,
    Pipeline,
    Subject,
    World,
    follower,
    library_options,
    removed,
)
from tests.integration.pipeline_support import DATA
from tests.integration.redis_support import RedisServer

pytestmark = pytest.mark.timeout(600)  # the first test on a pipeline starts it

Deploy = Callable[..., World]
SUBJECTS = ("memory", "memory-bytes", "rocksdb", "redis", "valkey", "pipeline", "replica", "mirror")


def tokens(first: int, last: int) -> list[int]:
    """Token ids first to last, both included."""
    return list(range(first, last + 1))


@pytest.fixture(scope="module")
def pipelines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, servers: Any) -> Iterator[Any]:
    """Makes the pipeline of some options at first use, one for the module."""
    made: dict[Options, Pipeline] = {}

    def get(options: Options) -> Pipeline:
        if options not in made:
            brokers = request.getfixturevalue("brokers")
            folder = tmp_path_factory.mktemp("pipeline")
            made[options] = Pipeline(brokers, f"t{os.getpid()}-{folder.name}-", folder, options, servers("redis").url)
        return made[options]

    yield get
    for pipeline in made.values():
        pipeline.close()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Makes the server of a kind at first use."""
    made: dict[str, RedisServer] = {}

    def get(kind: str) -> RedisServer:
        if kind not in made:
            made[kind] = RedisServer(tmp_path_factory.mktemp(kind), kind)
            made[kind].start()
        return made[kind]

    yield get
    for server in made.values():
        server.kill()


@pytest.fixture(params=SUBJECTS)
def deploy(request: pytest.FixtureRequest, tmp_path: Path, pipelines: Any, servers: Any) -> Iterator[Deploy]:
    """Makes a world on the subject: ``deploy(block_size=64)``."""
    kind = request.param
    libraries: list[Library] = []

    def backend() -> Backend:
        if kind == "memory":
            return MemoryBackend()
        if kind == "memory-bytes":
            return MemoryBackend(None, max_bytes=64 * 1024 * 1024)
        if kind == "rocksdb":
            return RocksBackend(tmp_path / f"index-{len(libraries)}", cache_bytes=8 * 1024 * 1024)
        return RedisBackend(servers(kind).url, prefix=f"{tmp_path.name}-{len(libraries)}")

    def make(model: str = "", **fields: Any) -> World:
        options = Options(**fields)
        subject: Subject
        if kind == "pipeline":
            subject = pipelines(options)
        elif kind in ("replica", "mirror"):
            libraries.append(follower(kind, pipelines(options), options, model))
            subject = libraries[-1]
        else:
            libraries.append(Library(lambda: Indexer(backend(), library_options(options, model))))
            subject = libraries[-1]
        return World(subject, options, model)

    yield make
    for library in libraries:
        library.close()


# --- scoring ------------------------------------------------------------------------------------------------------


def test_01_best_tier_of_each_block_and_no_score_without_the_first(deploy: Deploy):
    """Weights gpu 1, cpu 0.5: a block on both counts as gpu; a pod that lacks the first block is absent."""
    world = deploy(HALF)
    prompt = tokens(1, 96)
    world.send("a", stored(range(1, 7), prompt, 16), removed(4, 5), stored([3], [], 16, medium="CPU"))
    world.send("b", stored(range(1, 7), prompt, 16), stored([4, 5], [], 16, medium="CPU"), removed(1, 2, 3, 4, 5, 6))
    world.settle("a", "b")
    assert world.score(prompt) == {"a": 3.0}
    world.send("a", removed(3))
    world.settle("a")
    assert world.score(prompt) == {"a": 2.5}


def test_02_default_weights_filters_and_nothing(deploy: Deploy):
    """A block on gpu and one on cpu give 1.8; a hole ends the match; filters choose; no hit is an empty answer."""
    world = deploy()
    prompt = tokens(1, 48)
    world.send("a", stored([1, 2], prompt[:32], 16), stored([2], [], 16, medium="CPU"), removed(2))
    world.settle("a")
    assert world.score(prompt) == {"a": 1.8}
    world.send("a", stored([2], prompt[16:32], 16, 1), stored([3], prompt[32:], 16, 2))
    world.send("b", stored([1, 2, 3], prompt, 16), removed(2))
    world.settle("a", "b")
    assert world.score(prompt) == {"a": 3.0, "b": 1.0}
    assert world.score(prompt, pods=["a"]) == {"a": 3.0}
    assert world.score(tokens(9000, 9100)) == {}


def test_03_an_unknown_medium_counts_a_tenth(deploy: Deploy):
    """0.1 a block."""
    world = deploy()
    world.send("a", stored([1, 2], tokens(1, 32), 16, medium="PUNCH_CARDS"))
    world.settle("a")
    assert world.score(tokens(1, 32)) == {"a": 0.2}


def test_04_no_cap_on_pods_a_block(deploy: Deploy):
    """64 pods with 4 groups on 2 tiers each all score."""
    world = deploy()
    pods = [f"p{number}" for number in range(64)]
    batch = []
    for pod in pods:
        events = [stored([1], tokens(1, 16), 16, group_idx=group) for group in range(4)]
        events += [stored([1], [], 16, medium="CPU", group_idx=group) for group in range(4)]
        batch.append(world.record(pod, msgspec.msgpack.encode((1.0, events, None))))
    world.subject.send(batch)
    world.settle(*pods[-8:])
    for _ in range(200):
        if len(found := world.score(tokens(1, 16))) == 64:
            break
        world.settle(pods[0])
    assert found == dict.fromkeys(pods, 1.0)
    assert len(world.holders(tokens(1, 16))[0]) == 64 * 8


# --- block sizes --------------------------------------------------------------------------------------------------


def test_05_small_engine_blocks(deploy: Deploy):
    """C 64, E 16: removing the first of four engine blocks takes its canonical block, and its hash resolves no more."""
    world = deploy(block_size=64)
    world.send("a", stored(range(100, 108), tokens(1, 128), 16))
    world.settle("a")
    assert world.score(tokens(1, 128)) == {"a": 2.0}
    world.send("a", removed(100))
    world.settle("a")
    assert [len(block) for block in world.holders(tokens(1, 128))] == [0, 1]
    world.send("a", stored([100], [], 16, medium="CPU"))
    world.settle("a")
    assert [len(block) for block in world.holders(tokens(1, 128))] == [0, 1]


def test_06_large_engine_blocks(deploy: Deploy):
    """C 64, E 128: a hash covers two keys and is a parent by its last; less than a canonical block is nothing yet."""
    world = deploy(block_size=64)
    world.send("a", stored([200], tokens(1, 128), 128))
    world.send("a", stored([201], tokens(129, 256), 128, 200))
    world.send("b", stored([300, 301, 302], tokens(1, 48), 16))
    world.settle("a", "b")
    assert world.score(tokens(1, 256)) == {"a": 4.0}
    world.send("a", removed(200))
    world.settle("a")
    assert [len(block) for block in world.holders(tokens(1, 256))] == [0, 0, 1, 1]


def test_07_engine_blocks_that_come_one_by_one(deploy: Deploy):
    """Indexed with the fourth, gone with any of the four."""
    world = deploy(block_size=64)
    for number in range(4):
        world.settle("a")
        assert world.score(tokens(1, 64)) == {}
        at = number * 16
        world.send("a", stored([100 + number], tokens(at + 1, at + 16), 16, 99 + number if number else None))
    world.settle("a")
    assert world.score(tokens(1, 64)) == {"a": 1.0}
    world.send("a", removed(102))
    world.settle("a")
    assert world.score(tokens(1, 64)) == {}


def test_08_pods_of_different_block_sizes_meet(deploy: Deploy):
    """The same tokens as 8 hashes and as 4: both pods under both keys."""
    world = deploy(block_size=64)
    world.send("a", stored(range(100, 108), tokens(1, 128), 16))
    world.send("b", stored(range(200, 204), tokens(1, 128), 32))
    world.settle("a", "b")
    assert world.holders(tokens(1, 128)) == [{("a", "gpu", 0), ("b", "gpu", 0)}] * 2


def test_09_only_full_blocks_have_keys(deploy: Deploy):
    """At C 64, 75 tokens are one block and 128 are two."""
    world = deploy(block_size=64)
    assert [len(world.holders(tokens(1, count))) for count in (63, 75, 128)] == [0, 1, 2]


# --- tiers, groups, clears ----------------------------------------------------------------------------------------


def test_10_a_second_tier_by_hash_alone(deploy: Deploy):
    """A store without tokens adds a tier; removals go tier by tier; what is unknown has no effect."""
    world = deploy(block_size=64)
    prompt, hashes = tokens(1, 64), (700, 701, 702, 703)
    world.send("a", stored(hashes, prompt, 16), stored(hashes, [], 16, medium="CPU"))
    world.settle("a")
    assert world.holders(prompt) == [{("a", "gpu", 0), ("a", "cpu", 0)}]
    world.send("a", removed(*hashes))
    world.settle("a")
    assert world.holders(prompt) == [{("a", "cpu", 0)}]
    world.send("a", removed(*hashes, medium="CPU"), removed(999), stored([998], [], 16, medium="CPU"))
    world.settle("a")
    assert world.holders(prompt) == [set()]
    world.send("a", stored(hashes, [], 16))  # the mapping went with the last tier
    world.settle("a")
    assert world.holders(prompt) == [set()]


def test_11_groups_are_apart(deploy: Deploy):
    """Removing a group, or a tier, leaves the others of the pod."""
    world = deploy()
    prompt = tokens(1, 16)
    world.send("a", stored([1], prompt, 16, group_idx=0), stored([1], prompt, 16, group_idx=1), removed(1, group_idx=0))
    world.send("b", stored([1], prompt, 16), stored([1], [], 16, medium="CPU"), removed(1, medium="CPU"))
    world.settle("a", "b")
    assert world.holders(prompt) == [{("a", "gpu", 1), ("b", "gpu", 0)}]


def test_12_a_clear_ends_one_pod_s_entries(deploy: Deploy):
    """On the GPU, as vLLM means it, in every group; other tiers and pods stay, and storing again shows again."""
    world = deploy()
    prompt = tokens(1, 16)
    world.send("a", stored([1], prompt, 16), stored([1], [], 16, medium="CPU"), stored([1], prompt, 16, group_idx=1))
    world.send("b", stored([1], prompt, 16))
    world.send("a", CLEARED)
    world.settle("a", "b")
    assert world.holders(prompt) == [{("a", "cpu", 0), ("b", "gpu", 0)}]
    world.send("a", stored([1], prompt, 16))
    world.settle("a")
    assert world.holders(prompt) == [{("a", "cpu", 0), ("a", "gpu", 0), ("b", "gpu", 0)}]


def test_12_an_update_from_before_a_clear_comes_late(deploy: Deploy):
    """It changes nothing, and does not stand in the way of what is stored after the clear."""
    world = deploy()
    prompt = tokens(1, 16)
    late = world.record("a", msgspec.msgpack.encode((1.0, [stored([1], prompt, 16)], None)))
    world.subject.send([late])
    world.send("a", CLEARED)
    world.subject.send([late])
    world.settle("a")
    assert world.holders(prompt) == [set()]
    world.send("a", stored([1], prompt, 16))
    world.subject.send([late])
    world.settle("a")
    assert world.score(prompt) == {"a": 1.0}


def test_13_copies_count_and_repetitions_do_not(deploy: Deploy):
    """Stored twice and removed once is still there; the same message twice is one announcement."""
    world = deploy()
    world.send("a", stored([1], tokens(1, 16), 16))
    world.send("a", stored([1], tokens(1, 16), 16))
    world.send("b", stored([2], tokens(101, 116), 16), sequence=0)
    world.send("b", stored([2], tokens(101, 116), 16), sequence=0)
    world.send("a", removed(1))
    world.send("b", removed(2))
    world.settle("a", "b")
    assert world.score(tokens(1, 16)) == {"a": 1.0}
    assert world.score(tokens(101, 116)) == {}


def test_14_a_hash_of_two_models(deploy: Deploy):
    """One pod's removal never touches the other's entry."""
    world = deploy()
    other = world.model + "-other"
    world.send("a", stored([1], tokens(1, 16), 16))
    world.send("b", stored([1], tokens(1, 16), 16), model=other)
    world.send("a", removed(1))
    world.settle("a")
    for _ in range(100):
        if found := world.score(tokens(1, 16), model=other):
            break
        world.settle("a")
    assert found == {"b": 1.0}
    assert world.score(tokens(1, 16)) == {}


def test_15_a_child_waits_for_its_parent(deploy: Deploy):
    """Neither dropped nor taken for a root; there once the parent is."""
    world = deploy()
    world.send("a", stored([2], tokens(17, 32), 16, 1))
    world.settle("a")
    assert world.score(tokens(17, 32)) == {}
    assert world.score(tokens(1, 32)) == {}
    world.send("a", stored([1], tokens(1, 16), 16))
    world.settle("a")
    assert world.score(tokens(1, 32)) == {"a": 2.0}


@pytest.mark.parametrize("deploy", [kind for kind in SUBJECTS if kind != "mirror"], indirect=True)
def test_16_what_is_predicted_and_what_is_told_are_apart(deploy: Deploy):
    """The end of a prediction leaves what was told of the same block, and a removal leaves what is predicted.

    A mirror's reader writes nothing, so it predicts nothing either.
    """
    world = deploy()
    prompt = tokens(1, 32)
    if isinstance(world.subject, Library):  # predictions are for pods without events: the other pod's is told
        told, predicted = "a", "b"
    else:
        told = predicted = "a"
    world.send(told, stored([1, 2], prompt, 16))
    world.settle(told)
    end = world.decide(predicted, prompt)
    assert world.found(prompt)[predicted].blocks == world.found(prompt)[told].blocks == 2
    world.send(told, removed(2))
    world.settle(told)
    assert world.found(prompt)[predicted].blocks == 2
    end()
    assert world.score(prompt) == {told: 1.0}


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine_hash", [bytes(range(32)), 7, -5, 2**64 - 1])
def test_17_hashes_of_every_form(deploy: Deploy, engine_hash: int | bytes):
    """Bytes are kept whole: one that begins alike is another."""
    world = deploy()
    other = engine_hash[:31] + b"\xff" if isinstance(engine_hash, bytes) else engine_hash // 2
    world.send("a", stored([engine_hash], tokens(1, 16), 16), stored([other], tokens(101, 116), 16), removed(other))
    world.settle("a")
    assert (world.score(tokens(1, 16)), world.score(tokens(101, 116))) == ({"a": 1.0}, {})


def test_18_arrays_of_every_length_and_bad_events(deploy: Deploy):
    """5 to 14 elements decode; an event with a wrong field goes alone."""
    world = deploy()
    rest = [None, "GPU", None, None, 0, "full_attention", None, None, "later", "still later"]
    for number, length in enumerate((5, 6, 7, 8, 12, 13, 14)):
        prompt = tokens(number * 100 + 1, number * 100 + 16)
        event = ["BlockStored", [number + 1], None, prompt, 16, *rest][:length]
        bad = [stored([90], tokens(1, 16), 16, group_idx=-1), stored([91], "text", 16), stored([92], [1], 16, medium=5)]
        world.send("a", *bad, event)
    world.settle("a")
    for number in range(7):
        assert world.score(tokens(number * 100 + 1, number * 100 + 16)) == {"a": 1.0}, number


def test_19_batches_of_every_length(deploy: Deploy):
    """2, 3 and 4 elements decode; what is no batch takes its sequence and harms nothing."""
    world = deploy()
    for number, rest in enumerate(([], [None], [0, "later"])):
        event = stored([number + 1], tokens(number * 100 + 1, number * 100 + 16), 16)
        world.raw("a", msgspec.msgpack.encode([1.0, [event], *rest]))
        world.raw("a", b"\xc1 nothing")
    world.settle("a")
    for number in range(3):
        assert world.found(tokens(number * 100 + 1, number * 100 + 16))["a"] == (1.0, 1, 0)


def test_20_an_image_changes_the_keys_from_its_block_on(deploy: Deploy):
    """Blocks before it are as without it; with another image, or none, the rest differs."""
    world = deploy()
    prompt = tokens(1, 64)
    extra = [None, None, [["image-a", 0]], None]
    world.send("a", stored([1, 2, 3, 4], prompt, 16, extra_keys=extra))
    world.settle("a")
    assert world.score(prompt) == {"a": 2.0}
    for name, blocks in (("image-a", 4), ("image-b", 2)):
        items = world.subject.multimodal([(name, 32, 16)])
        assert world.found(prompt, multimodal=items)["a"].blocks == blocks


def test_20_two_images_and_nothing_between(deploy: Deploy):
    """Images at [0, 32) and [48, 80) of 80 tokens: the blocks carry A, A, nothing, B, B."""
    world = deploy()
    prompt = tokens(1, 80)
    extra = [[["a", 0]], [["a", -16]], None, [["b", 0]], [["b", -16]]]
    world.send("a", stored([1, 2, 3, 4, 5], prompt, 16, extra_keys=extra))
    world.settle("a")
    assert world.score(prompt) == {}
    for second, blocks in (("b", 5), ("c", 3)):
        items = world.subject.multimodal([("a", 0, 32), (second, 48, 32)])
        assert world.found(prompt, multimodal=items)["a"].blocks == blocks


# --- epochs -------------------------------------------------------------------------------------------------------


def test_21_a_gap_halves_what_was_there(deploy: Deploy):
    """Older blocks count half and are flagged; stored again they count in full."""
    world = deploy()
    world.send("a", stored([1], tokens(1, 16), 16))
    world.control("a", "gap", lost=(1, 3))
    world.send("a", stored([2], tokens(17, 32), 16, 1))
    world.settle("a")
    assert world.found(tokens(1, 32)) == {"a": (1.5, 2, 1)}
    world.send("a", stored([1], tokens(1, 16), 16))
    world.settle("a")
    assert world.found(tokens(1, 32)) == {"a": (2.0, 2, 0)}


def test_21_strict_gaps_end_what_was_there(deploy: Deploy):
    """Older blocks score nothing."""
    world = deploy(strict_gaps=True)
    world.send("a", stored([1], tokens(1, 16), 16))
    world.control("a", "gap", lost=(1, 3))
    world.settle("a")
    assert world.found(tokens(1, 16)) == {}


def test_22_nothing_from_before_a_restart_scores(deploy: Deploy):
    """Also when a record of before comes late."""
    world = deploy()
    late = world.record("a", msgspec.msgpack.encode((1.0, [stored([5], tokens(501, 516), 16)], None)), sequence=7)
    world.send("a", stored([1], tokens(1, 16), 16), sequence=0)
    world.control("a", "restart")
    world.send("a", stored([2], tokens(101, 116), 16))
    world.subject.send([late])
    world.settle("a")
    assert world.score(tokens(1, 16)) == {}
    assert world.score(tokens(501, 516)) == {}
    assert world.score(tokens(101, 116)) == {"a": 1.0}


# --- a real engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pod", ["pod-a", "pod-b"])
def test_the_recorded_streams_give_the_engine_s_own_answers(deploy: Deploy, pod: str):
    """Every prompt that the engine was asked matches as many tokens as it reported itself."""
    world = deploy()
    frames = msgpack.Unpacker(io.BytesIO(gzip.decompress((DATA / f"{pod}.frames.gz").read_bytes())), raw=True)
    world.subject.send([world.record(pod, payload) for _, _, payload in frames])
    world.settle(pod)
    truth = json.loads(gzip.decompress((DATA / f"{pod}.truth.json.gz").read_bytes()))
    hits = 0
    for query in truth["queries"]:
        found = world.found(query["tokens"], cache_salt=query["cache_salt"])
        assert (found[pod].blocks * 16 if found else 0) == query["hit_tokens"]
        hits += bool(found)
    assert hits > 0
