"""The index in a local RocksDB, in the format of the workers' tables; survives a restart of the process."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from kvatlas.bridge.model.validity import Validity
from kvatlas.scorer.library.backends.base import Stats
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.streams.errors import StoreError
from kvatlas.streams.index.apply import Validities, apply_blocks, sweep_index
from kvatlas.streams.index.blocks_record import BlocksRecord
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.local_table import LocalTable

_SWEEP_SLICE: Final = 5_000
_MARK: Final = b"\x00mark"


class RocksBackend:
    """A RocksDB in a folder of its own.

    Args:
        folder: where; made when it is not there. One process at a time.
        cache_bytes: block cache and write buffers together.
    """

    name = "rocksdb"

    def __init__(self, folder: Path | str, cache_bytes: int = 256 * 1024 * 1024) -> None:
        self._folder = Path(folder)
        self._cache_bytes = cache_bytes
        self._table: LocalTable | None = None
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Open the database.

        Raises:
            BackendError: another process has it, or it is damaged.
        """
        half = self._cache_bytes // 2
        try:
            self._table = await asyncio.to_thread(LocalTable, self._folder, RocksBudget(half, half))
        except StoreError as error:
            raise BackendError(f"rocksdb backend: {error}") from error

    @property
    def _open(self) -> LocalTable:
        if self._table is None:
            raise BackendError(f"rocksdb backend in {self._folder} is not started")
        return self._table

    @property
    def table(self) -> LocalTable:
        """The open database, for who applies in bulk.

        Raises:
            BackendError: it is not started.
        """
        return self._open

    async def lookup(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the packed holders of each key, empty bytes where nobody holds it."""
        table = self._open
        table.prefetch(keys)
        get = table.get
        return [get(key) or b"" for key in keys]

    async def apply(self, record: BlocksRecord) -> None:
        """Apply a record of updates in one write; one that was applied before changes nothing."""
        apply_blocks(self._open, record, self._counts)
        self._open.settle(force=True)

    async def drop_epoch(self, pod_ref: int, valid_from: int, gpu_valid_from: int = 0) -> int:
        """Remove the entries of a pod's ended epochs."""
        return await self.drop_epochs({pod_ref: Validity(valid_from, gpu_valid_from)})

    async def drop_epochs(self, valid: Validities) -> int:
        """The same for several pods in one pass; lets the loop go on between slices."""
        table = self._open
        items = table.items()
        dropped = 0
        while part := list(islice(items, _SWEEP_SLICE)):
            fresh = ((key, value) for key, _ in part if (value := table.get(key)))
            found = sweep_index(fresh, valid)
            for key, value in found.puts.items():
                table.put(key, value)
            for key in found.deletes:
                table.delete(key)
            dropped += found.dropped
            await asyncio.sleep(0)
        table.settle(force=True)
        return dropped

    async def read_mark(self) -> bytes | None:
        """Return the mark that was written into it, None without one."""
        return self._open.get(_MARK)

    async def write_mark(self, mark: bytes) -> None:
        """Write a mark that tells this index from any other."""
        self._open.put(_MARK, mark)
        self._open.settle(force=True)

    async def stats(self) -> Stats:
        """Return what it says of itself; entries are RocksDB's estimate."""
        return Stats(
            backend=self.name,
            entries=self._open.estimated_entries(),
            bytes=sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file()),
            updates=self._counts["updates"],
            late=self._counts["updates_late"],
        )

    async def close(self) -> None:
        """Write everything and let go of the folder."""
        if self._table is not None:
            self._table.close()
            self._table = None
