"""Recorded streams of real engines, and cases made by hand: every query gets the engine's own answer."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kvatlas.bridge.ingest.strip import KnownBlocks, Stripper
from kvatlas.bridge.model import records
from kvatlas.bridge.model.block_key import KEY_BYTES, ahead_keys, block_keys, multimodal_extra, pack_tokens, root_key
from kvatlas.bridge.model.events import Limits
from kvatlas.bridge.model.topics import CONTENT_KEYS
from kvatlas.scorer.scoring.walk import Fleet, Weights, walk
from kvatlas.streams.index.view import DictView
from kvatlas.streams.resolve.fold import LogFold
from kvatlas.streams.resolve.message import parse_message

CAPTURES = Path(__file__).parents[2] / "data" / "captures"
SIZE = 16
CASES = sorted(path.name.removesuffix(".truth.json.gz") for path in (CAPTURES / "cases").glob("*.truth.json.gz"))
RECORDINGS = [
    "pod-a",
    "pod-b",
    "offload/vllm-offload-salt",
    "offload/vllm-full-report",
    "sglang/sglang-a",
    "sglang/sglang-b",
    "sglang/sglang-c",
    *(f"cases/{name}" for name in CASES),
]


class Recording:
    """One engine's messages, and what it answered after the last of them."""

    def __init__(self, name: str) -> None:
        self.truth: dict[str, Any] = json.loads(gzip.decompress((CAPTURES / f"{name}.truth.json.gz").read_bytes()))
        frames = io.BytesIO(gzip.decompress((CAPTURES / f"{name}.frames.gz").read_bytes()))
        self.frames = [
            (int.from_bytes(sequence, "big"), payload)
            for _, sequence, payload in msgpack.Unpacker(frames, raw=True, max_buffer_size=0)
        ]

    def send(self, world: Any, *, strip: bool = False, announcements: str | None = None) -> None:
        """Put every message on the log, as the bridge does it for this engine."""
        truth = self.truth
        engine, model = truth.get("engine", "vllm"), truth["model"]
        told = truth.get("announcements") if announcements is None else announcements
        headers = {"model": model, "engine": engine, **({"announcements": told} if told else {})}
        stripper = Stripper(engine, model, SIZE, Limits(), KnownBlocks(100_000))
        for sequence, payload in self.frames:
            value, more = payload, {}
            if strip:
                value, more = records.encode(stripper.strip(payload).batch), {"content_type": CONTENT_KEYS}
            world.raw(truth["pod"], value, sequence=sequence, deliver=False, **headers, **more)

    def answers(self, world: Any) -> list[int]:
        """Return what kvatlas answers to each query."""
        scene = Fleet(world.pods.values(), SIZE).scene(self.truth["model"], Weights())
        return [self._answer(world, scene, query) for query in self.truth["queries"]]

    def _answer(self, world: Any, scene: Any, query: dict[str, Any]) -> int:
        tokens = query["tokens"]
        packed, blocks = pack_tokens(tokens), len(tokens) // SIZE
        root = root_key(self.truth["model"], query.get("lora"), query.get("cache_salt"))
        items = [(item["identifier"], item["offset"], item["length"]) for item in query.get("multimodal") or ()]
        keys = block_keys(root, packed, SIZE, multimodal_extra(items, SIZE, blocks))
        ahead = [*map(world.value, ahead_keys(keys, packed, SIZE)), b""]
        values = [world.value(key) + more for key, more in zip(keys, ahead, strict=False)]
        matches, partial = walk(values, scene, len(tokens), whole_prompt=True)
        assert not partial
        return matches[0].tokens if matches else 0

    @property
    def expected(self) -> list[int]:
        return [query["hit_tokens"] for query in self.truth["queries"]]


@pytest.mark.parametrize("per_flush", [1, 37])
@pytest.mark.parametrize("name", RECORDINGS)
def test_every_query_has_the_engines_own_answer(world, name, per_flush):
    """After the recording, each query matches exactly the tokens that the engine had cached, over all its tiers."""
    if per_flush == 1 and name == "cases/case-orphans":
        per_flush = 1000  # 8,303 messages that say one thing
    recording, w = Recording(name), world()
    recording.send(w)
    for at in range(0, len(w.log), per_flush):
        w.deliver(w.log[at : at + per_flush])
    assert recording.answers(w) == recording.expected
    assert not w.dead
    assert w.state(recording.truth["pod"]).orphans <= w.options.orphan_blocks


@pytest.mark.parametrize("name", [name for name in RECORDINGS if name != "cases/case-orphans"])
def test_a_recording_without_tokens_has_the_same_answers(world, name):
    """Block keys that the bridge computed stand for what the tokens would have."""
    recording, w = Recording(name), world()
    recording.send(w, strip=True)
    w.deliver(w.log)
    found = recording.answers(w)
    assert found == recording.expected
    assert not w.dead


@pytest.mark.parametrize("name", RECORDINGS[:7])
def test_a_recording_repeated_from_anywhere_changes_nothing(world, name):
    """The log delivered again from any message on, and its updates applied again, leave the same bytes."""
    recording, w = Recording(name), world()
    recording.send(w)
    w.deliver(w.log)
    engine, index = dict(w.engine.values), [dict(view.values) for view in w.index]
    for start in (0, 20, 50):
        w.deliver(w.log[start:])
        w.apply(w.updates[start % len(w.updates) :])
    assert w.engine.values == engine
    assert [view.values for view in w.index] == index


@pytest.mark.parametrize("most", [1, 37, 100_000])
@pytest.mark.parametrize("name", RECORDINGS)
def test_a_fold_in_one_process_is_what_the_agents_make(world, name, most):
    """Slices of any length without a wire between leave both tables, entry by entry, as the two agents do."""
    recording, w = Recording(name), world()
    recording.send(w)
    w.deliver(w.log)
    messages = [parse_message(key, value, headers, 0, offset) for offset, (key, value, headers) in enumerate(w.log)]
    engine, index = DictView(), DictView()
    fold = LogFold(w.options, engine, index, lambda: 7)
    pods = {}
    for at in range(0, len(messages), most):
        pods.update(fold.apply(messages[at : at + most]).pods)
    assert engine.values == w.engine.values
    assert pods == w.pods
    blocks = [{key: value for key, value in view.values.items() if len(key) == KEY_BYTES} for view in (index, *w.index)]
    assert blocks[0] == {key: value for part in blocks[1:] for key, value in part.items()}
    assert fold.counts["updates"] == w.index_counts["updates"]
    assert {name: fold.counts[name] for name in w.counts} == dict(w.counts)


def test_full_reports_are_found_out_by_themselves(world):
    """Clients that ask for full reports need no setting: what is announced again is not one more copy."""
    recording, w = Recording("offload/vllm-full-report"), world()
    recording.send(w, announcements="auto")
    w.deliver(w.log)
    assert recording.answers(w) == recording.expected
    assert w.counts["reports"] > 50


@pytest.mark.parametrize("name", ["pod-a", "pod-b", "offload/vllm-offload-salt", "sglang/sglang-a", "sglang/sglang-c"])
def test_no_report_is_seen_where_there_is_none(world, name):
    """Copies that engines really hold are counted."""
    recording, w = Recording(name), world()
    recording.send(w)
    w.deliver(w.log)
    assert w.counts["reports"] == 0
