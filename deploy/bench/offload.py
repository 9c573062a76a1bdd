"""``kvatlas bench offload``: the connector beside plain I/O and plain copies of the same bytes.

File cases run the tier and the plain calls in turns on the same directory, with the same flags, threads and sizes, and
compare the medians. GPU cases run when a CUDA device is there.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

HELP: Final = "KV offload: file tier beside pwritev/preadv, GPU copies beside one large pinned copy"

_MB: Final = 1 << 20
_BLOCK_BYTES: Final = 2 * _MB
_CASES: Final = {"2MB": 1, "16MB": 8}
_ORDERS: Final = (("plain-store", "store", "plain-load", "load"), ("store", "plain-store", "load", "plain-load"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's flags."""
    parser.add_argument("--directory", type=Path, help="where to write (default: a new temporary directory)")
    parser.add_argument("--megabytes", type=int, default=256, help="bytes per round and case in MB (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, tier and plain in turns (default 9)")
    parser.add_argument("--threads", type=int, default=4, help="transfers in I/O at once on either side (default 4)")
    parser.add_argument("--buffered", action="store_true", help="page cache instead of direct I/O, on either side")
    parser.add_argument("--cases", default="file,others,gpu", help="what to run (default file,others,gpu)")


def run(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Yield one dict per figure: ``value`` and ``baseline`` in GB/s, ``ratio`` of the two."""
    wanted = set(args.cases.split(","))
    with _directory(args.directory) as directory:
        if "file" in wanted:
            for name, per_file in _CASES.items():
                yield from _file_cases(args, directory, name, per_file)
        if "others" in wanted:
            for name, per_file in _CASES.items():
                yield from _other_formats(args, directory, name, per_file)
    if "gpu" in wanted:
        yield from _gpu_cases(args)


@contextlib.contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="kvatlas-bench-", dir=given))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _figure(case: str, seconds: Sequence[float], plain: Sequence[float], size: int) -> dict[str, Any]:
    value, baseline = size / statistics.median(seconds) / 1e9, size / statistics.median(plain) / 1e9
    ranked = sorted(seconds)
    return {
        "bench": "offload",
        "case": case,
        "value": round(value, 3),
        "unit": "GB/s",
        "p50": round(value, 3),
        "p99": round(size / ranked[-1] / 1e9, 3),
        "baseline": round(baseline, 3),
        "ratio": round(value / baseline, 3),
    }


def _memory(size: int) -> memoryview:
    """Return page-aligned memory with content that does not compress."""
    memory = memoryview(mmap.mmap(-1, size))
    seed = os.urandom(_MB)
    for at in range(0, size, _MB):
        part = memory[at : at + _MB]
        part[:] = seed[: len(part)]
        part[:8] = at.to_bytes(8, "little")
    return memory


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _threaded(threads: int, count: int, work: Callable[[int], object]) -> None:
    """Call ``work`` with 0 to count - 1 on several threads; the first error is raised here."""
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, range(count)):
            pass


class _Plain:
    """What the tier is measured against: open, one pwritev or preadv, close; nothing else."""

    def __init__(self, directory: Path, memory: memoryview, file_bytes: int, threads: int, *, direct: bool) -> None:
        self._directory = directory
        self._memory = memory
        self._size = file_bytes
        self._threads = threads
        self._flags = os.O_DIRECT if direct else 0
        self._count = len(memory) // file_bytes
        directory.mkdir(parents=True)

    def _part(self, number: int) -> memoryview:
        return self._memory[number * self._size : (number + 1) * self._size]

    def store(self) -> None:
        def one(number: int) -> None:
            fd = os.open(self._directory / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | self._flags, 0o600)
            os.pwritev(fd, [self._part(number)], 0)
            os.close(fd)

        _threaded(self._threads, self._count, one)

    def load(self) -> None:
        def one(number: int) -> None:
            fd = os.open(self._directory / str(number), os.O_RDONLY | self._flags)
            os.preadv(fd, [self._part(number)], 0)
            os.close(fd)

        _threaded(self._threads, self._count, one)

    def clear(self) -> None:
        for path in self._directory.iterdir():
            path.unlink()


@contextlib.contextmanager
def _tier(
    args: argparse.Namespace, directory: Path, memory: memoryview, per_file: int, *, buffered: bool
) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a file tier that has looked around, and the blocks of ``memory``."""
    from kvatlas.connector.files.blocks import Block  # noqa: PLC0415 - `bench list` must not need the connector
    from kvatlas.connector.files.catalog import Budget  # noqa: PLC0415
    from kvatlas.connector.files.layout import Fingerprint  # noqa: PLC0415
    from kvatlas.connector.files.settings import FileTierSettings  # noqa: PLC0415
    from kvatlas.connector.files.tier import FileTier  # noqa: PLC0415

    blocks = [
        Block(number.to_bytes(32, "big"), [memory[at : at + _BLOCK_BYTES]])
        for number, at in enumerate(range(0, len(memory), _BLOCK_BYTES))
    ]
    fingerprint = Fingerprint(
        engine="bench", engine_version="1", model=f"bench-{per_file}", hash_algorithm="counter", hash_seed="",
        dtype="int8", block_size_tokens=(16,), layers=(), block_bytes=_BLOCK_BYTES,
    )  # fmt: skip
    settings = FileTierSettings(
        root=directory,
        blocks_per_file=per_file,
        threads=args.threads,
        write_threads=args.threads,
        queued_write_bytes=2 * len(memory),
        direct=not buffered,
        budget=Budget(max_percent=None),
    )
    directory.mkdir(parents=True, exist_ok=True)
    with FileTier(settings, fingerprint) as tier:
        tier.scanned.wait()
        yield tier, blocks


def _file_cases(args: argparse.Namespace, directory: Path, name: str, per_file: int) -> Iterator[dict[str, Any]]:
    size = args.megabytes * _MB
    memory = _memory(size)
    times: dict[str, list[float]] = {"store": [], "load": [], "plain-store": [], "plain-load": []}
    with _tier(args, directory / "tier", memory, per_file, buffered=args.buffered) as (tier, blocks):
        plain = _Plain(directory / f"plain-{name}", memory, per_file * _BLOCK_BYTES, args.threads, direct=tier.direct)
        works: dict[str, Callable[[], object]] = {
            "plain-store": plain.store,
            "store": lambda: _good(tier.store(blocks).result()),
            "plain-load": plain.load,
            "load": lambda: _good(tier.load(blocks, per_task=per_file).result()),
        }
        for number in range(args.rounds + 1):
            # Who goes first changes every round: the disk is not the same right after files were removed.
            for key in _ORDERS[number % 2]:
                seconds = _timed(works[key])
                if number:  # the first round warms up
                    times[key].append(seconds)
            plain.clear()
            tier.evict([block.key for block in blocks])
    yield _figure(f"file-store-{name}", times["store"], times["plain-store"], size)
    yield _figure(f"file-load-{name}", times["load"], times["plain-load"], size)


def _good(results: dict[bytes, Any]) -> None:
    bad = [result for result in results.values() if not result.ok]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(results)} transfers failed, the first with {bad[0]}")


def _other_formats(args: argparse.Namespace, directory: Path, name: str, per_file: int) -> Iterator[dict[str, Any]]:
    """Yield the tier's store and load beside torch's and safetensors' own, one file per segment.

    Those write through the page cache, so the tier does here too; what safetensors maps is touched by a copy.
    """
    try:
        import torch  # noqa: PLC0415 - optional
    except ImportError:
        return
    size = args.megabytes * _MB
    memory = _memory(size)
    step = per_file * _BLOCK_BYTES
    tensors = [torch.frombuffer(memory[at : at + step], dtype=torch.uint8) for at in range(0, size, step)]
    formats: dict[str, tuple[Callable[[Any, Path], object], Callable[[Path], object]]] = {
        "torch": (torch.save, lambda path: torch.load(path, weights_only=True)),
    }
    with contextlib.suppress(ImportError):
        from safetensors.torch import load_file, save_file  # noqa: PLC0415

        formats["safetensors"] = (
            lambda tensor, path: save_file({"kv": tensor}, path),
            lambda path: load_file(path)["kv"].clone(),
        )
    times: dict[str, dict[str, list[float]]] = {label: {"store": [], "load": []} for label in ("tier", *formats)}
    target = directory / f"others-{name}"
    with _tier(args, directory / f"tier-{name}", memory, per_file, buffered=True) as (tier, blocks):

        def ours() -> tuple[float, float]:
            store = _timed(lambda: _good(tier.store(blocks).result()))
            load = _timed(lambda: _good(tier.load(blocks, per_task=per_file).result()))
            tier.evict([block.key for block in blocks])
            return store, load

        def theirs(label: str) -> tuple[float, float]:
            save, restore = formats[label]
            target.mkdir()
            store = _timed(lambda: _save_all(args.threads, tensors, save, target))
            load = _timed(lambda: _load_all(args.threads, len(tensors), restore, target))
            shutil.rmtree(target)
            return store, load

        for number in range(args.rounds + 1):
            for label, seconds in times.items():
                store, load = ours() if label == "tier" else theirs(label)
                if number:
                    seconds["store"].append(store)
                    seconds["load"].append(load)
    for label in formats:
        for direction in ("store", "load"):
            figure = _figure(
                f"file-{direction}-{name}-beside-{label}", times["tier"][direction], times[label][direction], size
            )
            yield figure


def _save_all(threads: int, tensors: Sequence[Any], save: Callable[[Any, Path], object], target: Path) -> None:
    _threaded(threads, len(tensors), lambda number: save(tensors[number], target / str(number)))


def _load_all(threads: int, count: int, restore: Callable[[Path], object], target: Path) -> None:
    _threaded(threads, count, lambda number: restore(target / str(number)))


def _gpu_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield GPU copies beside one large pinned copy, and what a store costs a running matmul; nothing without CUDA."""
    try:
        import torch  # noqa: PLC0415 - optional
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    from kvatlas.connector.offload.engine import host_memory  # noqa: PLC0415 - needs torch
    from kvatlas.connector.offload.transfer import Mover, PagedKV, Placement  # noqa: PLC0415

    total = 1 << 30
    for page in (64 << 10, 256 << 10, 2 << 20):
        blocks = total // (4 * page)
        layers = [torch.randint(-128, 127, (blocks, page), dtype=torch.int8, device="cuda") for _ in range(4)]
        kv = PagedKV.from_layers([layers])
        host, _ = host_memory(blocks, kv.slot_bytes, pin_for=layers[0].device)
        mover = Mover(kv, host, chunk_blocks=max(1, (64 << 20) // kv.slot_bytes))
        places = [Placement((number * 7919) % blocks, number) for number in range(blocks)]
        flat = torch.empty(total, dtype=torch.int8, device="cuda")
        plain = host.view(-1)[:total]
        works: dict[str, Callable[[], object]] = {
            "plain-store": lambda flat=flat, plain=plain: plain.copy_(flat, non_blocking=True),  # type: ignore[misc]
            "store": lambda mover=mover, places=places: mover.store(0, places, mover.mark()),  # type: ignore[misc]
            "plain-load": lambda flat=flat, plain=plain: flat.copy_(plain, non_blocking=True),  # type: ignore[misc]
            "load": lambda mover=mover, places=places: mover.load(0, places, mover.mark()),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for number in range(args.rounds + 1):
            for name, work in works.items():
                torch.cuda.synchronize()
                seconds = _timed(lambda work=work: _finished(torch, work))  # type: ignore[misc]
                if number:
                    times[name].append(seconds)
        yield _figure(f"gpu-store-{page >> 10}KB", times["store"], times["plain-store"], total)
        yield _figure(f"gpu-load-{page >> 10}KB", times["load"], times["plain-load"], total)
        if page == 2 << 20:
            yield _matmul_case(torch, mover, places)
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())


def _matmul_case(torch: Any, mover: Any, places: Sequence[Any]) -> dict[str, Any]:
    """Return how long a stream of matmuls takes while stores of 1 GB go on, beside how long it takes alone."""
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def compute() -> None:
        for _ in range(60):
            torch.mm(left, left)
        torch.cuda.current_stream().synchronize()

    def store(ready: Any, done: threading.Event) -> None:
        while not done.is_set():
            mover.store(0, places, ready)

    compute()
    alone = statistics.median(_timed(compute) for _ in range(5))
    beside: list[float] = []
    for _ in range(5):
        # Marked before the matmuls are queued, as an engine stores one step's blocks while it computes the next: a mark
        # behind them would begin the stores only when they are over.
        ready, done = mover.mark(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(store, ready, done)
            beside.append(_timed(compute))
            done.set()
            running.result()
    value = statistics.median(beside)
    return {
        "bench": "offload", "case": "gpu-matmul-beside-store", "value": round(value, 4), "unit": "s",
        "baseline": round(alone, 4), "ratio": round(value / alone, 3),
    }  # fmt: skip


def _finished(torch: Any, work: Callable[[], object]) -> None:
    work()
    torch.cuda.synchronize()
