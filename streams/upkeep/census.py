"""How many blocks each pod holds on each tier, estimated from a sample of the index that costs the same at any size.

Block keys are hashes, so a stretch of the key space is a fair sample: what is found in it, divided by its share of the
space, is the whole. A partition with fewer entries than the sample is counted exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.events import Tier
from kvatlas.streams import metrics
from kvatlas.streams.errors import GoneError
from kvatlas.streams.index.apply import Validities, is_meta, live_holders
from kvatlas.streams.index.holders import HOLDER
from kvatlas.streams.state.partition import PartitionState, Role

#: Pod (or ``store:NAME`` for a shared store) -> tier name -> blocks.
Holdings = dict[str, dict[str, int]]

_SPACE: Final = 1 << 8 * KEY_BYTES
_SLICE_ENTRIES: Final = 500
_SAMPLE_ENTRIES: Final = 20_000
#: Pause between two counts.
_COUNT_SECONDS: Final = 10.0
_PAUSE_SECONDS: Final = 0.02


def count(items: Iterable[tuple[bytes, bytes]], valid: Validities) -> Counter[tuple[int, int]]:
    """Count the blocks of index entries: (pod ref, tier) -> blocks; a block in several groups counts once."""
    found: Counter[tuple[int, int]] = Counter()
    for key, value in items:
        if not is_meta(key):
            found.update({(holder[0], holder[2]) for holder in HOLDER.iter_unpack(live_holders(value, valid))})
    return found


def covered(start: bytes, last: bytes | None) -> float:
    """Return the share of the key space from ``start`` to ``last``, both with it; ``last`` None is the end."""
    end = _SPACE if last is None else int.from_bytes(last, "big") + 1
    return (end - int.from_bytes(start.ljust(KEY_BYTES, b"\0"), "big")) / _SPACE


class Census:
    """Counts again and again.

    Args:
        states: partition -> state of the index; only active ones are counted.
        pods: the merged records of ``kv-pods``, now.
        sample_entries: entries that are looked at in all partitions together.

    Attributes:
        holdings: the newest count; empty before the first.
    """

    def __init__(
        self,
        states: Callable[[], Mapping[int, PartitionState]],
        pods: Callable[[], list[records.PodRecord]],
        *,
        sample_entries: int = _SAMPLE_ENTRIES,
    ) -> None:
        self.holdings: Holdings = {}
        self._states = states
        self._pods = pods
        self._sample = sample_entries

    async def run(self) -> None:
        """Count until cancelled."""
        while True:
            await asyncio.sleep(_COUNT_SECONDS)
            with contextlib.suppress(GoneError):  # a partition went elsewhere meanwhile; the next count is without it
                await self.take()

    async def take(self) -> None:
        """Count once."""
        pods = self._pods()
        valid = {pod_ids.pod_ref(pod.pod): pod.validity for pod in pods}
        active = [number for number, state in self._states().items() if state.role is Role.ACTIVE]
        whole: Counter[tuple[int, int]] = Counter()
        for number in active:
            sampled, share = await self._partition(number, valid, max(self._sample // len(active), _SLICE_ENTRIES))
            for held, blocks in sampled.items():
                whole[held] += round(blocks / share)
        self.holdings = _named(whole, pods)
        metrics.BLOCKS.clear()
        for pod, tiers in self.holdings.items():
            for tier, blocks in tiers.items():
                metrics.BLOCKS.labels(pod, tier).set(blocks)

    async def _partition(self, number: int, valid: Validities, limit: int) -> tuple[Counter[tuple[int, int]], float]:
        """Return what a sample of a partition holds, and its share of the key space."""
        first = secrets.token_bytes(KEY_BYTES)
        found, last, seen = await self._stretch(number, first, None, valid, limit)
        if last is not None:
            return found, covered(first, last)
        rest, last, _ = await self._stretch(number, b"", first, valid, limit - seen)
        share = covered(first, None) + (covered(b"", last) if last is not None else 1 - covered(first, None))
        return found + rest, share

    async def _stretch(
        self, number: int, start: bytes, stop: bytes | None, valid: Validities, limit: int
    ) -> tuple[Counter[tuple[int, int]], bytes | None, int]:
        """Count from one key to before another, or to the end.

        Returns:
            What was found, the last key where the limit came first (None: all was seen), and the entries seen.
        """
        found: Counter[tuple[int, int]] = Counter()
        seen = 0
        while (state := self._states().get(number)) is not None and state.role is Role.ACTIVE:
            items = await state.items_apart(start, _SLICE_ENTRIES)
            inside = [item for item in items if stop is None or item[0] < stop]
            found += count(inside, valid)
            seen += len(inside)
            if len(inside) < _SLICE_ENTRIES:
                return found, None, seen
            if seen >= limit and not is_meta(inside[-1][0]):
                return found, inside[-1][0], seen
            start = inside[-1][0] + b"\0"
            await asyncio.sleep(_PAUSE_SECONDS)
        return found, None, seen


def _named(whole: Mapping[tuple[int, int], int], pods: Iterable[records.PodRecord]) -> Holdings:
    names: dict[int, str] = {}
    for pod in pods:
        names[pod_ids.pod_ref(pod.pod)] = pod.pod
        if pod.store:
            names[pod_ids.store_ref(pod.store)] = f"store:{pod.store}"
    holdings: Holdings = {}
    for (ref, tier), blocks in sorted(whole.items()):
        if ref in names:
            holdings.setdefault(names[ref], {})[Tier(tier).name.lower()] = blocks
    return holdings
