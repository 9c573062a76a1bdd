"""The walk: from the holders of a prompt's blocks to one match per pod. Pure; knows no sockets and no clock.

A prompt is a list of block-index values (packed 24-byte holders, see :mod:`kvatlas.streams.index.holders`).
Neighbouring blocks nearly always have equal values, so the walk compares each value with the one before and does work
per *run* of equal values, not per block: 512 blocks held by the same 8 pods are one run.

What a pod's match of ``m`` blocks needs, by the kind of each of its groups (C = canonical block size in tokens):

=================  ===========================================================================================
full attention     every block ``0 .. m-1``, on the GPU, and from the first that is not there on the tiers behind it
sliding window     the last ``ceil((window - 1) / C)`` of them (all of them, when ``m`` is less)
mamba              block ``m-1`` alone, which carries the state
chunked local      the blocks of the unfinished attention chunk at the end: from ``floor(m*C / chunk) * chunk / C``
cross, encoder     nothing
=================  ===========================================================================================

That is how engines look a prompt up: first the prefix that the GPU holds; from there on what the offload tiers hold
without a gap, in whole chunks counted from the prompt's start. A block that is on the GPU again behind a gap of those
counts for nothing. A block of several canonical blocks, be it the engine's or a tier's chunk, is held when its last
one is: that one's name stands for all of them.

The match is the largest ``m`` that satisfies all groups and is a multiple of the engine's block size; where only
usable blocks are asked for, it also leaves the prompt's last token to be computed. A sliding window or chunk of unknown
size counts as full attention: that never over-credits. The tier weight of a block is that of the slowest full-attention
group; groups without full attention decide only whether the match holds.

An engine that drafts from what its model computed (vLLM with EAGLE or MTP) computes the last block that it found again:
the match is a block shorter than what it is found by, and a window must hold that block too; the state of a mamba group
is needed where the match then ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from kvatlas.bridge.model.validity import SPECULATIVE
from kvatlas.scorer.scoring.fleet import Cell, Fleet, Grade, Pod, Scene, Weights, tier_name

__all__ = ["SPECULATIVE", "Fleet", "Match", "Pod", "Scene", "Walk", "Weights", "blocks_to_ask", "tier_name", "walk"]


class Match(NamedTuple):
    """The outcome for one pod.

    Attributes:
        blocks, tokens: match length.
        score: sum of the blocks' weights.
        tiers: matched blocks by the name of the tier that counted.
        suspect: matched blocks that may be gone.
        speculative: matched blocks that only a decision vouches for.
    """

    pod: Pod
    blocks: int
    tokens: int
    score: float
    tiers: dict[str, int]
    suspect: int
    speculative: int


class _Track:
    """One pod on its way along the prompt."""

    __slots__ = (
        *(
            "align",
            "behind",
            "best",
            "chunk",
            "grades",
            "held",
            "history",
            "lengths",
            "limit",
            "matched",
            "pod",
            "start",
        ),
    )

    def __init__(self, pod: Pod, limit: int, align: int, start: int) -> None:
        """Begin at block ``start``; the blocks before it, less than a chunk, do not hold the pod."""
        self.pod = pod
        self.limit = limit
        self.align = align
        self.chunk = max(pod.chunk_blocks, align)
        self.behind = start >= align  # past the prefix that the GPU holds
        self.matched = 0
        self.best = 0  # longest match that satisfies all windows
        self.grades: list[Grade | None] = []
        self.lengths: list[int] = []
        self.held = [0] * len(pod.windows)  # unbroken blocks up to here, per window
        # The same at every block from ``start`` on, where a match ends before the block that makes it good.
        self.history = [self.held] if pod.windows and (self.chunk > align or pod.again_blocks) else []
        self.start = start

    def walk_on(self, cell: Cell | None, start: int, end: int, block_size_tokens: int) -> bool:
        """Walk over a run of equal blocks; tells whether more of them can matter."""
        pod = self.pod
        if pod.windowed_only:
            self._match(end, None if cell is None else cell.grade)
        elif not self.behind and cell is not None and cell.gpu:
            self._match(end // self.align * self.align, cell.grade)
        elif self.behind or (start // self.align + 1) * self.align <= end:
            self.behind = True
            if cell is not None and cell.offload is not None:
                self._match(end // self.chunk * self.chunk, cell.offload)
            elif (start // self.chunk + 1) * self.chunk <= end:
                return False
        if pod.windows:
            self._look_back(0 if cell is None else cell.held, start, end, block_size_tokens)
        return end < self.limit

    def _match(self, end: int, grade: Grade | None) -> None:
        blocks = end - self.matched
        if blocks <= 0:
            return
        self.matched = end
        if self.grades and self.grades[-1] is grade:
            self.lengths[-1] += blocks
        else:
            self.grades.append(grade)
            self.lengths.append(blocks)

    def _look_back(self, held: int, start: int, end: int, block_size_tokens: int) -> None:
        """Find the longest match that ends in this run and has what every window needs."""
        longest = min(self.matched, self.limit) // self.align * self.align
        if self.history:
            self._look_back_far(held, start, end, longest, block_size_tokens)
            return
        searched = range(longest, start, -self.align)
        if not any(window.chunk_tokens for window in self.pod.windows):
            # Windows only fill up inside a run: when its longest match fails, so do the shorter ones.
            searched = searched[:1]
        for match in searched:
            if self._satisfied(match, start, held, block_size_tokens):
                self.best = match
                break
        self.held = [count + end - start if held >> bit & 1 else 0 for bit, count in enumerate(self.held)]

    def _look_back_far(self, held: int, start: int, end: int, longest: int, block_size_tokens: int) -> None:
        """Find the longest match in all blocks so far: the chunk that is whole now began in earlier runs."""
        for _ in range(start, end):
            self.held = [count + 1 if held >> bit & 1 else 0 for bit, count in enumerate(self.held)]
            self.history.append(self.held)
        for match in range(longest, max(self.best, self.start - 1), -self.align):
            if all(self._filled(bit, match, block_size_tokens) for bit in range(len(self.held))):
                self.best = match
                break

    def _filled(self, bit: int, match: int, block_size_tokens: int) -> bool:
        """Tell whether a window has what a match needs that is found at ``match`` and ends ``again_blocks`` before."""
        again = self.pod.again_blocks
        ends = max(match - again - self.start, 0)
        needed = self._needed(bit, match - again, block_size_tokens)
        if self.pod.windows[bit].carried:
            return self.history[ends][bit] >= needed
        return self.history[match - self.start][bit] >= needed + again

    def _needed(self, bit: int, match: int, block_size_tokens: int) -> int:
        """Return how many unbroken blocks before its end a window needs for a match."""
        window = self.pod.windows[bit]
        if not window.chunk_tokens:
            return min(window.blocks, match)
        chunk_start = match * block_size_tokens // window.chunk_tokens * window.chunk_tokens
        return match - chunk_start // block_size_tokens

    def _satisfied(self, match: int, start: int, held: int, block_size_tokens: int) -> bool:
        for bit in range(len(self.held)):
            have = self.held[bit] + match - start if held >> bit & 1 else 0
            if have < self._needed(bit, match, block_size_tokens):
                return False
        return True

    def finish(self, block_size_tokens: int) -> Match | None:
        """Return the match, None when there is none."""
        blocks = self.best if self.pod.windows else min(self.matched, self.limit) // self.align * self.align
        blocks -= self.pod.again_blocks
        if blocks <= 0:
            return None
        score = 0.0
        tiers: dict[str, int] = {}
        suspect = speculative = 0
        for grade, length in _cut(self.grades, self.lengths, blocks):
            score += grade.weight * length
            name = tier_name(grade.tier)
            tiers[name] = tiers.get(name, 0) + length
            suspect += length if grade.suspect else 0
            speculative += length if grade.tier == SPECULATIVE else 0
        return Match(self.pod, blocks, blocks * block_size_tokens, score, tiers, suspect, speculative)


def _cut(grades: Sequence[Grade | None], lengths: Sequence[int], blocks: int) -> list[tuple[Grade, int]]:
    """Return (grade, blocks) of the first ``blocks``; blocks that no window needs count like the last one held."""
    parts: list[tuple[Grade | None, int]] = []
    last: Grade | None = None
    for grade, length in zip(grades, lengths, strict=True):
        taken = min(length, blocks)
        parts.append((grade, taken))
        last = grade or last
        blocks -= taken
        if not blocks:
            break
    return [(grade or last, length) for grade, length in parts if grade or last]  # type: ignore[misc]


class Walk:
    """The walk of all pods along one prompt, fed with values in order, in as many pieces as they arrive.

    Attributes:
        partial: a block that some pod still needed was not answered: that pod's match may be too short.
        walked: blocks fed and used so far.
    """

    def __init__(
        self,
        scene: Scene,
        tokens: int,
        *,
        pods: Collection[str] = (),
        whole_prompt: bool = False,
    ) -> None:
        """Start before the first block.

        Args:
            scene: pods, model and weights.
            tokens: tokens in the prompt, with the trailing partial block.
            pods: pod ids that may score; empty means all.
            whole_prompt: also count the block of the last token, which engines compute again.
        """
        self.partial = False
        self.walked = 0
        self._scene = scene
        self._tokens = tokens
        self._whole_prompt = whole_prompt
        self._allowed = frozenset(pods)
        self._met = scene.fleet.longest_chunk
        self._seen: set[int] = set()
        self._tracks: list[_Track] = []
        self._walking: list[_Track] = []

    def feed(self, values: Sequence[bytes | None]) -> bool:
        """Walk on over the next blocks.

        Args:
            values: one packed value per block; empty bytes when nobody holds it, None when it was not answered.

        Returns:
            Whether any pod is still walking, so that more blocks can change the answer.
        """
        if values and values.count(values[0]) == len(values):  # the common case, counted in C
            return self._run(values[0], len(values))
        count = 0
        current: bytes | None = b""
        for value in values:
            if value == current:
                count += 1
                continue
            if count and not self._run(current, count):
                return False
            current = value
            count = 1
        return self._run(current, count) if count else self.walked < self._met or bool(self._walking)

    def _run(self, value: bytes | None, blocks: int) -> bool:
        start = self.walked
        if value is None:
            waiting = any(track.limit > start for track in self._walking)
            self.partial = self.partial or waiting or (start == 0 and self._tokens > 0)
            self._walking = []
            return False
        cells = self._scene.cells(value)
        if start < self._met:
            self._start(cells, start)
        self.walked = end = start + blocks
        size = self._scene.fleet.block_size_tokens
        still = [track for track in self._walking if track.walk_on(cells.get(track.pod.number), start, end, size)]
        self._walking = still
        return bool(still) or end < self._met

    def _start(self, cells: Mapping[int, Cell], start: int) -> None:
        """Begin with the pods that hold the first block, or one that may be the last of their first chunk."""
        fleet = self._scene.fleet
        size = fleet.block_size_tokens
        indexes = dict.fromkeys(cells)
        if not start:
            indexes.update(dict.fromkeys(pod.number for pod in fleet.windowed_only))
        for index in indexes:
            pod = fleet.pods[index]
            if (self._allowed and pod.name not in self._allowed) or start >= pod.chunk_blocks or index in self._seen:
                continue
            self._seen.add(index)
            limit = pod.usable_blocks(self._tokens, size, whole_prompt=self._whole_prompt)
            if limit > start:
                track = _Track(pod, limit, max(1, pod.engine_block_tokens // size), start)
                self._tracks.append(track)
                self._walking.append(track)

    def matches(self) -> list[Match]:
        """Return the match of every pod that has one, best score first."""
        size = self._scene.fleet.block_size_tokens
        found = [match for track in self._tracks if (match := track.finish(size)) is not None]
        found.sort(key=lambda match: (-match.score, match.pod.name))
        return found


def stopped_at(
    pod: Pod, values: Sequence[bytes | None], scene: Scene, tokens: int, *, whole_prompt: bool = False
) -> int | None:
    """Return the block at which one pod's walk stopped: not answered, or not held; None at the end of the prompt."""
    size = scene.fleet.block_size_tokens
    limit = pod.usable_blocks(tokens, size, whole_prompt=whole_prompt)
    track: _Track | None = None
    for number, value in enumerate(values[:limit]):
        if value is None:
            return number
        cell = scene.cells(value).get(pod.number)
        if track is None and (cell is not None or pod.windowed_only):
            track = _Track(pod, limit, max(1, pod.engine_block_tokens // size), number)
        if track is None:
            if number + 1 >= pod.chunk_blocks:
                return number
        elif not track.walk_on(cell, number, number + 1, size):
            return None if number + 1 >= limit and track.matched > number else number
    # A prompt that ends inside its first chunk, of which the pod holds nothing.
    return limit - 1 if track is None and 0 < limit <= len(values) else None


def walk(
    values: Sequence[bytes | None],
    scene: Scene,
    tokens: int,
    *,
    pods: Collection[str] = (),
    whole_prompt: bool = False,
) -> tuple[list[Match], bool]:
    """Walk a whole prompt at once; returns the matches and whether they are partial. See :class:`Walk`."""
    steps = Walk(scene, tokens, pods=pods, whole_prompt=whole_prompt)
    steps.feed(values)
    return steps.matches(), steps.partial


def blocks_to_ask(tokens: int, block_size_tokens: int, *, whole_prompt: bool = False) -> int:
    """Return how many leading blocks of a prompt can matter to any pod."""
    return max(tokens if whole_prompt else tokens - 1, 0) // block_size_tokens
