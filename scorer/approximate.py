"""Predicted caches of engines that send no events: what a router's own decisions must have left there.

A decision sends a prompt to a pod, so the pod computes its blocks and keeps them while it has room. The prediction is
an LRU table of block keys per pod, as large as the pod's cache; what enters and leaves it is written into the same
index as real updates are, under an epoch below any that a stream can have. Once the pod's events arrive, its epoch
rises past that one: predicted blocks stop counting in the same moment, without a switch anywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from kvatlas.bridge.events import Kind, Tier
from kvatlas.bridge.records import WRITER_STREAMS, PodRecord, epoch_of, pod_key, pod_ref
from kvatlas.scorer.backends.base import Backend
from kvatlas.scorer.errors import InputError, UnknownPodError
from kvatlas.scorer.pods import PodTable
from kvatlas.streams.codec import OP_ADD, OP_REMOVE, BlocksRecord, Run, pack_holder

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


class Approximate:
    """The predicted caches of an indexer.

    Args:
        backend: the index that predictions are written to.
        pods: table that the pods are entered in, marked approximate.
        clock: wall clock, ns.
    """

    def __init__(self, backend: Backend, pods: PodTable, clock: Callable[[], int]) -> None:
        self._backend = backend
        self._pods = pods
        self._clock = clock
        self._caches: dict[str, PredictedCache] = {}
        self._epochs: dict[str, int] = {}
        self._sequences: dict[str, int] = {}

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
        if pod in self._caches or self.precise(pod):
            return
        # A stream that starts now gets this second as its incarnation; the one before lies below it, and above all
        # that an earlier run of this program left in a lasting index.
        epoch = epoch_of(max(self._clock() // _NS - 1, 0))
        self._caches[pod] = PredictedCache(capacity_blocks)
        self._epochs[pod], self._sequences[pod] = epoch, 0
        record = PodRecord(pod=pod, writer=WRITER_STREAMS, epoch=epoch, valid_from=epoch, model=model, approximate=True)
        self._pods.put(WRITER_STREAMS, pod, record)

    async def remove(self, pod: str) -> None:
        """Forget a pod that has no events.

        Raises:
            UnknownPodError: no such pod is predicted.
        """
        if pod not in self._caches:
            raise UnknownPodError(f"no predicted cache for pod {pod!r}")
        del self._caches[pod]
        if not self.precise(pod):
            self._pods.apply(pod_key(WRITER_STREAMS, pod), None)
        await self._backend.drop_epoch(pod_ref(pod), self._epochs.pop(pod) + 1)

    def precise(self, pod: str) -> bool:
        """Whether a pod is known by its events."""
        record = self._pods.merged.get(pod)
        return record is not None and not record.approximate

    async def decided(self, pod: str, keys: Sequence[bytes]) -> bool:
        """Note that a prompt went to a pod; False when the pod is precise, so that its events tell.

        Args:
            pod: pod id.
            keys: the prompt's block keys, first block first.

        Raises:
            UnknownPodError: the pod is neither precise nor predicted.
            BackendError: the index does not answer.
        """
        if self.precise(pod):
            if pod in self._caches:
                await self.remove(pod)
            return False
        cache = self._caches.get(pod)
        if cache is None:
            raise UnknownPodError(f"pod {pod!r} has no events and no predicted cache; add it first")
        entered, left = cache.used(keys)
        if entered or left:
            await self._backend.apply(self._record(pod, entered, left))
        return True

    def _record(self, pod: str, entered: Sequence[bytes], left: Sequence[bytes]) -> BlocksRecord:
        ref, epoch, sequence = pod_ref(pod), self._epochs[pod], self._sequences[pod]
        self._sequences[pod] = sequence + 1
        count = len(entered) + len(left)
        return BlocksRecord(
            runs=(Run(ref, epoch, sequence, sequence, count),),
            keys=b"".join([*entered, *left]),
            ops=bytes([OP_ADD]) * len(entered) + bytes([OP_REMOVE]) * len(left),
            holders=pack_holder(ref, 0, Tier.GPU, Kind.FULL, 0, epoch) * count,
            receive_ns=self._clock(),
        )
