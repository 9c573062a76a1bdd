"""The walk: from the holders of a prompt's blocks to one match per pod. Pure; knows no sockets and no clock.

A prompt is a list of block-index values (packed 24-byte holders, see :mod:`kvatlas.streams.codec`). Neighbouring
blocks nearly always have equal values, so the walk compares each value with the one before and does work per *run*
of equal values, not per block: 512 blocks held by the same 8 pods are one run.

What a pod's match of ``m`` blocks needs, by the kind of each of its groups (C = canonical block size in tokens):

=================  ===========================================================================================
full attention     every block ``0 .. m-1``, on any tier
sliding window     the last ``ceil((window - 1) / C)`` of them (all of them, when ``m`` is less)
mamba              block ``m-1`` alone, which carries the state
chunked local      the blocks of the unfinished attention chunk at the end: from ``floor(m*C / chunk) * chunk / C``
cross, encoder     nothing
=================  ===========================================================================================

The match is the largest ``m`` that satisfies all groups, is a multiple of the engine's block size and leaves the
prompt's last token to be computed. A sliding window or chunk of unknown size counts as full attention: that never
over-credits. The tier weight of a block is that of the slowest full-attention group; groups without full attention
decide only whether the match holds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.events import Kind, Tier
from kvatlas.bridge.records import GONE, PodRecord, pod_ref, store_ref
from kvatlas.streams.codec import HOLDER

#: Tier of a holder that only a recent decision vouches for. Lives in memory, never on the wire.
SPECULATIVE: Final = 255

_SHARED: Final = int(Tier.SHARED)
_GPU: Final = int(Tier.GPU)

#: Distinct values whose meaning a scene remembers, before it starts again.
_MEMO_VALUES: Final = 50_000

_TIER_NAMES: Final = {int(tier): tier.name.lower() for tier in Tier} | {SPECULATIVE: "speculative"}


def tier_name(tier: int) -> str:
    """Return what people call a tier number; a number nobody knows is ``unknown``."""
    return _TIER_NAMES.get(tier, "unknown")


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """What one block is worth by the best tier that holds it.

    Attributes:
        gpu, cpu, disk, shared, unknown: weight of a block on that tier.
        speculative: weight of a block that only a recent decision vouches for.
        suspect_factor: multiplies blocks seen before an unrepaired gap of the pod; 0 makes them worth nothing
            and ends the walk there (strict gaps).
        end_at_zero: a tier of weight 0 does not hold the block at all.
    """

    gpu: float = 1.0
    cpu: float = 0.8
    disk: float = 0.5
    shared: float = 0.4
    unknown: float = 0.1
    speculative: float = 0.9
    suspect_factor: float = 0.5
    end_at_zero: bool = False

    def of(self, tier: int) -> float:
        """Return the weight of one block on a tier."""
        return float(getattr(self, tier_name(tier)))


class Grade(NamedTuple):
    """What one block of one pod is worth and why."""

    weight: float
    tier: int
    suspect: bool


class Window(NamedTuple):
    """One group without full attention; ``blocks`` at the end of a match, or a chunk of ``chunk_tokens``."""

    group: int
    blocks: int
    chunk_tokens: int


class Pod(NamedTuple):
    """A pod as the walk needs it; see :class:`kvatlas.bridge.records.PodRecord` for the epochs.

    Attributes:
        number: position in its :class:`Fleet`.
        full: full-attention groups; None when the pod's groups are not known, then any group counts.
        windows: groups without full attention.
        engine_block_tokens: matches are multiples of this; the least common multiple of the groups' block sizes.
    """

    number: int
    name: str
    ref: int
    model: str
    store: str
    valid_from: int
    gpu_valid_from: int
    suspect_before: int
    full: tuple[int, ...] | None
    windows: tuple[Window, ...]
    engine_block_tokens: int
    approximate: bool

    def usable_blocks(self, tokens: int, block_size_tokens: int, *, whole_prompt: bool) -> int:
        """Return how many blocks of a prompt this pod can reuse at most: engines recompute the last token."""
        engine = self.engine_block_tokens
        usable = tokens if whole_prompt else (tokens - 1) // engine * engine
        return max(usable, 0) // block_size_tokens

    @property
    def windowed_only(self) -> bool:
        """Whether no group needs every block, so that a missing block does not end the walk."""
        return self.full == ()


def _pod(index: int, record: PodRecord, block_size_tokens: int) -> Pod:
    full: list[int] = []
    windows: list[Window] = []
    sizes = {record.block_size_tokens or block_size_tokens}
    for group, spec in sorted(record.groups.items()):
        if spec.kind == Kind.CROSS:
            continue
        if spec.block_size_tokens:
            sizes.add(spec.block_size_tokens)
        if spec.kind == Kind.MAMBA:
            windows.append(Window(group, 1, 0))
        elif spec.kind == Kind.SLIDING_WINDOW and spec.window_tokens > 0:
            windows.append(Window(group, -(-(spec.window_tokens - 1) // block_size_tokens), 0))
        elif spec.kind == Kind.CHUNKED_LOCAL and spec.window_tokens > 0:
            windows.append(Window(group, 0, spec.window_tokens))
        else:
            full.append(group)
    return Pod(
        number=index,
        name=record.pod,
        ref=pod_ref(record.pod),
        model=record.model,
        store=record.store,
        valid_from=record.valid_from,
        gpu_valid_from=record.gpu_valid_from,
        suspect_before=record.suspect_before,
        full=tuple(full) if full or windows else None,
        windows=tuple(windows),
        engine_block_tokens=math.lcm(*sizes),
        approximate=record.approximate,
    )


class Cell(NamedTuple):
    """One pod in one value: what the block is worth to it, and which of its windows hold it (bit per window)."""

    grade: Grade | None
    held: int


class Fleet:
    """All pods at one moment, as the walk needs them. Immutable; build a new one when a pod's meaning changes."""

    def __init__(self, records: Iterable[PodRecord], block_size_tokens: int) -> None:
        """Take the records of all pods that may score.

        Args:
            records: merged records; pods that are gone are left out.
            block_size_tokens: canonical block size.
        """
        self.block_size_tokens = block_size_tokens
        alive = [record for record in records if record.state != GONE]
        self.pods: tuple[Pod, ...] = tuple(_pod(index, record, block_size_tokens) for index, record in enumerate(alive))
        self.by_ref: dict[int, Pod] = {pod.ref: pod for pod in self.pods}
        self.by_name: dict[str, Pod] = {pod.name: pod for pod in self.pods}
        self.by_store: dict[int, list[Pod]] = {}
        for pod in self.pods:
            if pod.store:
                self.by_store.setdefault(store_ref(pod.store), []).append(pod)
        self.windowed_only: tuple[Pod, ...] = tuple(pod for pod in self.pods if pod.windowed_only)
        self._scenes: dict[tuple[str, Weights], Scene] = {}

    def scene(self, model: str, weights: Weights) -> Scene:
        """Return the fleet as one model and one set of weights see it; remembered."""
        found = self._scenes.get((model, weights))
        if found is None:
            if len(self._scenes) >= 256:  # a caller that invents models must not fill the memory
                self._scenes.clear()
            found = self._scenes[model, weights] = Scene(self, model, weights)
        return found


class Scene:
    """What block-index values mean for one model under one set of weights; remembers values it has seen."""

    def __init__(self, fleet: Fleet, model: str, weights: Weights) -> None:
        self.fleet = fleet
        self.model = model
        self.weights = weights
        self._weight_of = {tier: weights.of(tier) for tier in _TIER_NAMES}
        self._memo: dict[bytes, dict[int, Cell]] = {}
        self._interned: dict[Cell, Cell] = {}

    def cells(self, value: bytes) -> dict[int, Cell]:
        """Return what a value says per pod index; pods that it gives nothing are absent."""
        found = self._memo.get(value)
        if found is None:
            if len(self._memo) >= _MEMO_VALUES:
                self._memo.clear()
                self._interned.clear()
            found = self._memo[value] = self._classify(value)
        return found

    def _classify(self, value: bytes) -> dict[int, Cell]:
        offers: dict[int, dict[int, Grade]] = {}
        by_ref = self.fleet.by_ref
        for ref, group, tier, kind, _window, epoch in HOLDER.iter_unpack(value):
            pod = by_ref.get(ref)
            if pod is not None:
                grade = self._grade(pod, tier, epoch)
                if grade is not None:
                    _offer(offers, pod, group, kind, grade)
            elif tier == _SHARED and not (self.weights.end_at_zero and self.weights.shared <= 0):
                grade = Grade(self._weight_of[_SHARED], _SHARED, suspect=False)
                for pod in self.fleet.by_store.get(ref, ()):
                    # Only the same model's pods can read these blocks.
                    if not pod.model or pod.model == self.model:
                        _offer(offers, pod, group, kind, grade)
        cells = {}
        for index, held in offers.items():
            cell = _cell(self.fleet.pods[index], held)
            cells[index] = self._interned.setdefault(cell, cell)
        return cells

    def _grade(self, pod: Pod, tier: int, epoch: int) -> Grade | None:
        if epoch < pod.valid_from or (tier in (_GPU, SPECULATIVE) and epoch < pod.gpu_valid_from):
            return None
        weight = self._weight_of.get(tier, self.weights.unknown)
        if weight <= 0 and self.weights.end_at_zero:
            return None
        if epoch >= pod.suspect_before:
            return Grade(weight, tier, suspect=False)
        if self.weights.suspect_factor <= 0:
            return None
        return Grade(weight * self.weights.suspect_factor, tier, suspect=True)


_ANY_GROUP: Final = -1


def _offer(offers: dict[int, dict[int, Grade]], pod: Pod, group: int, kind: int, grade: Grade) -> None:
    """Note that a pod holds a block in a group; the best grade per group wins."""
    held = offers.setdefault(pod.number, {})
    if pod.full is None:
        groups: tuple[int, ...] = () if kind == Kind.CROSS else (_ANY_GROUP,)
    elif grade.tier == SPECULATIVE:  # a decision speaks of the whole request, so of all groups
        groups = (*pod.full, *(window.group for window in pod.windows))
    else:
        groups = (group,)
    for each in groups:
        best = held.get(each)
        if best is None or grade.weight > best.weight:
            held[each] = grade


def _cell(pod: Pod, held: Mapping[int, Grade]) -> Cell:
    bits = 0
    for bit, window in enumerate(pod.windows):
        if window.group in held:
            bits |= 1 << bit
    if pod.full is None:
        return Cell(held.get(_ANY_GROUP), 0)
    needed = pod.full or tuple(window.group for window in pod.windows if window.group in held)
    worst: Grade | None = None
    for group in needed:
        grade = held.get(group)
        if grade is None:
            return Cell(None, bits)
        if worst is None or grade.weight < worst.weight:
            worst = grade
    return Cell(worst, bits)


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

    __slots__ = ("align", "best", "grades", "held", "lengths", "limit", "pod", "walked")

    def __init__(self, pod: Pod, limit: int, align: int) -> None:
        self.pod = pod
        self.limit = limit
        self.align = align
        self.walked = 0
        self.best = 0  # longest match that satisfies all windows
        self.grades: list[Grade | None] = []
        self.lengths: list[int] = []
        self.held = [0] * len(pod.windows)  # unbroken blocks up to here, per window

    def extend(self, cell: Cell, blocks: int, block_size_tokens: int) -> None:
        """Walk over a run of equal blocks."""
        grades = self.grades
        if grades and grades[-1] is cell.grade:
            self.lengths[-1] += blocks
        else:
            grades.append(cell.grade)
            self.lengths.append(blocks)
        start = self.walked
        self.walked = end = start + blocks
        if not self.pod.windows:
            return
        longest = min(end, self.limit) // self.align * self.align
        searched = range(longest, start, -self.align)
        if not any(window.chunk_tokens for window in self.pod.windows):
            # Windows only fill up inside a run: when its longest match fails, so do the shorter ones.
            searched = searched[:1]
        for match in searched:
            if self._satisfied(match, start, cell.held, block_size_tokens):
                self.best = match
                break
        self.held = [count + blocks if cell.held >> bit & 1 else 0 for bit, count in enumerate(self.held)]

    def _satisfied(self, match: int, start: int, held: int, block_size_tokens: int) -> bool:
        for bit, window in enumerate(self.pod.windows):
            if window.chunk_tokens:
                chunk_start = match * block_size_tokens // window.chunk_tokens * window.chunk_tokens
                need = match - chunk_start // block_size_tokens
            else:
                need = min(window.blocks, match)
            have = self.held[bit] + match - start if held >> bit & 1 else 0
            if have < need:
                return False
        return True

    def finish(self, block_size_tokens: int) -> Match | None:
        """Return the match, None when there is none."""
        blocks = self.best if self.pod.windows else min(self.walked, self.limit) // self.align * self.align
        if not blocks:
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
        self._tracks: list[_Track] = []
        self._walking: list[_Track] = []

    def feed(self, values: Sequence[bytes | None]) -> bool:
        """Walk on over the next blocks.

        Args:
            values: one packed value per block; empty bytes when nobody holds it, None when it was not answered.

        Returns:
            Whether any pod is still walking, so that more blocks can change the answer.
        """
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
        return self._run(current, count) if count else self.walked == 0 or bool(self._walking)

    def _run(self, value: bytes | None, blocks: int) -> bool:
        start = self.walked
        if value is None:
            waiting = any(track.limit > start for track in self._walking)
            self.partial = self.partial or waiting or (start == 0 and self._tokens > 0)
            self._walking = []
            return False
        cells = self._scene.cells(value)
        if start == 0:
            self._start(cells)
        self.walked = start + blocks
        size = self._scene.fleet.block_size_tokens
        still = []
        for track in self._walking:
            cell = cells.get(track.pod.number)
            if cell is None or cell.grade is None:
                if not track.pod.windowed_only:
                    continue
                cell = cell or _NOTHING
            track.extend(cell, blocks, size)
            if track.walked < track.limit:
                still.append(track)
        self._walking = still
        return bool(still)

    def _start(self, cells: Mapping[int, Cell]) -> None:
        fleet = self._scene.fleet
        size = fleet.block_size_tokens
        indexes = dict.fromkeys(cells)
        for pod in fleet.windowed_only:
            indexes[pod.number] = None
        for index in indexes:
            pod = fleet.pods[index]
            if self._allowed and pod.name not in self._allowed:
                continue
            limit = pod.usable_blocks(self._tokens, size, whole_prompt=self._whole_prompt)
            if limit:
                self._tracks.append(_Track(pod, limit, max(1, pod.engine_block_tokens // size)))
        self._walking = list(self._tracks)

    def matches(self) -> list[Match]:
        """Return the match of every pod that has one, best score first."""
        size = self._scene.fleet.block_size_tokens
        found = [match for track in self._tracks if (match := track.finish(size)) is not None]
        found.sort(key=lambda match: (-match.score, match.pod.name))
        return found


_NOTHING: Final = Cell(None, 0)


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
