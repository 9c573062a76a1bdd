"""Comparing index versions, and the prompts that they are compared on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import pytest
from aiokafka.errors import GroupAuthorizationFailedError, GroupCoordinatorNotAvailableError
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.bridge.model import topics
from kvatlas.bridge.model.adapters.fields import encode_batch
from kvatlas.bridge.model.block_key import pack_tokens
from kvatlas.deploy.history.log import Record
from kvatlas.deploy.reindex.compare import Matched, Versions, agree, compare, differing
from kvatlas.deploy.reindex.progress import Progress, committed
from kvatlas.deploy.reindex.prompts import Chains, Prompt, sample
from tests import engine_events

PROMPT = Prompt(model="m", lora="", cache_salt="", tokens=pack_tokens(range(64)))


@given(held=st.integers(0, 10_000), one=st.integers(1, 512), other=st.integers(1, 512))
def test_answers_of_one_state_agree_whatever_the_block_sizes(held: int, one: int, other: int) -> None:
    """Two match lengths that round the same state down to their block sizes always agree."""
    assert agree(held // one * one, one, held // other * other, other)


@given(held=st.integers(0, 500), missing=st.integers(1, 500), size=st.integers(1, 64))
def test_equal_block_sizes_must_match_equally(held: int, missing: int, size: int) -> None:
    """With one block size, a single block less is a difference."""
    assert not agree((held + missing) * size, size, held * size, size)


def test_a_pod_that_one_version_does_not_know_is_a_difference() -> None:
    """A pod that matches on one version alone is named, unless a larger block hides what it holds."""
    old = Matched({"a": 48, "b": 16}, 16, False)
    assert differing(old, Matched({}, 32, False)) == ["a"]
    assert differing(old, Matched({"a": 32}, 32, False)) == []


def stored(pod: str, keys: Sequence[int], parent: int | None, tokens: Sequence[int], **more: object) -> Record:
    """A ``kv-events`` record of one stored event."""
    event = engine_events.stored(keys, tokens, 4, parent, **more)
    headers = ((topics.H_SEQUENCE, b"0"), (topics.H_MODEL, b"m"))
    return Record("kv-events", 0, 0, 0, pod.encode(), encode_batch(1.0, [event], 0), headers)


def test_prompts_are_chained_through_the_blocks_that_events_go_on_from() -> None:
    """A prompt grows by the events that name one of its blocks as their parent, on the same pod only."""
    chains = Chains()
    (first,) = chains.add(stored("a", [1, 2], None, range(8)))
    assert first.tokens == pack_tokens(range(8))
    (branch,) = chains.add(stored("a", [3], 1, range(50, 54)))
    assert branch.tokens == pack_tokens([*range(4), *range(50, 54)])
    assert list(chains.add(stored("b", [3], 1, range(50, 54)))) == []
    assert list(chains.add(stored("a", [4], 99, range(4)))) == []


def test_unreadable_messages_give_no_prompt() -> None:
    """A message that no adapter reads is passed over."""
    record = stored("a", [1], None, range(4))._replace(value=b"\xc1")
    assert list(Chains().add(record)) == []


def test_the_sample_is_the_same_for_a_seed() -> None:
    """The same seed chooses the same prompts, whatever order they were found in."""
    prompts = [Prompt(model="m", lora="", cache_salt="", tokens=pack_tokens([n])) for n in range(50)]
    shuffled = random.Random(3).sample(prompts, 50)
    assert sample(prompts, 5, random.Random(1)) == sample(shuffled, 5, random.Random(1))


class Answers:
    """Two versions whose answers come from a list, the last one for ever."""

    def __init__(self, *answers: tuple[Matched, Matched]) -> None:
        self._answers = list(answers)

    async def ask(self, _prompt: Prompt) -> tuple[Matched, Matched]:
        """Return the next answers."""
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


FULL, LESS = Matched({"a": 64}, 16, False), Matched({"a": 32}, 16, False)


async def test_only_what_keeps_differing_counts() -> None:
    """An answer that differs while one version is behind is asked for again; one that always differs is reported."""
    late = await compare(cast("Versions", Answers((FULL, LESS), (FULL, FULL))), [PROMPT], pause_seconds=0)
    assert (late.matches, late.differences, late.unanswered) == (1, [], 0)


async def test_differences_and_missing_answers_are_told_apart() -> None:
    """A pod that always differs is named with both lengths; partitions without an answer are counted apart."""
    wrong = await compare(cast("Versions", Answers((FULL, LESS))), [PROMPT], pause_seconds=0)
    partial = Matched({"a": 64}, 16, True)
    missing = await compare(cast("Versions", Answers((FULL, partial))), [PROMPT], pause_seconds=0)
    assert [(d.pod, d.prompt_tokens, d.before, d.after) for d in wrong.differences] == [("a", 64, 64, 32)]
    assert wrong.pods == {"a": (1, 1)}
    assert (missing.unanswered, missing.differences) == (1, [])


def test_a_version_takes_over_only_when_nothing_is_missing() -> None:
    """Workers, partitions and both lags must be there; the text names the first that is not."""
    whole = Progress(
        version="v2",
        active=False,
        block_size_tokens=32,
        partitions=2,
        workers=1,
        uncovered=[],
        events_end=10,
        events_total=10,
        events_lag=0,
        blocks_lag=0,
    )
    assert whole.behind(0) is None
    cases = {"no worker": {"workers": 0}, "1 of 2": {"uncovered": [1]}, "5 of 10": {"events_lag": 5}}
    for text, change in {**cases, "block updates": {"blocks_lag": 5}}.items():
        fields = {name: getattr(whole, name) for name in whole.__struct_fields__} | change
        why = Progress(**fields).behind(4)
        assert why is not None
        assert text in why


class Groups:
    """Answers for offsets of groups, or fails first."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    async def list_consumer_group_offsets(self, group: str) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return {group: 1}


async def test_offsets_are_asked_for_again_while_there_is_no_coordinator() -> None:
    """A broker finds one when it is first asked; a refusal is final."""
    missing = GroupCoordinatorNotAvailableError()
    assert await committed(Groups(missing, missing), "g", 90.0) == {"g": 1}
    with pytest.raises(GroupCoordinatorNotAvailableError):
        await committed(Groups(missing), "g", 0.0)
    with pytest.raises(GroupAuthorizationFailedError):
        await committed(Groups(GroupAuthorizationFailedError()), "g", 90.0)
