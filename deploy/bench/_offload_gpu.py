"""GPU cases of ``bench offload``: copies with checksums beside plain pinned copies, and what stores cost a product."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from kvatlas.connector.files.layout import checksum
from kvatlas.connector.offload.engine import host_memory
from kvatlas.connector.offload.transfer import Mover, PagedKV, Placement
from kvatlas.deploy.bench._figures import figure
from kvatlas.deploy.bench._offload_rig import MB, moved, timed

_SIZES: Final = {"2MB": 2 * MB, "16MB": 16 * MB}
_LAYERS: Final = 4
#: Threads that move blocks, each a chunk at a time: one copies while another computes its checksums.
_THREADS: Final = 4
_CHUNK_BYTES: Final = 64 * MB


def gpu_cases(rounds: int, *, device: str = "cuda", total: int = 1 << 30) -> Iterator[dict[str, Any]]:
    """Yield ``gpu-store``, ``gpu-load`` and ``gpu-both`` per block size, and ``gpu-matmul``; nothing without a device.

    Args:
        rounds: rounds, ours and plain in turns.
        device: where the paged memory is; ``cpu`` tries the code out, its figures say nothing.
        total: bytes moved per round and direction.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return
    for name, block_bytes in _SIZES.items():
        with_memory = _Case(torch.device(device), block_bytes, total)
        try:
            yield from with_memory.copies(name, rounds)
            if name == "2MB":
                yield with_memory.matmul(rounds)
        finally:
            with_memory.close()


class _Case:
    """Paged memory, pinned memory for it twice (ours and for plain copies), and the work on them."""

    def __init__(self, device: torch.device, block_bytes: int, total: int) -> None:
        self._device = device
        self._total = total
        count, page = total // block_bytes, block_bytes // _LAYERS
        layers = [torch.randint(-128, 127, (count, page), dtype=torch.int8, device=device) for _ in range(_LAYERS)]
        kv = PagedKV.from_layers([layers])
        pin = device if device.type == "cuda" else None
        # The second halves serve the other direction where both are measured at once.
        self._host, self._view = host_memory(2 * count, kv.slot_bytes, pin_for=pin)
        self._plain, _ = host_memory(2 * count, kv.slot_bytes, pin_for=pin)
        self._flat = [torch.empty(total, dtype=torch.int8, device=device) for _ in range(2)]
        self._slot_bytes = kv.slot_bytes
        self._mover = Mover(kv, self._host, chunk_blocks=max(1, _CHUNK_BYTES // kv.slot_bytes))
        step = max(1, count // (2 * _THREADS))
        places = [Placement((number * 7919) % count, number) for number in range(count)]
        self._chunks = [places[at : at + step] for at in range(0, count, step)]
        self._away = [[place._replace(slot=place.slot + count) for place in chunk] for chunk in self._chunks]
        self._sums: dict[int, int] = {}
        self._pool = ThreadPoolExecutor(2 * _THREADS)

    def close(self) -> None:
        """End the threads and unpin the memory."""
        self._pool.shutdown()
        if self._device.type == "cuda":
            for memory in (self._host, self._plain):
                torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def _sum(self, slot: int) -> int:
        return checksum(self._view[slot * self._slot_bytes : (slot + 1) * self._slot_bytes])

    def _store_chunk(self, chunk: list[Placement], after: Any) -> None:
        self._mover.store(0, chunk, after)
        for place in chunk:
            self._sums[place.slot] = self._sum(place.slot)

    def _load_chunk(self, chunk: list[Placement], after: Any) -> None:
        for place in chunk:
            if self._sum(place.slot) != self._sums[place.slot]:
                raise RuntimeError(f"slot {place.slot} has other bytes than were stored")
        self._mover.load(0, chunk, after)

    def _all(self, *works: tuple[Callable[[list[Placement], Any], None], list[list[Placement]]]) -> None:
        after = self._mover.mark()
        running = [self._pool.submit(work, chunk, after) for work, chunks in works for chunk in chunks]
        for each in running:
            each.result()

    def _plain_copy(self, *, out: bool, half: int = 0) -> None:
        host = self._plain.view(-1)[half * self._total : (half + 1) * self._total]
        near, far = (self._flat[half], host) if out else (host, self._flat[half])
        far.copy_(near, non_blocking=True)

    def _plain_both(self) -> None:
        if self._device.type != "cuda":
            self._plain_copy(out=True)
            self._plain_copy(out=False, half=1)
            return
        for half, out in enumerate((True, False)):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._plain_copy(out=out, half=half)

    def _finished(self, work: Callable[[], object]) -> None:
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def copies(self, name: str, rounds: int) -> Iterator[dict[str, Any]]:
        """Yield what stores, loads, and both at once take beside plain copies of as many bytes."""
        self._all((self._store_chunk, self._away))
        works: dict[str, Callable[[], object]] = {
            "plain-store": lambda: self._plain_copy(out=True),
            "store": lambda: self._all((self._store_chunk, self._chunks)),
            "plain-load": lambda: self._plain_copy(out=False),
            "load": lambda: self._all((self._load_chunk, self._chunks)),
            "plain-both": self._plain_both,
            "both": lambda: self._all((self._store_chunk, self._chunks), (self._load_chunk, self._away)),
        }
        times: dict[str, list[float]] = {key: [] for key in works}
        for number in range(rounds + 1):
            for key, work in works.items():
                seconds = timed(lambda work=work: self._finished(work))  # type: ignore[misc]
                if number:  # the first round warms up
                    times[key].append(seconds)
        for key in ("store", "load", "both"):
            size = self._total * (2 if key == "both" else 1)
            yield moved(f"gpu-{key}-{name}", times[key], times[f"plain-{key}"], size)

    def matmul(self, rounds: int) -> dict[str, Any]:
        """Return how long a stream of bf16 products takes while stores go on, beside how long it takes alone."""
        side, products = (8192, 60) if self._device.type == "cuda" else (256, 4)
        left = torch.randn(side, side, device=self._device, dtype=torch.bfloat16)

        def compute() -> None:
            for _ in range(products):
                torch.mm(left, left)
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()

        def store(ready: Any, done: threading.Event) -> None:
            while not done.is_set():
                for chunk in self._chunks:
                    self._store_chunk(chunk, ready)

        compute()
        alone: list[float] = []
        beside: list[float] = []
        for _ in range(rounds):
            alone.append(timed(compute))
            # Marked before the products are queued, as an engine stores one step's blocks while it computes the next: a
            # mark behind them would begin the stores only when they are over.
            ready, done = self._mover.mark(), threading.Event()
            running = self._pool.submit(store, ready, done)
            beside.append(timed(compute))
            done.set()
            running.result()
        value, baseline = statistics.median(beside), statistics.median(alone)
        return figure("gpu-matmul", value, "s", baseline=baseline, ratio=value / baseline)
