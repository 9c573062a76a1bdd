"""RocksDB as our tables use it: options in one place, one memory budget for all partitions of a process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import rocksdict

from kvatlas.streams.errors import DamagedError, StoreError
from kvatlas.streams.state.damage import make_folder, mark, meaning, set_aside, set_aside_marked

logger = logging.getLogger(__name__)

_BLOOM_BITS: Final = 10
_BLOCK_BYTES: Final = 8 * 1024
#: Share of a memtable that its filter takes: about 15 bits for each of the index's entries.
_MEMTABLE_FILTER: Final = 0.02
_OPEN_RETRIES: Final = 30
_OPEN_RETRY_SECONDS: Final = 0.2


class RocksBudget:
    """Memory shared by every database that is opened with it: one block cache, one budget for memtables.

    Faust's own options would give every partition a block cache of 2 GiB.

    Args:
        cache_bytes: of the block cache.
        write_buffer_bytes: of all memtables.
        on_failed: told, from any thread, of an error after which a database is of no use to this process.
    """

    def __init__(
        self,
        cache_bytes: int,
        write_buffer_bytes: int,
        *,
        on_failed: Callable[[StoreError], None] = lambda _: None,
    ) -> None:
        self.on_failed = on_failed
        self.cache = rocksdict.Cache(max(cache_bytes, 1024 * 1024))
        self.write_buffer_bytes = write_buffer_bytes
        # Costed to the block cache would make memtables evict blocks; a manager of its own keeps both bounded.
        self.write_buffers = rocksdict.WriteBufferManager(write_buffer_bytes, False)

    def options(self) -> Any:
        """Return options for one partition's database."""
        table = rocksdict.BlockBasedOptions()
        table.set_bloom_filter(_BLOOM_BITS, False)
        table.set_block_size(_BLOCK_BYTES)
        table.set_block_cache(self.cache)
        table.set_cache_index_and_filter_blocks(True)
        table.set_pin_l0_filter_and_index_blocks_in_cache(True)
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_block_based_table_factory(table)
        options.set_write_buffer_manager(self.write_buffers)
        options.set_write_buffer_size(min(64 * 1024 * 1024, max(self.write_buffer_bytes // 4, 1024 * 1024)))
        options.set_max_write_buffer_number(3)
        # Most keys that are looked for are of new blocks: a filter answers ten times as fast as the memtable itself.
        options.set_memtable_prefix_bloom_ratio(_MEMTABLE_FILTER)
        options.set_memtable_whole_key_filtering(True)
        options.set_max_background_jobs(2)
        options.set_level_compaction_dynamic_level_bytes(True)
        options.set_bytes_per_sync(1024 * 1024)
        options.set_keep_log_file_num(2)
        options.set_max_open_files(256)
        options.set_compression_type(rocksdict.DBCompressionType.lz4())
        return options


def write_batch() -> Any:
    """Return an empty batch of writes that a database takes as a whole."""
    return rocksdict.WriteBatch(raw_mode=True)


def open_database(path: Path, budget: RocksBudget, *, replace_damaged: bool = False) -> Any:
    """Open a partition's database, waiting a little for a former owner to let go of its lock.

    Args:
        path: its folder.
        budget: memory that it shares with others.
        replace_damaged: set a damaged one aside and begin with an empty one, for whoever has it all elsewhere.

    Raises:
        StateFolderError: the disk is full, or this account may not use the folder.
        DamagedError: it cannot be read, and is not to be replaced.
        StoreError: it is locked by another process.
    """
    make_folder(path.parent)
    if replace_damaged:
        set_aside_marked(path)
    replaced = False
    for attempt in range(_OPEN_RETRIES):
        try:
            return rocksdict.Rdict(str(path), options=budget.options())
        except Exception as error:  # rocksdict raises bare Exception
            means = meaning(path, error)
            if isinstance(means, DamagedError) and replace_damaged and not replaced:
                set_aside(path, str(error))
                replaced = True
            elif "in use" in str(means) and attempt < _OPEN_RETRIES - 1:
                time.sleep(_OPEN_RETRY_SECONDS)
            else:
                raise means from error
    raise AssertionError("unreachable")


class Database:
    """A partition's database, whose errors say what they mean.

    What cannot be read is marked: the process ends by the error, and the next one sets the folder aside.
    """

    def __init__(self, path: Path, budget: RocksBudget) -> None:
        """Open it; a damaged one is replaced by an empty one.

        Raises:
            StoreError: it cannot be used.
        """
        self._path = path
        self._on_failed = budget.on_failed
        self.raw: Any = open_database(path, budget, replace_damaged=True)

    def get(self, key: bytes) -> bytes | None:
        """Return a value."""
        try:
            value: bytes | None = self.raw.get(key)
        except Exception as error:
            raise self._failed(error) from error
        return value

    def _told(self, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return work(*args)
        except Exception as error:
            raise self._failed(error) from error

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        """Return the values of keys in order."""
        values: list[bytes | None] = self._told(self.raw.get, keys)
        return values

    def items(self, start: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Yield entries in key order from ``start``."""
        last = start
        try:
            for last, value in self.raw.items(from_key=start):
                yield last, value
            self._surely_at_end(last)
        except Exception as error:
            raise self._failed(error) from error

    def _surely_at_end(self, last: bytes | None) -> None:
        """Look whether an iteration ended at the end: where a block cannot be read it ends as well, without a word."""
        cursor = self.raw.iter()
        if last is None:
            cursor.seek_to_first()
        else:
            cursor.seek(last)
            if cursor.valid():
                cursor.next()
        cursor.status()

    def write(self, batch: Any) -> None:
        """Write a batch."""
        self._told(self.raw.write, batch)

    def put(self, key: bytes, value: bytes) -> None:
        """Write one value."""
        self._told(self.raw.put, key, value)

    def number(self, name: str) -> int:
        """Return one of RocksDB's numbers, 0 where it has none."""
        return int(self._told(self.raw.property_int_value, name) or 0)

    def close(self) -> None:
        """Close it."""
        try:
            self.raw.close()
        except Exception as error:  # noqa: BLE001 # such as for a full disk, or what was damaged before
            logger.warning("%s: not closed cleanly, as after a crash: %s", self._path, error)

    def _failed(self, error: Exception) -> StoreError:
        means = meaning(self._path, error)
        if isinstance(means, DamagedError):
            mark(self._path, str(error))
        self._on_failed(means)  # whoever asked may be a caller that only answers with an error
        return means
