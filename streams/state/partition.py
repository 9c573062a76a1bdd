"""Local state of one partition of a table: a RocksDB database, a write-through cache in front, offsets inside.

A worker is the only writer of the partitions it owns, so the cache is coherent as long as every write goes through
:meth:`PartitionState.write`. One RocksDB ``WriteBatch`` holds the values, the offset of the changelog that they
reflect and the meta record with the source offset.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from kvatlas.bridge.errors import VersionError
from kvatlas.streams import metrics
from kvatlas.streams.errors import GoneError
from kvatlas.streams.state.cache import BytesCache
from kvatlas.streams.state.changelog import META_KEY, Meta, decode_meta, encode_meta
from kvatlas.streams.state.claims import Filter
from kvatlas.streams.state.database import Database, RocksBudget, write_batch
from kvatlas.streams.state.overlay import Overlay

logger = logging.getLogger(__name__)

#: The changelog offset that the local state reflects: worker state folders of every version have it under this key.
OFFSET_KEY: Final = b"__faust\0offset__"
RESERVED: Final = frozenset({OFFSET_KEY, META_KEY})

#: RocksDB lets go of the interpreter, so larger reads and writes run beside the event loop; for fewer keys the
#: way to a thread and back costs more than it frees.
_APART_KEYS: Final = 256


#: A changelog record: key and value, None removes the key.
Entry = tuple[bytes | None, bytes | None]

Found = TypeVar("Found")

#: Tells whether a key and its value may stand in a table.
Valid = Callable[[bytes, bytes], bool]


class Role(enum.Enum):
    """What a worker may say about a partition of a table."""

    RESTORING = "restoring"
    """Assigned, but behind its changelog: it answers nothing."""
    STANDBY = "standby"
    """A copy, possibly behind: answers are flagged."""
    ACTIVE = "active"
    """Assigned and caught up."""


class Reflected(NamedTuple):
    """What the answers from a partition reflect: last source record, and newest receive time (ns, bridge clock)."""

    source_offset: int
    receive_ns: int


class _Closed:
    """Placeholder for a closed database; every use raises an error that says so."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        raise GoneError(f"{self._path}: the partition went to another worker or is closed")


class _Users:
    """Use count: the database is closed only when no thread uses it."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        """Wait until no thread is there, and let none in until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count)
            yield


class PartitionState:
    """One partition of a table on this worker.

    Attributes:
        partition: its number.
        cache: values read or written lately.
        role: what may be said about it.
        changelog_offset: last changelog record in the state, None for none.
        meta: source offset and times that the state reflects.
        overlay: what was applied and is not committed yet; the writer applies to it.
        lock: held by whoever commits; there is one at a time.
        foreign: keys that replaced writers wrote to the changelog; their true values have to be written once more.
    """

    def __init__(
        self,
        partition: int,
        path: Path,
        budget: RocksBudget,
        cache_bytes: int,
        threads: ThreadPoolExecutor | None = None,
        *,
        valid: Valid = lambda _key, _value: True,
    ) -> None:
        self._valid = valid
        self.partition = partition
        self.path = path
        self.cache = BytesCache(cache_bytes)
        self.role = Role.RESTORING
        self.lock = asyncio.Lock()
        self.overlay = Overlay(self)
        self.foreign: set[bytes] = set()
        self._dropping = False
        self._budget = budget
        self._threads = threads
        self._users = _Users()
        self._db: Any = _Closed(path)
        self._open()

    def _open(self) -> None:
        self._db = Database(self.path, self._budget)
        self.changelog_offset: int | None = None
        self.meta = Meta()
        offset, found = self._db.get(OFFSET_KEY), self._db.get(META_KEY)
        try:
            self.changelog_offset = None if offset is None else int(offset)
            self.meta = Meta() if found is None else decode_meta(found)
        except (VersionError, ValueError) as error:
            logger.warning("%s: %s; the state is rebuilt from its changelog", self.path, error)
            self.wipe()

    # --- reading --------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """Return a value from the cache or the database."""
        value = self.cache.get(key)
        if value is None:
            value = self._db.get(key)
            if value is not None:
                self.cache.put(key, value)
        return value

    def fetch(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return values straight from the database in one multi-get; the caller looked into the cache."""
        values: list[bytes | None] = self._db.get_many(list(keys))
        return values

    async def fetch_apart(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return values straight from the database like :meth:`fetch`, in a thread when there are many keys.

        Only for the partition's writer: what comes back must not be older than what it knows.
        """
        return self.fetch(keys) if len(keys) < _APART_KEYS else await self._apart(self.fetch, keys)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys in order: cache first, one multi-get for the rest."""
        get = self.cache.get
        values = [get(key) for key in keys]
        missing = [number for number, value in enumerate(values) if value is None]
        if missing:
            put = self.cache.put
            for number, value in zip(missing, self.fetch([keys[number] for number in missing]), strict=True):
                if value is not None:
                    values[number] = value
                    put(keys[number], value)
        return values

    @property
    def reflected(self) -> Reflected:
        """Return what answers from here reflect: what was applied, committed or not."""
        applied, meta = self.overlay.reflected, self.meta
        if applied is None:
            return Reflected(meta.source_offset, meta.receive_ns)
        return Reflected(applied[0], max(applied[1], meta.receive_ns))

    def answer(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of keys in order as of what was applied, committed or not."""
        newer = self.overlay.values
        if not newer:
            return self.get_many(keys)
        values = list(map(newer.get, keys, map(self.cache.young.get, keys)))
        rest = [row for row, key in enumerate(keys) if values[row] is None and key not in newer]
        if rest:
            for row, value in zip(rest, self.get_many([keys[row] for row in rest]), strict=True):
                values[row] = value
        return values

    def items(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield entries in key order from ``start``, ours alone (no reserved keys)."""
        for key, value in self._db.items(start or None):
            if key not in RESERVED:
                yield key, value

    async def items_apart(self, start: bytes, most: int) -> list[tuple[bytes, bytes]]:
        """Return the first entries from ``start`` like :meth:`items`, read beside the event loop.

        Between two of them there may be any number that were removed, each of which RocksDB has to step over.
        """

        def read() -> list[tuple[bytes, bytes]]:
            return list(itertools.islice(self.items(start), most))

        if self._threads is None:
            return read()
        return await asyncio.wrap_future(self._threads.submit(self._using, read))

    def size_bytes(self) -> int:
        """Return the bytes of its files and memtables, as RocksDB estimates them."""
        total = 0
        for name in ("rocksdb.total-sst-files-size", "rocksdb.cur-size-all-mem-tables"):
            total += self._db.number(name)
        return total

    def entries(self) -> int:
        """Return RocksDB's estimate of the number of keys."""
        return int(self._db.number("rocksdb.estimate-num-keys"))

    # --- writing --------------------------------------------------------------------------------------------------

    def write(self, writes: Mapping[bytes, bytes | None], changelog_offset: int, meta: Meta) -> None:
        """Write a flush: values, changelog offset and meta record in one batch, then the cache."""
        self._db.write(self._batch(writes, changelog_offset, meta))
        self._took(writes, changelog_offset, meta)

    async def write_apart(self, writes: Mapping[bytes, bytes | None], changelog_offset: int, meta: Meta) -> None:
        """Write a flush like :meth:`write`, in a thread when it is large; only for whoever holds ``lock``.

        Until it returns, readers may see a part of the flush and never a value that was not true.
        """
        if len(writes) < _APART_KEYS:
            self.write(writes, changelog_offset, meta)
            return
        batch = self._batch(writes, changelog_offset, meta)
        await self._apart(lambda: self._db.write(batch), then=lambda _: self._took(writes, changelog_offset, meta))

    @staticmethod
    def _batch(writes: Mapping[bytes, bytes | None], changelog_offset: int, meta: Meta) -> Any:
        batch = _batch_of(writes)
        batch.put(META_KEY, encode_meta(meta))
        batch.put(OFFSET_KEY, b"%d" % changelog_offset)
        return batch

    def _took(self, writes: Mapping[bytes, bytes | None], changelog_offset: int, meta: Meta) -> None:
        self.changelog_offset = changelog_offset
        self.meta = meta
        self.cache.apply(dict(writes) if not isinstance(writes, dict) else writes)

    async def _apart(
        self, work: Callable[..., Found], *args: Any, then: Callable[[Found], None] = lambda _: None
    ) -> Found:
        """Do something with the database beside the event loop, and then something here.

        What is cut off meanwhile is waited for: the database must not be closed under it, and what it wrote is known.
        """
        if self._threads is None:
            found = work(*args)
            then(found)
            return found
        doing = self._threads.submit(self._using, work, *args)
        try:
            found = await asyncio.wrap_future(doing)
        except asyncio.CancelledError:
            wait([doing])
            if not doing.cancelled() and doing.exception() is None:
                then(doing.result())
            raise
        then(found)
        return found

    def _using(self, work: Callable[..., Found], *args: Any) -> Found:
        with self._users:
            return work(*args)

    def load(self, records: Iterable[Entry], changelog_offset: int) -> None:
        """Write what the changelog says (restore, standby): values and the changelog offset in one batch.

        Batches of writers that another has replaced are dropped; while one is being read, the changelog offset stays
        where it was, so that a restart begins before it. What cannot be an entry is dropped, and what is known of its
        key is written again by the owner. The cache takes over only what it already holds: a restore
        must not push hot entries out.
        """
        self._loaded(*self._load(records, changelog_offset))

    async def load_apart(self, records: Sequence[Entry], changelog_offset: int) -> None:
        """Do the same, in a thread when it is much, so that more is read meanwhile; one at a time of a partition."""
        if len(records) < _APART_KEYS:
            self.load(records, changelog_offset)
        else:
            await self._apart(self._load, records, changelog_offset, then=lambda loaded: self._loaded(*loaded))

    def _load(self, records: Iterable[Entry], changelog_offset: int) -> tuple[dict[bytes, bytes | None], int | None]:
        """Write what the changelog says to the database; returns it, and the changelog offset that it reflects."""
        writers = Filter(self.meta)
        writers.dropping = self._dropping
        latest: dict[bytes, bytes | None] = {}
        valid, unreadable = self._valid, 0
        for key, value in records:
            if key == META_KEY:
                if writers.take(value):
                    latest[key] = value
            elif key is None or key in RESERVED:
                unreadable += 1
            elif writers.dropping:
                self.foreign.add(key)
            elif value is not None and not valid(key, value):
                unreadable += 1
                self.foreign.add(key)
            else:
                latest[key] = value
        if unreadable:
            metrics.UNREADABLE.inc(unreadable)
            logger.warning("%s: %d changelog entries are no such thing and are passed over", self.path, unreadable)
        self._dropping = writers.dropping
        offset = self.changelog_offset if writers.dropping else changelog_offset
        batch = _batch_of(latest)
        if offset is not None:
            batch.put(OFFSET_KEY, b"%d" % offset)
        self._db.write(batch)
        return latest, offset

    def _loaded(self, latest: dict[bytes, bytes | None], offset: int | None) -> None:
        """Take note of what was loaded."""
        self.changelog_offset = offset
        found = latest.pop(META_KEY, None)
        if found is not None:
            self.meta = decode_meta(found)
        young, old = self.cache.young, self.cache.old
        if young or old:
            self.cache.apply({key: value for key, value in latest.items() if key in young or key in old})

    def set_changelog_offset(self, offset: int) -> None:
        """Store the changelog offset alone: the records up to it changed nothing here."""
        self._db.put(OFFSET_KEY, b"%d" % offset)
        self.changelog_offset = offset

    def wipe(self) -> None:
        """Throw the local state away and start empty."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        self.cache.clear()
        self.overlay.drop()
        self.foreign.clear()
        self._dropping = False
        self._open()

    def close(self) -> None:
        """Close the database; a rocksdict handle must not stay referenced anywhere, or its lock stays."""
        with self._users.none():
            if isinstance(self._db, _Closed):
                return
            self._db.close()
            self._db = _Closed(self.path)


def _batch_of(writes: Mapping[bytes, bytes | None]) -> Any:
    """Return a RocksDB batch of writes; None removes.

    In key order: a memtable takes a key behind the last one at half the price of a key anywhere.
    """
    batch = write_batch()
    put, delete = batch.put, batch.delete
    for key in sorted(writes):
        value = writes[key]
        if value is None:
            delete(key)
        else:
            put(key, value)
    return batch
