"""What block-index values mean: the pods at one moment, and per model and weights what a value says of each of them.

A value is a packed list of 24-byte holders (see :mod:`kvatlas.streams.index.holders`). Few values differ, so their
meaning is worked out once and remembered; the walk (:mod:`kvatlas.scorer.scoring.walk`) then asks a dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.pod_ids import pod_ref, store_ref
from kvatlas.bridge.model.records import GONE, PodRecord
from kvatlas.bridge.model.topics import CACHE_SERVERS
from kvatlas.bridge.model.validity import SPECULATIVE, Validity
from kvatlas.streams.index.holders import ASSUMED, HOLDER

_SHARED: Final = int(Tier.SHARED)
_GPU: Final = int(Tier.GPU)
_EVER: Final = 1 << 64

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
    """One group without full attention; ``blocks`` at the end of a match, or a chunk of ``chunk_tokens``.

    ``carried`` where the last block alone carries the state.
    """

    group: int
    blocks: int
    chunk_tokens: int
    carried: bool = False


class Pod(NamedTuple):
    """A pod as the walk needs it; see :class:`kvatlas.bridge.model.records.PodRecord` for the epochs.

    Attributes:
        number: position in its :class:`Fleet`.
        full: full-attention groups; None when the pod's groups are not known, then any group counts.
        windows: groups without full attention.
        engine_block_tokens: matches are multiples of this; the least common multiple of the groups' block sizes.
        chunk_blocks: canonical blocks that an offload tier loads as one, counted from the prompt's start.
        pairs: the engine's cache is keyed by pairs of tokens, see :func:`kvatlas.bridge.model.block_key.ahead_key`.
        named: blocks that tokens alone name count nothing, see :data:`kvatlas.streams.index.holders.ASSUMED`.
        adapted: adapters are in use, which a cache server's chunks do not name.
        again_blocks: canonical blocks at the end of a match that the engine computes again, see
            :mod:`kvatlas.scorer.scoring.walk`.
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
    chunk_blocks: int = 1
    pairs: bool = False
    named: bool = False
    adapted: bool = False
    again_blocks: int = 0

    def usable_blocks(self, tokens: int, block_size_tokens: int, *, whole_prompt: bool) -> int:
        """Return how many blocks of a prompt this pod can reuse at most: engines recompute the last token.

        Where the cache is keyed by pairs of tokens, a prompt has one pair less than tokens.
        """
        engine = self.engine_block_tokens
        units = tokens - 1 if self.pairs else tokens
        usable = units if whole_prompt else (units - 1) // engine * engine
        return max(usable, 0) // block_size_tokens

    @property
    def validity(self) -> Validity:
        """Which of the pod's entries count."""
        return Validity(self.valid_from, self.gpu_valid_from, self.suspect_before)

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
            windows.append(Window(group, 1, 0, carried=True))
        elif spec.kind == Kind.SLIDING_WINDOW and spec.window_tokens > 0:
            windows.append(Window(group, -(-(spec.window_tokens - 1) // block_size_tokens), 0))
        elif spec.kind == Kind.CHUNKED_LOCAL and spec.window_tokens > 0:
            windows.append(Window(group, 0, spec.window_tokens))
        else:
            full.append(group)
    engine = math.lcm(*sizes)
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
        engine_block_tokens=engine,
        approximate=record.approximate,
        chunk_blocks=math.lcm(engine, block_size_tokens, record.chunk_tokens or 1) // block_size_tokens,
        pairs=record.pairs,
        named=record.named,
        adapted=bool(record.adapters),
        again_blocks=max(1, engine // block_size_tokens) if record.computes_again else 0,
    )


class CacheHost(NamedTuple):
    """A cache server, or a pool of several: no pod to send requests to, but pods load what it holds.

    Attributes:
        own: its own epochs.
        serves: the pods that load from it.
        pool: whether it counts as a shared store, whatever tier its entries name.
    """

    own: Pod
    serves: tuple[Pod, ...]
    pool: bool


def is_server(record: PodRecord) -> bool:
    """Tell whether a record is that of a cache server, which serves no requests."""
    return record.engine in CACHE_SERVERS


def meaning(record: PodRecord, block_size_tokens: int) -> tuple[object, ...]:
    """Return what a fleet reads of a record: where it is equal, a fleet need not be built anew."""
    return record.state == GONE, _pod(0, record, block_size_tokens), is_server(record), tuple(record.serves)


class Cell(NamedTuple):
    """One pod in one value.

    Attributes:
        grade: what the block is worth to it, on whatever tier it is worth most.
        held: which of its windows hold it, a bit per window.
        gpu: whether it is on the GPU, or a decision says that it soon is.
        offload: what it is worth on the tiers behind the GPU, None when it is on none of them.
    """

    grade: Grade | None
    held: int
    gpu: bool = False
    offload: Grade | None = None


class Fleet:
    """All pods at one moment, as the walk needs them. Immutable; build a new one when a pod's meaning changes."""

    def __init__(self, records: Iterable[PodRecord], block_size_tokens: int) -> None:
        """Take the records of all pods that may score.

        Args:
            records: merged records; of pods that are gone only the names are kept, for Explain.
            block_size_tokens: canonical block size.
        """
        self.block_size_tokens = block_size_tokens
        known = list(records)
        here = [record for record in known if record.state != GONE]
        alive = [record for record in here if not is_server(record)]
        self.gone: dict[int, str] = {pod_ref(record.pod): record.pod for record in known if record.state == GONE}
        self.pods: tuple[Pod, ...] = tuple(_pod(index, record, block_size_tokens) for index, record in enumerate(alive))
        self.by_ref: dict[int, Pod] = {pod.ref: pod for pod in self.pods}
        self.by_name: dict[str, Pod] = {pod.name: pod for pod in self.pods}
        self.by_store: dict[int, list[Pod]] = {}
        for pod in self.pods:
            if pod.store:
                self.by_store.setdefault(store_ref(pod.store), []).append(pod)
        self.windowed_only: tuple[Pod, ...] = tuple(pod for pod in self.pods if pod.windowed_only)
        #: Cache servers by reference.
        self.servers: dict[int, CacheHost] = {}
        for record in here:
            if is_server(record):
                own = _pod(-1, record, block_size_tokens)
                names = frozenset(record.serves)
                serves = [pod for pod in self.pods if pod.name in names or pod.name.partition("@dp")[0] in names]
                self.servers[own.ref] = CacheHost(own, tuple(serves), bool(record.store))
        #: Blocks up to which a pod may be met first: the last block of a chunk stands for the chunk.
        self.longest_chunk = max((pod.chunk_blocks for pod in self.pods), default=1)
        self._paired = frozenset(pod.model for pod in self.pods if pod.pairs)
        self._scenes: dict[tuple[str, Weights], Scene] = {}

    def pairs(self, model: str) -> bool:
        """Tell whether any pod of a model has a cache that is keyed by pairs of tokens."""
        return model in self._paired or "" in self._paired

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

    def reads(self, pod: Pod) -> bool:
        """Tell whether a pod can use what its shared store holds of this model."""
        return not pod.model or pod.model == self.model

    def _classify(self, value: bytes) -> dict[int, Cell]:
        offers: dict[int, _Offers] = {}
        by_ref = self.fleet.by_ref
        for ref, group, tier, kind, _window, epoch in HOLDER.iter_unpack(value):
            pod = by_ref.get(ref)
            if pod is not None:
                grade = self._grade(pod, tier, epoch)
                if grade is not None and not (kind & ASSUMED and pod.named):
                    _offer(offers, pod, group, kind, grade)
            elif (server := self.fleet.servers.get(ref)) is not None:
                self._serve(offers, server, group, kind, self._grade(server.own, tier, epoch))
            elif tier == _SHARED and not (self.weights.end_at_zero and self.weights.shared <= 0):
                grade = Grade(self._weight_of[_SHARED], _SHARED, suspect=False)
                for pod in self.fleet.by_store.get(ref, ()):
                    if self.reads(pod) and not (kind & ASSUMED and pod.named):
                        _offer(offers, pod, group, kind, grade)
        cells = {}
        for index, held in offers.items():
            cell = _cell(self.fleet.pods[index], held)
            cells[index] = self._interned.setdefault(cell, cell)
        return cells

    def _serve(self, offers: dict[int, _Offers], server: CacheHost, group: int, kind: int, grade: Grade | None) -> None:
        """Credit what a cache server holds to the pods that load from it: whole chunks, of all their groups."""
        if grade is not None and server.pool:
            factor = self.weights.suspect_factor if grade.suspect else 1.0
            grade = Grade(self._weight_of[_SHARED] * factor, _SHARED, grade.suspect)
        if grade is None or (self.weights.end_at_zero and grade.weight <= 0):
            return
        for pod in server.serves:
            if self.reads(pod) and not pod.adapted:
                for each in (*(pod.full or (group,)), *(window.group for window in pod.windows)):
                    _offer(offers, pod, each, kind, grade)

    def _grade(self, pod: Pod, tier: int, epoch: int) -> Grade | None:
        # Validity.state written out, since every holder of every new value comes by; a property test holds them equal.
        if tier == _SHARED:
            epoch = _EVER
        if epoch < pod.valid_from or (tier in (_GPU, SPECULATIVE) and epoch < pod.gpu_valid_from):
            return None
        weight = self._weight_of.get(tier, self.weights.unknown)
        if weight <= 0 and self.weights.end_at_zero:
            return None
        if epoch >= pod.suspect_before:
            return Grade(weight, tier, suspect=False)
        # A gap raises the epoch as well, and what only a decision said of the epoch before ends with it.
        if tier == SPECULATIVE or self.weights.suspect_factor <= 0:
            return None
        return Grade(weight * self.weights.suspect_factor, tier, suspect=True)


_ANY_GROUP: Final = -1
#: Best grade by group, and whether it is one of the GPU: (group, True) or (group, False).
_Offers = dict[tuple[int, bool], Grade]


def _offer(offers: dict[int, _Offers], pod: Pod, group: int, kind: int, grade: Grade) -> None:
    """Note that a pod holds a block in a group; the best grade per group wins, on the GPU and behind it."""
    held = offers.setdefault(pod.number, {})
    if pod.full is None:
        groups: tuple[int, ...] = () if kind & ~ASSUMED == Kind.CROSS else (_ANY_GROUP,)
    elif grade.tier == SPECULATIVE:  # a decision speaks of the whole request, so of all groups
        groups = (*pod.full, *(window.group for window in pod.windows))
    else:
        groups = (group,)
    gpu = grade.tier in (_GPU, SPECULATIVE)
    for each in groups:
        best = held.get((each, gpu))
        if best is None or grade.weight > best.weight:
            held[each, gpu] = grade


def _cell(pod: Pod, held: Mapping[tuple[int, bool], Grade]) -> Cell:
    bits = 0
    for bit, window in enumerate(pod.windows):
        if (window.group, True) in held or (window.group, False) in held:
            bits |= 1 << bit
    if pod.full is None:
        needed: tuple[int, ...] = (_ANY_GROUP,)
    else:
        needed = pod.full or tuple(window.group for bit, window in enumerate(pod.windows) if bits >> bit & 1)
    gpu, offload = [held.get((group, True)) for group in needed], [held.get((group, False)) for group in needed]
    best = [_better(one, other) for one, other in zip(gpu, offload, strict=True)]
    return Cell(_worst(best), bits, None not in gpu and bool(gpu), _worst(offload))


def _better(one: Grade | None, other: Grade | None) -> Grade | None:
    if one is None or other is None:
        return one or other
    return other if other.weight > one.weight else one


def _worst(grades: Sequence[Grade | None]) -> Grade | None:
    """Return the grade of a block that all groups need: that of the slowest; None when one has none."""
    worst: Grade | None = None
    for grade in grades:
        if grade is None:
            return None
        if worst is None or grade.weight < worst.weight:
            worst = grade
    return worst
