"""Copies between paged KV tensors and host slots, on CUDA streams of their own or on the CPU.

A slot holds a block's pages one after the other, in the order of its group's references. A chunk of blocks is gathered
into a buffer on the device, and as few large copies as the slots allow bring that to pinned memory; loads go the
other way. Of two buffers one is gathered into while the other is copied. The engine's stream is never
waited for on the host, nor made to wait: a store's gather waits for an event recorded where the blocks were computed, a
load's scatter for one recorded when it was asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvatlas.connector.files.layout import round_up
from kvatlas.connector.offload.lanes import Lane, lane_of


class Ref(NamedTuple):
    """One layer's pages: number of the tensor, and bytes of a page that count."""

    tensor: int
    page_bytes: int


@dataclass(frozen=True)
class PagedKV:
    """KV caches as pages of bytes: vLLM's canonical form.

    Attributes:
        tensors: int8, shape (blocks, page bytes).
        groups: per KV-cache group the references that make up one of its blocks.
    """

    tensors: tuple[torch.Tensor, ...]
    groups: tuple[tuple[Ref, ...], ...]

    @classmethod
    def from_layers(cls, groups: Sequence[Sequence[torch.Tensor]], block_dim: int = 0) -> PagedKV:
        """Return the canonical form of layers of any dtype.

        Args:
            groups: per group its layers' tensors.
            block_dim: which dimension counts blocks, 0 or 1 (keys and values stacked first).

        Raises:
            ValueError: a block's bytes are not contiguous in a tensor.
        """
        tensors: list[torch.Tensor] = []
        refs: list[tuple[Ref, ...]] = []
        for layers in groups:
            group: list[Ref] = []
            for layer in layers:
                for part in layer.unbind(0) if block_dim else (layer,):
                    if not part[0].is_contiguous():
                        raise ValueError("a block's bytes must be contiguous; permute the cache's layout")
                    flat = part.view(part.shape[0], -1).view(torch.int8)
                    group.append(Ref(len(tensors), flat.shape[1]))
                    tensors.append(flat)
            refs.append(tuple(group))
        return cls(tuple(tensors), tuple(refs))

    def block_bytes(self, group: int) -> int:
        """Return the bytes of one block of a group."""
        return sum(ref.page_bytes for ref in self.groups[group])

    def blocks(self, group: int) -> int:
        """Return how many blocks a group has."""
        return int(min(self.tensors[ref.tensor].shape[0] for ref in self.groups[group]))

    @property
    def slot_bytes(self) -> int:
        """Return the size of a host slot that holds a block of any group."""
        return round_up(max(self.block_bytes(number) for number in range(len(self.groups))))


class Placement(NamedTuple):
    """One block's two ends: its block number in the paged tensors and its host slot."""

    block: int
    slot: int


def runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield ``(first index, length)`` of stretches of ``slots`` that follow each other in memory."""
    begin = 0
    for at in range(1, len(slots) + 1):
        if at == len(slots) or slots[at] != slots[at - 1] + 1:
            yield begin, at - begin
            begin = at


class _Pages(NamedTuple):
    """A reference's pages and where they lie in a slot, both counted in elements of one type."""

    pages: torch.Tensor
    first: int
    last: int


#: An index kernel handles one element per thread, so pages are moved as the widest integers they consist of.
_WIDE = torch.int64
_WIDE_BYTES = 8


def _pages(tensor: torch.Tensor, ref: Ref, at: int, slot_bytes: int) -> _Pages:
    """Return the pages of ``ref``, whose bytes begin at byte ``at`` of a slot."""
    pages = tensor[:, : ref.page_bytes]
    places = (ref.page_bytes, at, slot_bytes, tensor.stride(0), tensor.storage_offset(), tensor.data_ptr())
    if any(place % _WIDE_BYTES for place in places):
        return _Pages(pages, at, at + ref.page_bytes)
    return _Pages(pages.view(_WIDE), at // _WIDE_BYTES, (at + ref.page_bytes) // _WIDE_BYTES)


class Mover:
    """Moves blocks between ``kv`` and ``host``; calls may come from several threads and return when done.

    Args:
        kv: the paged tensors, all on one device.
        host: int8, shape (slots, slot bytes); pinned when ``kv`` is on a GPU.
        chunk_blocks: blocks per gather. Each thread that moves blocks keeps two buffers of as many slots on the device
            for either direction.
    """

    def __init__(self, kv: PagedKV, host: torch.Tensor, chunk_blocks: int = 16) -> None:
        self.kv = kv
        self.host = host
        self.chunk_blocks = chunk_blocks
        self.device = kv.tensors[0].device
        self._local = threading.local()
        self._groups = tuple(tuple(self._layout(group)) for group in kv.groups)

    def _layout(self, group: Sequence[Ref]) -> Iterator[_Pages]:
        at = 0
        for ref in group:
            yield _pages(self.kv.tensors[ref.tensor], ref, at, self.host.shape[1])
            at += ref.page_bytes

    def mark(self) -> Any:
        """Return an event at this point of the calling thread's stream; None on the CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def store(self, group: int, places: Sequence[Placement], after: Any = None) -> None:
        """Copy blocks to their slots once ``after`` (from :meth:`mark`) is reached."""
        self._move(group, places, after, to_host=True)

    def load(self, group: int, places: Sequence[Placement], after: Any = None) -> None:
        """Copy slots to their blocks once ``after`` is reached; served before stores by the GPU."""
        self._move(group, places, after, to_host=False)

    def _move(self, group: int, places: Sequence[Placement], after: Any, *, to_host: bool) -> None:
        if not places:
            return
        ordered = sorted(places, key=lambda place: place.slot)
        slots = [place.slot for place in ordered]
        # Caches made in inference mode, as engines make theirs, may be written to only there.
        with torch.inference_mode():
            lane = self._lane(to_host=to_host)
            try:
                index = lane.upload([place.block for place in ordered], after)
                for number, at in enumerate(range(0, len(slots), self.chunk_blocks)):
                    chunk = slice(at, min(at + self.chunk_blocks, len(slots)))
                    step = self._store_chunk if to_host else self._load_chunk
                    step(lane, number, group, index[chunk], slots[chunk])
            finally:
                # Also after an error: until the device is done with the slots nobody else may have them.
                lane.finish()

    def _lane(self, *, to_host: bool) -> Lane:
        """Return this thread's lane for a direction."""
        name = "store" if to_host else "load"
        if not hasattr(self._local, name):
            lane = lane_of(self.device, (self.chunk_blocks, self.host.shape[1]), urgent=not to_host)
            setattr(self._local, name, lane)
        return getattr(self._local, name)  # type: ignore[no-any-return]

    def _store_chunk(self, lane: Lane, number: int, group: int, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        with lane.kernels(number) as buffer:
            for part in self._groups[group]:
                rows = buffer.view(part.pages.dtype)[: len(slots), part.first : part.last]
                torch.index_select(part.pages, 0, blocks, out=rows)
        with lane.copies(number) as buffer:
            for near, far in self._pairs(buffer, group, slots):
                far.copy_(near, non_blocking=True)

    def _load_chunk(self, lane: Lane, number: int, group: int, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        with lane.copies(number) as buffer:
            for near, far in self._pairs(buffer, group, slots):
                near.copy_(far, non_blocking=True)
        with lane.kernels(number) as buffer:
            for part in self._groups[group]:
                rows = buffer.view(part.pages.dtype)[: len(slots), part.first : part.last]
                part.pages.index_copy_(0, blocks, rows)

    def _pairs(
        self, buffer: torch.Tensor, group: int, slots: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what lies in the buffer and in host memory side by side, each of the two without holes.

        A copy of anything with holes between device and host goes through memory that is not pinned, and one to the
        host may then be taken up before it has arrived.
        """
        size = self.kv.block_bytes(group)
        # The slots' padding goes along where it is little; one call moves many blocks then.
        if size * 8 >= self.host.shape[1] * 7:
            for first, length in runs(slots):
                yield buffer[first : first + length], self.host[slots[first] : slots[first] + length]
        else:
            for number, slot in enumerate(slots):
                yield buffer[number, :size], self.host[slot, :size]
