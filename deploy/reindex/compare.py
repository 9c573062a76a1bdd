"""Do two index versions give the same answers? Prompts scored on both, pod by pod.

Versions with different block sizes round down differently. A pod that matches ``n`` tokens in blocks of ``s`` holds at
least ``n`` and less than ``n + s`` tokens of the prompt; two answers agree when both ranges have a length in common.
With equal block sizes that is equality. Both versions follow a log that moves on, each at its own distance, so an
answer that differs is asked for again, and counts only when it keeps differing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.block_key import TOKEN_BYTES
from kvatlas.bridge.settings import KafkaSettings
from kvatlas.deploy.reindex.prompts import Prompt
from kvatlas.scorer.core import Core
from kvatlas.scorer.options import ScorerSettings
from kvatlas.scorer.v1 import scorer_pb2 as pb
from kvatlas.scorer.versions import VersionReader

_TRIES: Final = 6
_PAUSE_SECONDS: Final = 0.5


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
        self._cores = [
            Core(
                settings,
                reader.index.pods,
                reader.index.lookups,
                block_size=reader.index.block_size,
                partition_count=reader.index.partition_count,
            )
            for reader in self._readers
        ]
        self._timeout_seconds = settings.start_timeout_seconds

    async def __aenter__(self) -> Versions:
        """Read pods and workers.

        Raises:
            LogError: Kafka does not answer.
        """
        for reader in self._readers:
            reader.start()
        try:
            for reader in self._readers:
                await reader.wait(self._timeout_seconds)
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
        request = pb.ScoreRequest(
            model=prompt.model, tokens_packed=prompt.tokens, lora=prompt.lora, cache_salt=prompt.cache_salt
        )
        old, new = await asyncio.gather(*(core.score(request) for core in self._cores))
        return _matched(old), _matched(new)


def _matched(response: pb.ScoreResponse) -> Matched:
    tokens = {pod: entry.matched_tokens for pod, entry in response.scores.items()}
    return Matched(tokens, response.block_size_tokens, response.freshness.partial)


async def compare(
    versions: Versions, prompts: Sequence[Prompt], progress: Callable[[int], None] = lambda _done: None
) -> Comparison:
    """Ask both versions for every prompt.

    Raises:
        ScorerError: a version cannot answer at all.
    """
    pairs: dict[str, list[int]] = {}
    differences: list[Difference] = []
    unanswered = 0
    for done, prompt in enumerate(prompts, 1):
        old, new = await versions.ask(prompt)
        wrong = differing(old, new)
        for _ in range(_TRIES - 1):
            if not wrong and not (old.partial or new.partial):
                break
            await asyncio.sleep(_PAUSE_SECONDS)
            old, new = await versions.ask(prompt)
            # A pod that agreed once was right at that moment; only one that never does is different.
            wrong = [pod for pod in differing(old, new) if pod in wrong] if wrong else differing(old, new)
        unanswered += old.partial or new.partial
        for pod in old.tokens.keys() | new.tokens.keys():
            pairs.setdefault(pod, [0, 0])[0] += 1
        for pod in wrong:
            pairs.setdefault(pod, [1, 0])[1] += 1
            differences.append(
                Difference(
                    pod=pod,
                    prompt_tokens=len(prompt.tokens) // TOKEN_BYTES,
                    before=old.tokens.get(pod, 0),
                    after=new.tokens.get(pod, 0),
                )
            )
        progress(done)
    return Comparison(
        prompts=len(prompts),
        unanswered=unanswered,
        matches=sum(count for count, _ in pairs.values()),
        differences=differences,
        pods={pod: (count, bad) for pod, (count, bad) in sorted(pairs.items())},
    )
