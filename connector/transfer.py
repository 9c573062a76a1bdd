"""Copies between paged KV tensors and host slots, on CUDA streams of their own or on the CPU.

A slot holds a block's pages one after the other, in the order of its group's references. On a GPU one gather brings a
chunk of blocks into a device buffer, and as few large copies as the slots allow bring that to pinned memory; loads go
the other way. The engine's stream is never waited for on the host, nor made to wait: a store's stream waits for an
event recorded where the blocks were computed, a load's for one recorded when it was asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvatlas.connector.layout import round_up


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


class Mover:
    """Moves blocks between ``kv`` and ``host``; calls may come from several threads and return when done.

    Args:
        kv: the paged tensors, all on one device.
        host: int8, shape (slots, slot bytes); pinned when ``kv`` is on a GPU.
        chunk_blocks: blocks per gather; bounds the device memory taken and the wait for the first blocks.
    """

    def __init__(self, kv: PagedKV, host: torch.Tensor, chunk_blocks: int = 16) -> None:
        self.kv = kv
        self.host = host
        self.chunk_blocks = chunk_blocks
        self.device = kv.tensors[0].device
        self._local = threading.local()

    def mark(self) -> Any:
        """Return an event at this point of the calling thread's stream; None on the CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def store(self, group: int, places: Sequence[Placement], after: Any = None) -> None:
        """Copy blocks to their slots once ``after`` (from :meth:`mark`) is reached."""
        self._move(group, places, after, to_host=True)

    def load(self, group: int, places: Sequence[Placement], after: Any = None) -> None:
        """Copy slots to their blocks once ``after`` is reached; served before stores by the GPU."""
        self._move(group, places, after, to_host=False)

    def _move(self, group: int, places: Sequence[Placement], after: Any, *, to_host: bool) -> None:
        ordered = sorted(places, key=lambda place: place.slot)
        for at in range(0, len(ordered), self.chunk_blocks):
            chunk = ordered[at : at + self.chunk_blocks]
            if self.device.type == "cuda":
                self._cuda(group, chunk, after, to_host=to_host)
            else:
                self._cpu(group, chunk, to_host=to_host)

    def _cpu(self, group: int, chunk: Sequence[Placement], *, to_host: bool) -> None:
        blocks = torch.tensor([place.block for place in chunk])
        slots = torch.tensor([place.slot for place in chunk])
        at = 0
        for ref in self.kv.groups[group]:
            pages = self.kv.tensors[ref.tensor]
            if to_host:
                self.host[slots, at : at + ref.page_bytes] = pages[blocks, : ref.page_bytes]
            else:
                pages[blocks, : ref.page_bytes] = self.host[slots, at : at + ref.page_bytes]
            at += ref.page_bytes

    def _stage(self, *, to_host: bool) -> tuple[Any, torch.Tensor]:
        """Return this thread's stream for a direction and its device buffer."""
        name = "store" if to_host else "load"
        if not hasattr(self._local, name):
            with torch.cuda.device(self.device):
                stream = torch.cuda.Stream(priority=0 if to_host else -1)  # type: ignore[no-untyped-call]
                with torch.cuda.stream(stream):
                    size = (self.chunk_blocks, self.host.shape[1])
                    buffer = torch.empty(size, dtype=torch.int8, device=self.device)
            setattr(self._local, name, (stream, buffer))
        return getattr(self._local, name)  # type: ignore[no-any-return]

    def _cuda(self, group: int, chunk: Sequence[Placement], after: Any, *, to_host: bool) -> None:
        stream, buffer = self._stage(to_host=to_host)
        slots = [place.slot for place in chunk]
        size = self.kv.block_bytes(group)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            blocks = torch.tensor([place.block for place in chunk]).pin_memory()
            on_device = blocks.to(self.device, non_blocking=True)
            if not to_host:
                for first, length in runs(slots):
                    source = self.host[slots[first] : slots[first] + length, :size]
                    buffer[first : first + length, :size].copy_(source, non_blocking=True)
            at = 0
            for ref in self.kv.groups[group]:
                pages = self.kv.tensors[ref.tensor]
                staged = buffer[: len(chunk), at : at + ref.page_bytes]
                if to_host:
                    staged.copy_(pages.index_select(0, on_device)[:, : ref.page_bytes])
                else:
                    pages[:, : ref.page_bytes].index_copy_(0, on_device, staged)
                at += ref.page_bytes
            if to_host:
                for first, length in runs(slots):
                    aim = self.host[slots[first] : slots[first] + length, :size]
                    aim.copy_(buffer[first : first + length, :size], non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(stream)
        # Waits without the GIL, on this transfer alone.
        done.synchronize()
