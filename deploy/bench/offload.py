"""``kvatlas bench offload``: the connector beside plain I/O and plain copies of the same bytes.

File cases run the tier and the plain calls in turns on the same directory, with the same flags, threads and sizes, and
compare the medians; object cases do so with the puts and gets of the tier's own client. GPU cases need a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from kvatlas.deploy.bench._offload_rig import MB, fresh_memory, good, moved, threaded, timed

HELP: Final = "KV offload: file tier beside pwritev/preadv, GPU copies beside one large pinned copy"

_BLOCK_BYTES: Final = 2 * MB
_CASES: Final = {"2MB": 1, "16MB": 8}
_ORDERS: Final = (("plain-store", "store", "plain-load", "load"), ("store", "plain-store", "load", "plain-load"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's flags."""
    parser.add_argument("--directory", type=Path, help="where to write (default: a new temporary directory)")
    parser.add_argument("--megabytes", type=int, default=256, help="bytes per round and case in MB (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, tier and plain in turns (default 9)")
    parser.add_argument("--threads", type=int, default=4, help="transfers in I/O at once on either side (default 4)")
    parser.add_argument("--buffered", action="store_true", help="page cache instead of direct I/O, on either side")
    parser.add_argument(
        "--cases", default="file,others,gpu", help="what to run: file, others, s3, gpu (default file,others,gpu)"
    )
    parser.add_argument(
        "--url", help="s3://bucket/prefix for the case s3; AWS_* variables name endpoint and credentials"
    )


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
    if "s3" in wanted:
        from kvatlas.deploy.bench._offload_s3 import s3_cases  # noqa: PLC0415 - needs obstore

        yield from s3_cases(args.url or "", megabytes=args.megabytes, rounds=args.rounds, threads=args.threads)
    if "gpu" in wanted:
        with contextlib.suppress(ImportError):  # no torch
            from kvatlas.deploy.bench._offload_gpu import gpu_cases  # noqa: PLC0415

            yield from gpu_cases(args.rounds)


@contextlib.contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="kvatlas-bench-", dir=given))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


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

        threaded(self._threads, self._count, one)

    def load(self) -> None:
        def one(number: int) -> None:
            fd = os.open(self._directory / str(number), os.O_RDONLY | self._flags)
            os.preadv(fd, [self._part(number)], 0)
            os.close(fd)

        threaded(self._threads, self._count, one)

    def clear(self) -> None:
        for path in self._directory.iterdir():
            path.unlink()


@contextlib.contextmanager
def _tier(
    args: argparse.Namespace, directory: Path, memory: memoryview, per_file: int, *, buffered: bool
) -> Iterator[tuple[Any, list[Any]]]:
    """Yield a file tier that has looked around, and the blocks of ``memory``."""
    from kvatlas.connector.files.blocks import BlockBuffers  # noqa: PLC0415 - `bench list` must not need the connector
    from kvatlas.connector.files.catalog import DiskBudget  # noqa: PLC0415
    from kvatlas.connector.files.layout import Fingerprint  # noqa: PLC0415
    from kvatlas.connector.files.settings import FileTierSettings  # noqa: PLC0415
    from kvatlas.connector.files.tier import FileTier  # noqa: PLC0415

    blocks = [
        BlockBuffers(number.to_bytes(32, "big"), [memory[at : at + _BLOCK_BYTES]])
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
        budget=DiskBudget(max_percent=None),
    )
    directory.mkdir(parents=True, exist_ok=True)
    with FileTier(settings, fingerprint) as tier:
        tier.scanned.wait()
        yield tier, blocks


def _file_cases(args: argparse.Namespace, directory: Path, name: str, per_file: int) -> Iterator[dict[str, Any]]:
    size = args.megabytes * MB
    memory = fresh_memory(size)
    times: dict[str, list[float]] = {"store": [], "load": [], "plain-store": [], "plain-load": []}
    with _tier(args, directory / "tier", memory, per_file, buffered=args.buffered) as (tier, blocks):
        plain = _Plain(directory / f"plain-{name}", memory, per_file * _BLOCK_BYTES, args.threads, direct=tier.direct)
        works: dict[str, Callable[[], object]] = {
            "plain-store": plain.store,
            "store": lambda: good(tier.store(blocks).result()),
            "plain-load": plain.load,
            "load": lambda: good(tier.load(blocks, per_task=per_file).result()),
        }
        for number in range(args.rounds + 1):
            # Who goes first changes every round: the disk is not the same right after files were removed.
            for key in _ORDERS[number % 2]:
                seconds = timed(works[key])
                if number:  # the first round warms up
                    times[key].append(seconds)
            plain.clear()
            tier.evict([block.key for block in blocks])
    yield moved(f"file-store-{name}", times["store"], times["plain-store"], size)
    yield moved(f"file-load-{name}", times["load"], times["plain-load"], size)


def _other_formats(args: argparse.Namespace, directory: Path, name: str, per_file: int) -> Iterator[dict[str, Any]]:
    """Yield the tier's store and load beside torch's and safetensors' own, one file per segment.

    Those write through the page cache, so the tier does here too; what safetensors maps is touched by a copy.
    """
    try:
        import torch  # noqa: PLC0415 - optional
    except ImportError:
        return
    size = args.megabytes * MB
    memory = fresh_memory(size)
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
            store = timed(lambda: good(tier.store(blocks).result()))
            load = timed(lambda: good(tier.load(blocks, per_task=per_file).result()))
            tier.evict([block.key for block in blocks])
            return store, load

        def theirs(label: str) -> tuple[float, float]:
            save, restore = formats[label]
            target.mkdir()
            store = timed(lambda: _save_all(args.threads, tensors, save, target))
            load = timed(lambda: _load_all(args.threads, len(tensors), restore, target))
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
            case = f"file-{direction}-{name}-beside-{label}"
            yield moved(case, times["tier"][direction], times[label][direction], size)


def _save_all(threads: int, tensors: Sequence[Any], save: Callable[[Any, Path], object], target: Path) -> None:
    threaded(threads, len(tensors), lambda number: save(tensors[number], target / str(number)))


def _load_all(threads: int, count: int, restore: Callable[[Path], object], target: Path) -> None:
    threaded(threads, count, lambda number: restore(target / str(number)))
