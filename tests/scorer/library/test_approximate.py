"""Predicted caches: bounded, labelled, and over as soon as events tell."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.engines.publisher import EnginePublisher
from kvatlas.scorer import Indexer
from kvatlas.scorer.errors import InputError, UnknownPodError
from kvatlas.scorer.library.approximate import PredictedCache
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.scorer.library.backends.memory import MemoryBackend
from kvatlas.streams.index.blocks_record import BlocksRecord

PROMPT = list(range(160))


async def test_decisions_make_a_labelled_score():
    """A prompt that was sent to a pod scores there, as approximate; what the pod has no room for is dropped."""
    async with Indexer() as indexer:
        indexer.add_approximate("a", "m", 12)
        indexer.add_approximate("b", "m", 12)
        assert await indexer.note_decision("a", PROMPT, "m")
        scored = await indexer.score_tokens(PROMPT, "m")
        assert set(scored.scores) == {"a"}
        assert (scored.scores["a"].matched_blocks, scored.scores["a"].approximate) == (10, True)
        await indexer.note_decision("a", list(range(1000, 1160)), "m")
        assert (await indexer.score_tokens(PROMPT, "m")).scores["a"].matched_blocks == 2
        assert (await indexer.stats()).entries == 12


async def test_events_end_the_prediction():
    """From a pod's first event on its scores are what the events say, and decisions predict nothing any more."""
    publisher = EnginePublisher("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", topic="kv@a@m")
    publisher.start()
    try:
        async with Indexer() as indexer:
            indexer.add_approximate("a", "m", 100)
            await indexer.note_decision("a", PROMPT, "m")
            await indexer.add_engine(f"{publisher.endpoint},{publisher.replay_endpoint}")
            event: dict[str, Any] = {
                "type": "BlockStored",
                "block_hashes": [1, 2],
                "parent_block_hash": None,
                "token_ids": PROMPT[:32],
                "block_size": 16,
                "lora_id": None,
                "medium": "GPU",
            }
            publisher.publish([event], timestamp=1.0)
            async with asyncio.timeout(60):
                while indexer.pods()[0].approximate or indexer.pods()[0].last_sequence < 0:
                    await asyncio.sleep(0.005)
            score = (await indexer.score_tokens(PROMPT, "m")).scores["a"]
            assert (score.matched_blocks, score.approximate) == (2, False)
            assert not await indexer.note_decision("a", PROMPT, "m")
            assert (await indexer.score_tokens(PROMPT, "m")).scores["a"].matched_blocks == 2
            assert (await indexer.stats()).entries == 2
    finally:
        publisher.close()


async def test_what_makes_no_sense_is_refused():
    """Unknown pods and empty caches are named; a removed pod scores no more."""
    async with Indexer() as indexer:
        with pytest.raises(UnknownPodError, match="'x'"):
            await indexer.note_decision("x", PROMPT, "m")
        with pytest.raises(InputError, match="capacity_blocks"):
            indexer.add_approximate("a", "m", 0)
        indexer.add_approximate("a", "m", 5)
        await indexer.note_decision("a", PROMPT, "m")
        await indexer.approximate.remove("a")
        assert not indexer.pods()
        assert not (await indexer.score_tokens(PROMPT, "m")).scores
        with pytest.raises(UnknownPodError):
            await indexer.approximate.remove("a")


class Slow(MemoryBackend):
    """An index that takes its time, a different one for each update, and may be away."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.pauses = itertools.cycle([0.02, 0.0, 0.01])

    async def apply(self, record: BlocksRecord) -> None:
        await asyncio.sleep(next(self.pauses))
        if self.away:
            raise BackendError("away")
        await super().apply(record)


async def test_decisions_at_once_all_count():
    """However long each update takes, none overtakes another of its pod, so none is taken for a late one."""
    async with Indexer(Slow()) as indexer:
        indexer.add_approximate("a", "m", 1000)
        prompts = [list(range(number * 1000, number * 1000 + 32)) for number in range(9)]
        await asyncio.gather(*(indexer.note_decision("a", prompt, "m") for prompt in prompts))
        for prompt in prompts:
            assert (await indexer.score_tokens(prompt, "m")).scores["a"].matched_blocks == 2


async def test_what_an_index_that_was_away_missed_is_told_later():
    """A decision that could not be written counts as soon as the next one can."""
    backend = Slow()
    async with Indexer(backend) as indexer:
        indexer.add_approximate("a", "m", 100)
        backend.away = True
        with pytest.raises(BackendError):
            await indexer.note_decision("a", PROMPT, "m")
        backend.away = False
        await indexer.note_decision("a", [7] * 16, "m")
        assert (await indexer.score_tokens(PROMPT, "m")).scores["a"].matched_blocks == 10


async def test_a_pod_added_again_starts_anew_at_once():
    """Removed and added within one second, a pod has none of its old blocks and all of its new ones."""
    async with Indexer(clock=lambda: 10**18) as indexer:
        for prompt, other in ((PROMPT, [7] * 32), ([7] * 32, PROMPT)):
            indexer.add_approximate("a", "m", 100)
            await indexer.note_decision("a", prompt, "m")
            assert (await indexer.score_tokens(prompt, "m")).best == "a"
            assert not (await indexer.score_tokens(other, "m")).scores
            await indexer.remove_engine("a")
        assert not indexer.pods()


@given(st.integers(1, 8), st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=10, unique=True), max_size=20))
def test_what_enters_less_what_leaves_is_the_table(capacity: int, prompts: list[list[int]]):
    """Whatever runs, the keys told as entered and left add up to at most the capacity, with the last prompt's start."""
    cache = PredictedCache(capacity)
    held: set[bytes] = set()
    for prompt in prompts:
        keys = [bytes([number]) for number in prompt]
        entered, left = cache.used(keys)
        assert not held & set(entered)
        held |= set(entered)
        assert held >= set(left)
        held -= set(left)
        assert len(held) == len(cache) <= capacity
        assert set(keys[:capacity]) <= held
