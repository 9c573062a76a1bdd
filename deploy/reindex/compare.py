"""Do two index versions give the same answers? Prompts scored on both, pod by pod.

Versions with different block sizes round down differently. A pod that matches ``n`` tokens in blocks of ``s`` holds at
least ``n`` and less than ``n + s`` tokens of the prompt; two answers agree when both ranges have a length in common.
With equal block sizes that is equality. Both versions follow a log that moves on, each at its own distance, so an
answer that differs is asked for again, and counts only when it keeps differing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.model.block_key import TOKEN_BYTES
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.brokers.rights import START_SECONDS
from kvatlas.deploy.reindex.prompts import Prompt
from kvatlas.scorer.errors import NotReadyError
from kvatlas.scorer.lookups.versions import VersionReader
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.scoring.answers import Scored
from kvatlas.scorer.scoring.lookup import IndexView
from kvatlas.scorer.scoring.query import PromptTokens, ScoreQuery
from kvatlas.scorer.scoring.scorer import Scorer
from kvatlas.scorer.scoring.strategies import Weighing

_ROUNDS: Final = 10


class Matched(NamedTuple):
    """Tokens that each pod matches on one version, and the version's block size in tokens."""

    tokens: Mapping[str, int]
    block_size_tokens: int
    partial: bool


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt on which the versions disagree about a pod.

    Attributes:
        pod: pod id.
        prompt_tokens: length of the prompt.
        before, after: tokens that the old and the new version match there.
    """

    pod: str
    prompt_tokens: int
    before: int
    after: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared.

    Attributes:
        prompts: how many were asked for.
        unanswered: prompts that a version could not answer completely.
        matches: (prompt, pod) pairs with a match on either version.
        differences: those that disagree.
        pods: pod id -> (pairs, differences).
    """

    prompts: int
    unanswered: int
    matches: int
    differences: list[Difference]
    pods: dict[str, tuple[int, int]]


def agree(before: int, before_size: int, after: int, after_size: int) -> bool:
    """Tell whether two match lengths, each rounded down to its block size, can be of one and the same state."""
    return before < after + after_size and after < before + before_size


def differing(old: Matched, new: Matched) -> list[str]:
    """Return the pods on which two answers to one prompt disagree."""
    return [
        pod
        for pod in sorted(old.tokens.keys() | new.tokens.keys())
        if not agree(old.tokens.get(pod, 0), old.block_size_tokens, new.tokens.get(pod, 0), new.block_size_tokens)
    ]


class Versions:
    """Two versions, asked directly; use as ``async with``."""

    def __init__(self, kafka: KafkaSettings, old: str, new: str, settings: ScorerSettings) -> None:
        self._readers = [VersionReader(name, kafka, client_id="kvatlas-reindex") for name in (old, new)]
        self._scorers = [_scorer(reader, settings) for reader in self._readers]
        self._deadline_seconds = settings.deadline_ms / 1e3

    async def __aenter__(self) -> Versions:
        """Read pods and workers.

        Raises:
            LogError: Kafka does not answer.
        """
        for reader in self._readers:
            reader.start()
        try:
            for reader in self._readers:
                await reader.wait(START_SECONDS)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await asyncio.gather(*(reader.stop() for reader in self._readers))

    async def ask(self, prompt: Prompt) -> tuple[Matched, Matched]:
        """Score a prompt on both.

        Raises:
            ScorerError: a version cannot answer at all.
        """
        query = ScoreQuery(
            model=prompt.model, prompt=PromptTokens(prompt.tokens), lora=prompt.lora, cache_salt=prompt.cache_salt
        )
        deadline = time.monotonic() + self._deadline_seconds
        old, new = await asyncio.gather(*(scorer.score(query, deadline) for scorer in self._scorers))
        return _matched(old), _matched(new)


def _scorer(reader: VersionReader, settings: ScorerSettings) -> Scorer:
    def view() -> IndexView:
        if (why := reader.index.unready()) is not None:
            raise NotReadyError(f"index version {reader.name} is not ready: {why}")
        return reader.index.view()

    return Scorer(view, Weighing.from_settings(settings), clock_ns=time.time_ns, timer=time.perf_counter)


def _matched(scored: Scored) -> Matched:
    tokens = {pod: found.matched_tokens for pod, found in scored.scores.items()}
    return Matched(tokens, scored.block_size_tokens, scored.partial)


async def compare(
    versions: Versions,
    prompts: Sequence[Prompt],
    progress: Callable[[int], None] = lambda _done: None,
    pause_seconds: float = 0.5,
) -> Comparison:
    """Ask both versions for every prompt, and again, some seconds long, for those on which they differ.

    Args:
        versions: the old one and the new one.
        prompts: what to ask for.
        progress: called with the number of prompts that are settled.
        pause_seconds: between two rounds of questions.

    Raises:
        ScorerError: a version cannot answer at all.
    """
    asked = {prompt: await versions.ask(prompt) for prompt in prompts}
    pairs = Counter(pod for old, new in asked.values() for pod in old.tokens.keys() | new.tokens.keys())
    # Pods that have not agreed on a prompt so far: one that agreed once was right at that moment.
    open_pods = {prompt: _open(*answers) for prompt, answers in asked.items()}
    for _ in range(_ROUNDS):
        again = [prompt for prompt in prompts if open_pods[prompt] or incomplete(*asked[prompt])]
        progress(len(prompts) - len(again))
        if not again:
            break
        await asyncio.sleep(pause_seconds)
        for prompt in again:
            answers = asked[prompt] = await versions.ask(prompt)
            open_pods[prompt] &= _open(*answers)
    missing = [prompt for prompt in prompts if incomplete(*asked[prompt])]
    for prompt in missing:
        open_pods[prompt] &= set(differing(*asked[prompt]))
    bad = Counter(pod for pods in open_pods.values() for pod in pods)
    return Comparison(
        prompts=len(prompts),
        unanswered=len(missing),
        matches=pairs.total(),
        differences=[
            Difference(
                pod=pod,
                prompt_tokens=len(prompt.tokens) // TOKEN_BYTES,
                before=asked[prompt][0].tokens.get(pod, 0),
                after=asked[prompt][1].tokens.get(pod, 0),
            )
            for prompt, pods in open_pods.items()
            for pod in sorted(pods)
        ],
        pods={pod: (pairs[pod], bad[pod]) for pod in sorted(pairs.keys() | bad.keys())},
    )


def _open(old: Matched, new: Matched) -> set[str]:
    """Return the pods on which nothing says yet that the versions agree."""
    return set(old.tokens.keys() | new.tokens.keys()) if incomplete(old, new) else set(differing(old, new))


def incomplete(old: Matched, new: Matched) -> bool:
    """Tell whether a version had no answer for some partitions."""
    return old.partial or new.partial
