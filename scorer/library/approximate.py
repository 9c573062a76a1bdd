"""Predicted caches of engines that send no events: what a router's own decisions must have left there.

A decision sends a prompt to a pod, so the pod computes its blocks and keeps them while it has room. The prediction is
an LRU table of block keys per pod, as large as the pod's cache; what enters and leaves it is written into the same
index as real updates are, under an epoch below any that a stream can have. Once the pod's events arrive, its epoch
rises past that one: predicted blocks stop counting in the same moment, without a switch anywhere.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Kind, Tier
from kvatlas.bridge.model.pod_ids import WRITER_STREAMS, pod_key, pod_ref
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.errors import InputError, UnknownPodError
from kvatlas.scorer.library.backends.base import Backend
from kvatlas.scorer.library.backends.errors import IndexLostError
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, BlocksRecord, Run
from kvatlas.streams.index.holders import pack_holder

_NS: Final = 1_000_000_000


class PredictedCache:
    """Block keys that a pod must hold, least recently used first. Pure.

    Args:
        capacity_blocks: canonical blocks that fit into the pod's cache.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> Iterable[bytes]:
        """Return what is in it, least recently used first."""
        return self._keys

    def used(self, keys: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Note that a prompt of these blocks ran; returns the keys that entered and those that left.

        A prompt that is longer than the cache keeps its beginning.
        """
        known = self._keys
        kept = keys[: self.capacity_blocks]
        entered = [key for key in kept if key not in known]
        for key in reversed(kept):  # engines free the end of a prompt first, so a prefix outlives what hangs on it
            known[key] = None
            known.move_to_end(key)
        left = []
        while len(known) > self.capacity_blocks:
            left.append(known.popitem(last=False)[0])
        return entered, left


class _Predicted:
    """One pod's predicted cache, and what the index does not know of it yet.

    Attributes:
        cache: the prediction.
        epoch: epoch of its entries.
        owed: block key -> whether it entered (or left) since the index last took an update.
        lock: held while the index is told, so that updates reach it in the order of the decisions.
    """

    def __init__(self, cache: PredictedCache, epoch: int) -> None:
        self.cache = cache
        self.epoch = epoch
        self.owed: dict[bytes, bool] = {}
        self.lock = asyncio.Lock()


class Approximate:
    """The predicted caches of an indexer.

    Args:
        backend: the index that predictions are written to.
        pods: table that the pods are entered in, marked approximate.
        clock: wall clock, ns.
        recover: brings an index that has lost what it had to what is known.
    """

    def __init__(
        self, backend: Backend, pods: PodTable, clock: Callable[[], int], recover: Callable[[], Awaitable[None]]
    ) -> None:
        self._backend = backend
        self._pods = pods
        self._clock = clock
        self._recover = recover
        self._predicted: dict[str, _Predicted] = {}
        # These outlive a pod's removal: added again, it must go past what the index has applied of it.
        self._epochs: dict[str, int] = {}
        self._sequences: Counter[str] = Counter()

    def add(self, pod: str, model: str, capacity_blocks: int) -> None:
        """Enter a pod without events; one whose events are known already stays precise.

        Args:
            pod: pod id, the same that its events would name.
            model: model that it serves.
            capacity_blocks: canonical blocks that fit into its cache.

        Raises:
            InputError: a capacity below one block.
        """
        if capacity_blocks < 1:
            raise InputError(f"capacity_blocks: {capacity_blocks}; expected the pod's cache in blocks, at least 1")
        if pod in self._predicted or self.precise(pod):
            return
        # A stream that starts now gets this second as its incarnation; the one before lies below it, and above all
        # that an earlier run of this program left in a lasting index.
        epoch = max(epoch_of(max(self._clock() // _NS - 1, 0)), self._epochs.get(pod, -1) + 1)
        self._epochs[pod] = epoch
        self._predicted[pod] = _Predicted(PredictedCache(capacity_blocks), epoch)
        record = PodRecord(pod=pod, writer=WRITER_STREAMS, epoch=epoch, valid_from=epoch, model=model, approximate=True)
        self._pods.put(WRITER_STREAMS, pod, record)

    async def remove(self, pod: str) -> None:
        """Forget a pod that has no events.

        Raises:
            UnknownPodError: no such pod is predicted.
        """
        found = self._predicted.pop(pod, None)
        if found is None:
            raise UnknownPodError(f"no predicted cache for pod {pod!r}")
        if not self.precise(pod):
            self._pods.apply(pod_key(WRITER_STREAMS, pod), None)
        async with found.lock:
            await self._backend.drop_epoch(pod_ref(pod), found.epoch + 1)

    def predicts(self, pod: str) -> bool:
        """Whether a pod has a predicted cache."""
        return pod in self._predicted

    def precise(self, pod: str) -> bool:
        """Whether a pod is known by its events."""
        record = self._pods.merged.get(pod)
        return record is not None and not record.approximate

    def forgotten(self) -> None:
        """Note that the index has lost everything: it is told with the next decision of each pod."""
        for found in self._predicted.values():
            found.owed = dict.fromkeys(found.cache.keys(), True)

    async def decided(self, pod: str, keys: Sequence[bytes]) -> bool:
        """Note that a prompt went to a pod; False when the pod is precise, so that its events tell.

        Args:
            pod: pod id.
            keys: the prompt's block keys, first block first.

        Raises:
            UnknownPodError: the pod is neither precise nor predicted.
            BackendError: the index does not answer; the decision is noted, and told to it with the next one.
        """
        if self.precise(pod):
            if pod in self._predicted:
                await self.remove(pod)
            return False
        found = self._predicted.get(pod)
        if found is None:
            raise UnknownPodError(f"pod {pod!r} has no events and no predicted cache; add it first")
        entered, left = found.cache.used(keys)
        found.owed |= dict.fromkeys(entered, True)
        found.owed |= dict.fromkeys(left, False)
        async with found.lock:
            try:
                await self._tell(pod, found)
            except IndexLostError:
                await self._recover()
                await self._tell(pod, found)
        return True

    async def _tell(self, pod: str, found: _Predicted) -> None:
        if not found.owed or self._predicted.get(pod) is not found:
            return
        owed, found.owed = found.owed, {}
        try:
            await self._backend.apply(self._record(pod, found.epoch, owed))
        except BaseException:
            found.owed = owed | found.owed
            raise

    def _record(self, pod: str, epoch: int, owed: Mapping[bytes, bool]) -> BlocksRecord:
        ref, sequence, count = pod_ref(pod), self._sequences[pod], len(owed)
        self._sequences[pod] += 1
        return BlocksRecord(
            runs=(Run(ref, epoch, sequence, sequence, count),),
            keys=b"".join(owed),
            ops=bytes(OP_ADD if entered else OP_REMOVE for entered in owed.values()),
            holders=pack_holder(ref, 0, Tier.GPU, Kind.FULL, 0, epoch) * count,
            receive_ns=self._clock(),
        )
