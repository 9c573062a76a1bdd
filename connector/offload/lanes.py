"""Where the steps of a copy run: a device's streams, or the calling thread.

A copy has two steps per chunk, an index kernel between paged memory and a buffer, and plain copies between that buffer
and host memory. Either may run ahead of the other by one buffer; a lane puts them in order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

BUFFERS: Final = 2


class Lane(ABC):
    """One thread's two steps in one direction, and the buffers between them."""

    @abstractmethod
    def upload(self, blocks: Sequence[int], after: Any) -> torch.Tensor:
        """Begin a transfer: return block numbers for kernels, which all come after the event ``after``."""

    @abstractmethod
    def kernels(self, chunk: int) -> Any:
        """Enter the step that touches paged memory for a chunk; gives the chunk's buffer, int8."""

    @abstractmethod
    def copies(self, chunk: int) -> Any:
        """Enter the step that touches host memory for a chunk; gives the chunk's buffer, int8."""

    @abstractmethod
    def finish(self) -> None:
        """Return when nothing begun on the lane is under way any more."""


class CpuLane(Lane):
    """Each step runs where it is asked for."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._buffer = torch.zeros(shape, dtype=torch.int8)

    def upload(self, blocks: Sequence[int], after: Any) -> torch.Tensor:  # noqa: ARG002, D102
        return torch.tensor(blocks)

    @contextmanager
    def kernels(self, chunk: int) -> Iterator[torch.Tensor]:  # noqa: ARG002, D102
        yield self._buffer

    copies = kernels

    def finish(self) -> None:  # noqa: D102
        return


class CudaLane(Lane):
    """A stream for kernels and one for copies.

    A step on a buffer waits for the event at the end of the last step on that buffer, whichever stream that was on: the
    other step of the same chunk, or the second step of the chunk that had the buffer before. Buffers are made once and
    outlive their use, since every transfer ends with :meth:`finish`; so no allocator need know of the second stream.

    Args:
        device: a CUDA device.
        shape: of each buffer.
        urgent: kernels go before those of streams that are not.
    """

    def __init__(self, device: torch.device, shape: tuple[int, int], *, urgent: bool) -> None:
        self._device = device
        with torch.cuda.device(device):
            priority = -1 if urgent else 0
            self._kernels = torch.cuda.Stream(priority=priority)
            self._copies = torch.cuda.Stream(priority=priority)
            with torch.cuda.stream(self._kernels):
                self._buffers = [torch.zeros(shape, dtype=torch.int8, device=device) for _ in range(BUFFERS)]
                # Buffers are filled with zeros first, which the stream of the copies must not overtake.
                self._used = [self._mark(self._kernels) for _ in range(BUFFERS)]

    @staticmethod
    def _mark(stream: torch.cuda.Stream, *, blocking: bool = False) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=blocking)
        event.record(stream)
        return event

    def upload(self, blocks: Sequence[int], after: Any) -> torch.Tensor:  # noqa: D102
        with torch.cuda.device(self._device), torch.cuda.stream(self._kernels):
            if after is not None:
                self._kernels.wait_event(after)
            # The allocator keeps pinned memory until a copy that does not block has read it.
            return torch.tensor(blocks).pin_memory().to(self._device, non_blocking=True)

    @contextmanager
    def _step(self, stream: torch.cuda.Stream, chunk: int) -> Iterator[torch.Tensor]:
        number = chunk % BUFFERS
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            stream.wait_event(self._used[number])
            yield self._buffers[number]
            self._used[number] = self._mark(stream)

    def kernels(self, chunk: int) -> Any:  # noqa: D102
        return self._step(self._kernels, chunk)

    def copies(self, chunk: int) -> Any:  # noqa: D102
        return self._step(self._copies, chunk)

    def finish(self) -> None:  # noqa: D102
        with torch.cuda.device(self._device):
            # Sleeps without the GIL instead of spinning, and waits for this lane alone.
            ends = [self._mark(stream, blocking=True) for stream in (self._kernels, self._copies)]
            for end in ends:
                end.synchronize()


def lane_of(device: torch.device, shape: tuple[int, int], *, urgent: bool) -> Lane:
    """Return a lane for paged tensors on ``device``."""
    return CudaLane(device, shape, urgent=urgent) if device.type == "cuda" else CpuLane(shape)
