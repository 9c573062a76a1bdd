"""RocksDB as our tables use it: options in one place, one memory budget for all partitions of a process."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any, Final

import rocksdict

from kvatlas.streams.errors import StoreError

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
    """

    def __init__(self, cache_bytes: int, write_buffer_bytes: int) -> None:
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


def open_database(path: Path, budget: RocksBudget, *, replace_damaged: bool = False) -> Any:
    """Open a partition's database, waiting a little for a former owner to let go of its lock.

    Args:
        path: its folder.
        budget: memory that it shares with others.
        replace_damaged: throw a damaged one away and begin with an empty one, for whoever has it all elsewhere.

    Raises:
        StoreError: it is locked by another process or cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_OPEN_RETRIES):
        try:
            database = rocksdict.Rdict(str(path), options=budget.options())
        except Exception as error:  # rocksdict raises bare Exception
            if "lock" in str(error).lower() and attempt < _OPEN_RETRIES - 1:
                time.sleep(_OPEN_RETRY_SECONDS)
                continue
            if replace_damaged and "Corruption" in str(error) and not attempt:
                logger.warning("%s is damaged and is thrown away, to be rebuilt from its changelog: %s", path, error)
                shutil.rmtree(path, ignore_errors=True)
                continue
            raise StoreError(
                f"cannot open the table partition in {path}: {error}. Stop the process that uses it, or remove the "
                "folder: the table is rebuilt from its changelog"
            ) from error
        else:
            return database
    raise AssertionError("unreachable")
