"""``kvatlas bench growth``: what a block index costs as it grows, by entries and by pods.

One process holds all partitions as a worker does, without Kafka: ``kv-blocks`` records are decoded, applied and written
to RocksDB in full flushes. An entry is one block at one pod. All figures are of CPU time (of all threads; of the
calling one for lookups), so that other work on the machine changes them little. The update rate is that of a further
quarter of the entries, from nothing pending to all of it written: where flushes fall otherwise decides it.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvatlas.bridge.model.block_key import KEY_BYTES, partition_of
from kvatlas.bridge.runtime.interpreter import tune_interpreter
from kvatlas.deploy.bench import _rig
from kvatlas.deploy.bench._figures import figure, spread
from kvatlas.streams.index.apply import apply_blocks, is_entry, table_keys_of
from kvatlas.streams.index.blocks_record import decode_blocks
from kvatlas.streams.index.columns import answer_columns
from kvatlas.streams.options import MIB, WorkerSettings
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState

HELP: Final = "update rate, lookups, restore, memory and disk of the block index by entries and pods"

_FLUSH: Final = 8_192
_STEP: Final = 65_536
_LOOKUP: Final = 512
_LOOKUPS: Final = 400
_IDLE_BLOCKS: Final = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--entries", type=int, default=1_000_000, help="entries in the end (default %(default)s)")
    parser.add_argument("--pods", type=int, default=10, help="pods (default %(default)s)")
    parser.add_argument("--active", type=int, default=0, help="pods that store; the others only did once (default all)")
    parser.add_argument("--partitions", type=int, default=_rig.PARTITIONS)


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures."""
    active = args.active or args.pods
    name = f"{args.entries:,} entries, {args.pods:,} pods" + (f", {active:,} active" if active < args.pods else "")
    with tempfile.TemporaryDirectory(prefix="kvatlas-bench-") as folder:
        grown = _Grown(Path(folder), args.pods, args.partitions)
        tune_interpreter()
        rate = grown.fill(args.entries, active)
        yield figure(f"{name}: update rate at that size", rate, "updates/CPU s")
        delays = grown.lookups()
        yield spread(f"{name}: lookup of {_LOOKUP} keys", delays, "ms")
        yield figure(f"{name}: restore", grown.restore(Path(folder) / "restored"), "entries/CPU s")
        yield figure(f"{name}: memory", grown.memory_bytes(), "bytes an entry")
        yield figure(f"{name}: disk", grown.disk_bytes(), "bytes an entry")
        grown.close()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Grown:
    """The partitions of a block index, filled step by step."""

    def __init__(self, folder: Path, pods: int, partitions: int) -> None:
        self._before = _resident_bytes()
        settings = WorkerSettings()
        self._budget = RocksBudget(64 * MIB, 128 * MIB)
        self._cache_bytes = settings.cache_bytes // partitions
        self._states = [self._state(number, folder / f"{number}.db") for number in range(partitions)]
        self._load = _rig.Load(pods, partitions)
        self._counts: Counter[str] = Counter()
        self._entries = 0
        self._walks: list[bytes] = []

    def _state(self, number: int, folder: Path) -> PartitionState:
        return PartitionState(number, folder, self._budget, self._cache_bytes, valid=is_entry)

    def fill(self, entries: int, active: int) -> float:
        """Store blocks until there are so many entries; returns the rate of the last quarter."""
        for pod in range(active, len(self._load.refs)):
            self._store(pod, _IDLE_BLOCKS)
        step, last = min(_STEP, entries // 16), entries // 4
        self._store_all(entries - last - self._entries, active, step)
        return last / self._store_all(last, active, step)

    def _store_all(self, blocks: int, active: int, step: int) -> float:
        """Store blocks at the pods in turn and write all of it; returns the CPU seconds."""
        seconds = 0.0
        for number, at in enumerate(range(0, blocks, step)):
            seconds += self._store(number % active, min(step, blocks - at))
        began = time.process_time()
        for state in self._states:
            self._commit(state)
        return seconds + time.process_time() - began

    def _store(self, pod: int, blocks: int) -> float:
        """Store new blocks at a pod; returns the CPU seconds of it, without those of making them up."""
        keys: np.ndarray[Any, Any] = self._load.keys(blocks)
        made = self._load.records(keys, pod)
        if blocks >= _LOOKUP:
            self._walks.append(keys[:_LOOKUP].tobytes())
        began = time.process_time()
        for number, value in made:
            state = self._states[number]
            record = decode_blocks(value)
            table_keys = table_keys_of(record)
            state.overlay.prefetch(table_keys)
            apply_blocks(state.overlay, record, self._counts, table_keys=table_keys)
            if len(state.overlay.values) >= _FLUSH:
                self._commit(state)
        self._entries += blocks
        return time.process_time() - began

    def _commit(self, state: PartitionState) -> None:
        offset = state.meta.source_offset + 1
        state.overlay.advance(offset, 1)
        changes = state.overlay.cut()
        state.write(changes.writes, offset, Meta(offset, 1, 1))
        state.overlay.committed(changes)

    def lookups(self) -> list[float]:
        """Return the milliseconds of CPU of lookups: prompts stored at any time, of which part is cached."""
        found = []
        for number in range(_LOOKUPS):
            walk = self._walks[number * 7919 % len(self._walks)]
            keys = [walk[at : at + KEY_BYTES] for at in range(0, len(walk), KEY_BYTES)]
            began = time.thread_time()
            asked: dict[int, list[bytes]] = {}
            for key in keys:
                asked.setdefault(partition_of(key, len(self._states)), []).append(key)
            values = [value for at, some in asked.items() for value in self._states[at].answer(some)]
            answer_columns(values)
            found.append((time.thread_time() - began) * 1e3)
            assert None not in values
        return found

    def restore(self, folder: Path) -> float:
        """Return the entries a second at which one partition is written anew from what a changelog would bring."""
        self._commit(self._states[0])
        entries: list[tuple[bytes | None, bytes | None]] = list(self._states[0].items())
        random.Random(1).shuffle(entries)  # noqa: S311 # a changelog is in the order of time
        state = self._state(0, folder)
        began = time.process_time()
        for at in range(0, len(entries), _FLUSH):
            state.load(entries[at : at + _FLUSH], at + _FLUSH)
        seconds = time.process_time() - began
        state.close()
        return len(entries) / seconds

    def memory_bytes(self) -> float:
        """Return the memory of the process that the entries take: caches, memtables, overlays."""
        return (_resident_bytes() - self._before) / self._entries

    def disk_bytes(self) -> float:
        """Return the bytes of the files once all of it is written and compacted."""
        for state in self._states:
            self._commit(state)
            state._db.raw.flush()
            state._db.raw.compact_range(None, None)
        return sum(state.size_bytes() for state in self._states) / self._entries

    def close(self) -> None:
        """Let go of the files."""
        for state in self._states:
            state.close()
