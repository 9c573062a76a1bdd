"""The engine-free core: paged KV tensors <-> host slots <-> files, with an outcome for every block."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kvatlas.connector.errors import CapacityError, ClosedError
from kvatlas.connector.files.blocks import BlockBuffers
from kvatlas.connector.files.gather import Gather
from kvatlas.connector.files.pool import IoPool, Task
from kvatlas.connector.files.tier import FileTier
from kvatlas.connector.metrics import Metrics
from kvatlas.connector.offload.host import HostTier, SlotLease
from kvatlas.connector.offload.policies import POLICIES
from kvatlas.connector.offload.transfer import Mover, PagedKV, Placement
from kvatlas.connector.outcome import OffloadTier, Outcome, Result, Results


class TransferItem(NamedTuple):
    """One block of a transfer: its key, its KV-cache group and its number in the paged tensors."""

    key: bytes
    group: int
    block: int


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of the core.

    Attributes:
        host_bytes: pinned host memory; whole slots of it are used.
        policy: ``lru`` or ``arc``.
        threads: threads that move blocks; each moves one chunk at a time.
        chunk_blocks: blocks per chunk: the first chunk of a load is usable before the second is read.
        queued_store_bytes: stores waiting beyond this are shed.
        load_wait_seconds: how long a load waits for host slots that other transfers hold.
        cpus: CPUs of the threads, best those of the GPU's NUMA node, where the host memory lies too then; empty leaves
            placement to the system.
    """

    host_bytes: int
    policy: str = "lru"
    threads: int = 2
    chunk_blocks: int = 8
    queued_store_bytes: int = 1 << 30
    load_wait_seconds: float = 30.0
    cpus: tuple[int, ...] = ()


def host_memory(
    slots: int, slot_bytes: int, *, pin_for: torch.device | None = None, cpus: Sequence[int] = ()
) -> tuple[torch.Tensor, memoryview]:
    """Return page-aligned host memory as an int8 tensor (slots, slot bytes) and as bytes.

    Args:
        slots: number of slots.
        slot_bytes: size of each.
        pin_for: the GPU that copies from and to it; None leaves it pageable.
        cpus: the memory lies on the NUMA node of these CPUs; empty leaves that to the system.

    Raises:
        CapacityError: the memory cannot be pinned.
    """
    size = slots * slot_bytes
    memory = mmap.mmap(-1, size)
    if cpus:
        # A page lies where the thread runs that touches it first.
        with ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, frozenset(cpus))) as there:
            there.submit(np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE].fill, 0).result()
    view = memoryview(memory)
    tensor = torch.frombuffer(view, dtype=torch.int8).view(slots, slot_bytes)
    if pin_for is not None:
        with torch.cuda.device(pin_for):
            code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)
        if int(code):
            raise CapacityError(f"{size} bytes of host memory cannot be pinned (CUDA error {int(code)}); ask for less")
    return tensor, view


class OffloadEngine:
    """Stores, loads, finds and evicts blocks of one set of paged KV tensors.

    Args:
        kv: the paged tensors.
        settings: see :class:`EngineSettings`.
        files: the farther tier, None for host memory alone. The caller closes it after the engine.
        metrics: where to count.

    Raises:
        CapacityError: not one block fits ``host_bytes``.
    """

    def __init__(
        self, kv: PagedKV, settings: EngineSettings, files: FileTier | None = None, metrics: Metrics | None = None
    ) -> None:
        self.kv = kv
        self.settings = settings
        self.files = files
        self.metrics = metrics or (files.metrics if files else Metrics())
        slots = settings.host_bytes // kv.slot_bytes
        if slots < 1:
            raise CapacityError(f"host_bytes {settings.host_bytes} holds no block of {kv.slot_bytes} bytes")
        self.host = HostTier(slots, POLICIES[settings.policy](slots))
        device = kv.tensors[0].device if kv.tensors[0].is_cuda else None
        tensor, self._view = host_memory(slots, kv.slot_bytes, pin_for=device, cpus=settings.cpus)
        self._mover = Mover(kv, tensor, settings.chunk_blocks)
        self._pinned = tensor if device is not None else None
        self._pool = IoPool(
            threads=settings.threads,
            write_threads=max(1, settings.threads // 2),
            queued_write_bytes=settings.queued_store_bytes,
            cpus=settings.cpus,
            name="kvatlas-move",
        )
        self._chunk = max(1, min(settings.chunk_blocks, slots // max(1, settings.threads)))
        self.metrics.gauges["queued_move_loads"] = lambda: float(self._pool.queued[0])
        self.metrics.gauges["queued_move_stores"] = lambda: float(self._pool.queued[1])
        self.metrics.gauges["host_blocks"] = lambda: float(len(self.host))
        self.metrics.gauges["host_evicted_blocks"] = lambda: float(self.host.evicted)

    # -- store -----------------------------------------------------------------------------------------------

    def store(self, items: Sequence[TransferItem]) -> Future[Results]:
        """Copy blocks to host memory and on to the files.

        The paged blocks must not be overwritten before the future is done, except by work on the calling
        thread's CUDA stream that itself waits for it.

        Returns:
            A future that always ends. STORED and EXISTS mean: in every tier there is. FAILED may leave the block
            in host memory; the result's ``tier`` says so.

        Raises:
            ValueError: there is no such group or block.
        """
        return self._submit(items, self._store_chunk, writes=True)

    def _store_chunk(self, items: Sequence[TransferItem], after: Any, report: Callable[[Results], None]) -> None:
        lease = self.host.lease([item.key for item in items])
        if lease is None:
            self.metrics.count("shed", len(items))
            report({item.key: Result(Outcome.SHED, "host memory is full of transfers") for item in items})
            return
        try:
            fresh = [item for item in items if item.key in lease.empty]
            self._copy(fresh, lease.empty, after, to_host=True)
        except BaseException:
            self._abandon(lease)
            raise
        for key in lease.empty:
            self.host.filled(key, good=True)
        keys = list(dict.fromkeys(item.key for item in items))
        if self.files is None:
            self.host.release(keys)
            report(
                {
                    key: Result(Outcome.STORED if key in lease.empty else Outcome.EXISTS, tier=OffloadTier.HOST)
                    for key in keys
                }
            )
            return
        slots = {**lease.ready, **lease.empty}
        groups = {item.key: item.group for item in items}

        def finish(future: Future[Results]) -> None:
            self.host.release(keys)
            report(
                {
                    key: result if result.ok else result._replace(tier=OffloadTier.HOST)
                    for key, result in future.result().items()
                }
            )

        blocks = [BlockBuffers(key, [self._row(slots[key], groups[key])]) for key in keys]
        self.files.store(blocks).add_done_callback(finish)

    # -- load ------------------------------------------------------------------------------------------------

    def load(self, items: Sequence[TransferItem]) -> Future[Results]:
        """Bring blocks back into the paged tensors; only blocks whose bytes verified are written there.

        Returns:
            A future that always ends, with LOADED, MISS, FAILED or CANCELLED per key. A block that is not LOADED
            was not touched.

        Raises:
            ValueError: there is no such group or block.
        """
        return self._submit(items, self._load_chunk, writes=False)

    def _load_chunk(self, items: Sequence[TransferItem], after: Any, report: Callable[[Results], None]) -> None:
        keys = list(dict.fromkeys(item.key for item in items))
        if self.files is None and (absent := [key for key in keys if key not in self.host]):
            # Nothing can fill a slot for these, so none is taken from a block that is here.
            self.metrics.count("misses", len(absent))
            missing = dict.fromkeys(absent, Result(Outcome.MISS, "not in host memory"))
            rest = [item for item in items if item.key not in missing]
            if not rest:
                report(missing)
                return
            self._load_chunk(rest, after, lambda results: report({**missing, **results}))
            return
        lease = self.host.lease(keys, self.settings.load_wait_seconds)
        if lease is None:
            report(dict.fromkeys(keys, Result(Outcome.FAILED, "host memory stayed full of other transfers")))
            return
        results = {key: Result(Outcome.LOADED, tier=OffloadTier.HOST) for key in lease.ready}
        pending = dict(lease.empty)
        try:
            groups = {item.key: item.group for item in items}
            found = self._read(pending, groups)
            for key in list(pending):
                results[key] = found[key]
                pending.pop(key)
                self.host.filled(key, good=found[key].ok)
            slots = {**lease.ready, **lease.empty}
            self._copy([item for item in items if results[item.key].ok], slots, after, to_host=False)
        finally:
            for key in pending:
                self.host.filled(key, good=False)
            self.host.release([key for key in keys if key in lease.ready or (key in results and results[key].ok)])
        if self.files is not None and lease.ready:
            self.files.touch(lease.ready)
        report(results)

    def _read(self, empty: dict[bytes, int], groups: dict[bytes, int]) -> Results:
        if not empty:
            return {}
        if self.files is None:
            self.metrics.count("misses", len(empty))
            return dict.fromkeys(empty, Result(Outcome.MISS, "not in host memory"))
        blocks = [BlockBuffers(key, [self._row(slot, groups[key])]) for key, slot in empty.items()]
        return self.files.load(blocks).result()

    # -- find, evict, end ------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, OffloadTier | None]:
        """Return the nearest tier that has each block; a file's payload is only verified by a load."""
        found: dict[bytes, OffloadTier | None] = {key: OffloadTier.HOST if key in self.host else None for key in keys}
        rest = [key for key, tier in found.items() if tier is None]
        if self.files is not None and rest:
            found.update({key: OffloadTier.FILE for key, there in self.files.lookup(rest).items() if there})
        return found

    def evict(self, keys: Sequence[bytes]) -> Results:
        """Remove blocks from every tier; FAILED for those that a transfer holds or the file system keeps."""
        results: Results = {}
        for key in keys:
            if not self.host.evict(key) and key in self.host:
                results[key] = Result(Outcome.FAILED, "a transfer holds it", OffloadTier.HOST)
        rest = [key for key in keys if key not in results]
        gone = dict.fromkeys(rest, Result(Outcome.MISS, "evicted"))
        results.update(self.files.evict(rest) if self.files is not None else gone)
        return results

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no transfer is queued or running."""
        return self._pool.drain(timeout_seconds) and (self.files is None or self.files.drain(timeout_seconds))

    def close(self) -> None:
        """End the threads and give the pinned memory back; what has not begun becomes CANCELLED."""
        self._pool.close()
        if self.files is not None:
            self.files.drain()
        if self._pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.data_ptr())

    # -- parts -----------------------------------------------------------------------------------------------

    def _row(self, slot: int, group: int) -> memoryview:
        at = slot * self.kv.slot_bytes
        return self._view[at : at + self.kv.block_bytes(group)]

    def _copy(self, items: Sequence[TransferItem], slots: dict[bytes, int], after: Any, *, to_host: bool) -> None:
        by_group: dict[int, list[Placement]] = {}
        for item in items:
            by_group.setdefault(item.group, []).append(Placement(item.block, slots[item.key]))
        move = self._mover.store if to_host else self._mover.load
        direction = "store" if to_host else "load"
        for group, places in by_group.items():
            with self.metrics.timed("host", direction, len(places), len(places) * self.kv.block_bytes(group)):
                move(group, places, after)

    def _abandon(self, lease: SlotLease) -> None:
        for key in lease.empty:
            self.host.filled(key, good=False)
        self.host.release(list(lease.ready))

    def _submit(
        self,
        items: Sequence[TransferItem],
        work: Callable[[Sequence[TransferItem], Any, Callable[[Results], None]], None],
        *,
        writes: bool,
    ) -> Future[Results]:
        for item in items:
            # On a GPU a wrong number would end the context of the whole engine, on a CPU a negative one would wrap.
            if not 0 <= item.group < len(self.kv.groups) or not 0 <= item.block < self.kv.blocks(item.group):
                raise ValueError(f"there is no block {item.block} of group {item.group} in the paged tensors")
        pieces = [tuple(items[at : at + self._chunk]) for at in range(0, len(items), self._chunk)]
        job = Gather(len(pieces))
        after = self._mover.mark() if pieces else None
        for piece in pieces:
            task = self._task(job, piece, work, after)
            try:
                if not writes:
                    self._pool.read(task)
                elif not self._pool.write(task):
                    self.metrics.count("shed", len(piece))
                    job.add({item.key: Result(Outcome.SHED, "too many stores are waiting") for item in piece})
            except ClosedError:
                task.cancel()
        return job.future

    def _task(self, job: Gather, piece: Sequence[TransferItem], work: Any, after: Any) -> Task:
        def run() -> None:
            try:
                work(piece, after, job.add)
            except Exception as error:  # noqa: BLE001 - the outcome carries it
                self.metrics.count("failed", len(piece))
                job.add({item.key: Result(Outcome.FAILED, repr(error)) for item in piece})

        def cancel() -> None:
            job.add({item.key: Result(Outcome.CANCELLED, "the engine closed") for item in piece})

        return Task(run, cancel, sum(self.kv.block_bytes(item.group) for item in piece))
