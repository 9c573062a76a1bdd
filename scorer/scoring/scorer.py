"""Scoring engine: from a query to an answer, over whatever index. Pure: awaits only the lookups, clocks are passed in.

    keys of the prompt -> look up and walk, in rounds that grow, until no pod is walking -> matches -> answer

The service, llm-d's API, the library, ``kvatlas at`` and ``why``, and outcomes all come through here and convert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.scoring.answers import Explained, PodFreshness, PodScore, Scored
from kvatlas.scorer.scoring.explain import explain
from kvatlas.scorer.scoring.known_keys import KnownKeys
from kvatlas.scorer.scoring.lookup import HolderOverlay, IndexView, Lookups, Seen
from kvatlas.scorer.scoring.pairs import paired
from kvatlas.scorer.scoring.query import ScoreQuery, keys_of
from kvatlas.scorer.scoring.strategies import Strategy, Weighing
from kvatlas.scorer.scoring.walk import Match, Walk, Weights

_GROWTH: Final = 4


class Chunks(NamedTuple):
    """How many blocks are asked for: first, and at most once the rounds have grown."""

    first: int = 1_024
    most: int = 65_536


class Walked(NamedTuple):
    """What a lookup found on the way.

    Attributes:
        values: packed holders of each block that was asked for; None where there was no answer.
        partitions: partitions that were asked.
        seconds: time spent in lookups.
    """

    values: list[bytes | None]
    partitions: dict[int, Seen]
    seconds: float


class ScoringRun(NamedTuple):
    """One scored prompt with what it was made of.

    Attributes:
        query, view: what was asked of which index.
        strategy, weights: how matches became scores.
        keys, values: block keys and what was found of them.
        matches: of all pods, best first.
        scored: the answer.
    """

    query: ScoreQuery
    view: IndexView
    strategy: Strategy
    weights: Weights
    keys: list[bytes]
    values: list[bytes | None]
    matches: list[Match]
    scored: Scored

    def explained(self) -> Explained:
        """Return the answer block by block; of a run with ``all_blocks``."""
        return explain(
            self.scored,
            self.keys,
            self.values,
            self.view.fleet.scene(self.query.model, self.weights),
            pods=self.query.pods,
            usable_only=self.query.usable_only,
            partition_count=self.view.partition_count,
        )


async def look_up(
    lookups: Lookups,
    keys: Sequence[bytes],
    steps: Walk,
    deadline: float,
    *,
    chunks: Chunks,
    overlay: HolderOverlay | None = None,
    now_ns: int = 0,
    all_blocks: bool = False,
    timer: Callable[[], float] = lambda: 0.0,
) -> Walked:
    """Look up and walk in rounds that grow, until no pod is walking.

    Args:
        lookups: where keys are looked up.
        keys: of the prompt, first block first.
        steps: the walk, before its first block.
        deadline: monotonic seconds after which what is missing stays None.
        chunks: how many blocks to ask for.
        overlay: what is known beside the index.
        now_ns: wall clock in ns, for the overlay.
        all_blocks: also look past the end of the walk.
        timer: seconds, for the time spent.
    """
    values: list[bytes | None] = []
    seen: dict[int, Seen] = {}
    spent = 0.0
    chunk = min(chunks.first, lookups.first_blocks or chunks.first)
    walking = True
    packed = b"".join(keys) if overlay is not None else b""
    while len(values) < len(keys) and (walking or all_blocks):
        part = keys[len(values) : len(values) + chunk]
        began = timer()
        answers = await lookups.lookup(part, deadline)
        spent += timer() - began
        _merge(seen, answers.partitions)
        found = answers.values if overlay is None else overlay.overlay(packed, len(values), answers.values, now_ns)
        values.extend(found)
        walking = walking and steps.feed(found)
        chunk = min(chunk * _GROWTH, chunks.most)
    return Walked(values, seen, spent)


def _merge(seen: dict[int, Seen], more: Mapping[int, Seen]) -> None:
    for number, state in more.items():
        before = seen.get(number)
        if before is None or before.role == "active":
            seen[number] = state


class Scorer:
    """Scores queries against an index.

    Attributes:
        weighing: strategy and weights per model.
    """

    def __init__(
        self,
        view: Callable[[], IndexView],
        weighing: Weighing,
        *,
        chunks: Chunks | None = None,
        overlay: HolderOverlay | None = None,
        clock_ns: Callable[[], int],
        timer: Callable[[], float],
        observe: Callable[[str, float], None] = lambda _stage, _seconds: None,
    ) -> None:
        """Take the parts.

        Args:
            view: returns the index for one request; raises where nothing can be scored now.
            weighing: strategy and weights per model.
            chunks: how many blocks to ask for; None for the default.
            overlay: what is known beside the index; None for nothing.
            clock_ns: wall clock in ns, for ages.
            timer: seconds that only grow, for stages.
            observe: told of each stage's duration in seconds: tokenize where text was given, keys, lookup, score.
        """
        self.weighing = weighing
        self._view = view
        self._known = KnownKeys()
        self._chunks = chunks or Chunks()
        self._overlay = overlay
        self._clock_ns = clock_ns
        self._timer = timer
        self._observe = observe

    async def score(self, query: ScoreQuery, deadline: float) -> Scored:
        """Score a prompt; ``deadline`` in monotonic seconds.

        Raises:
            ScorerError: it cannot be scored; see :mod:`kvatlas.scorer.errors`.
        """
        return (await self.run(query, deadline)).scored

    async def explain(self, query: ScoreQuery, deadline: float) -> Explained:
        """Say block by block who holds a prompt, and why each pod's match ends where it does.

        Raises:
            ScorerError: it cannot be scored.
        """
        return (await self.run(query, deadline, all_blocks=True)).explained()

    async def run(
        self, query: ScoreQuery, deadline: float, *, all_blocks: bool = False, view: IndexView | None = None
    ) -> ScoringRun:
        """Score a prompt and keep what was found.

        Args:
            query: what is asked.
            deadline: monotonic seconds.
            all_blocks: also look past the end of the walk.
            view: the index as the request sees it; None takes it as it is now.

        Raises:
            ScorerError: it cannot be scored.
        """
        timer = self._timer
        began = timer()
        if view is None:
            view = self._view()
        fleet = view.fleet
        strategy, weights = self.weighing.of(query.model, query.strategy)
        keys = keys_of(query, fleet.block_size_tokens, self._known.of)
        hashed = timer()
        prompt = query.prompt
        steps = Walk(
            fleet.scene(query.model, weights), prompt.tokens, pods=query.pods, whole_prompt=not query.usable_only
        )
        now_ns = self._clock_ns()
        walked = await look_up(
            paired(view.lookups, fleet, query.model, keys, prompt.packed),
            keys,
            steps,
            deadline,
            chunks=self._chunks,
            overlay=self._overlay,
            now_ns=now_ns,
            all_blocks=all_blocks,
            timer=timer,
        )
        matches = steps.matches()
        scores, freshness = _scores(matches, strategy, len(keys)), _freshness(matches, view.pods, self._clock_ns())
        took_ms: dict[str, float] = {}
        if prompt.seconds:
            self._note(took_ms, "tokenize", prompt.seconds)
        self._note(took_ms, "keys", hashed - began)
        self._note(took_ms, "lookup", walked.seconds)
        self._note(took_ms, "score", timer() - hashed - walked.seconds)
        scored = Scored(
            prompt_tokens=prompt.tokens,
            block_size_tokens=fleet.block_size_tokens,
            blocks=len(keys),
            scores=scores,
            freshness=freshness,
            partitions=walked.partitions,
            partial=steps.partial,
            stale=view.lookups.stale,
            tokenizer=prompt.tokenizer,
            took_ms=took_ms,
        )
        return ScoringRun(query, view, strategy, weights, keys, walked.values, matches, scored)

    def _note(self, took_ms: dict[str, float], stage: str, seconds: float) -> None:
        took_ms[stage] = seconds * 1e3
        self._observe(stage, seconds)


def _scores(matches: Sequence[Match], strategy: Strategy, blocks: int) -> dict[str, PodScore]:
    worth = strategy.score
    found = {
        match.pod.name: PodScore(
            score=worth(match, blocks),
            matched_blocks=match.blocks,
            matched_tokens=match.tokens,
            tiers=match.tiers,
            suspect_blocks=match.suspect,
            speculative_blocks=match.speculative,
            approximate=match.pod.approximate,
        )
        for match in matches
    }
    values = [each.score for each in found.values()]
    if values == sorted(values, reverse=True):  # nearly always: the matches come best first
        return found
    return dict(sorted(found.items(), key=lambda item: -item[1].score))


def _freshness(matches: Sequence[Match], pods: Mapping[str, PodRecord], now_ns: int) -> dict[str, PodFreshness]:
    found = {}
    for match in matches:
        record = pods.get(match.pod.name)
        if record is not None:
            found[record.pod] = PodFreshness(
                last_sequence=record.last_sequence,
                age_ms=age_ms(record, now_ns),
                state=record.state,
                epoch=record.epoch,
                coverage=record.coverage,
                heard_from=max(record.heard_from, 0),
            )
    return found


def age_ms(record: PodRecord, now_ns: int) -> float:
    """Return the age of a pod's last known message in ms; -1 before the first."""
    return max(now_ns - record.receive_ns, 0) / 1e6 if record.receive_ns else -1.0
