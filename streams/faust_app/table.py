"""The bulk table: a ``faust.Table`` that is written one flush at a time.

Stock Faust writes a changelog record and a RocksDB entry for every assignment; a bulk table gathers changes in a
:class:`PartitionView` and commits them as a whole. Order of what happens to source records, for resolve; the index has
(1), (4), (5), (6):

1. apply them to the view;
2. send the kv-blocks records and wait for their acknowledgement, the kv-pods records before them when an epoch rose:
   readers must see the raised epoch first;
3. hand the other kv-pods records over to be sent;
4. with what else was applied and sent since the last commit, send the changelog as one record batch, with the meta
   record that holds the source offset, and wait for its acknowledgement;
5. write one RocksDB batch: values, changelog offset, meta record;
6. acknowledge the source records.

While (4) and (5) are under way, (1) to (3) go on with the next records. A crash between any two steps repeats the
work from the source records after the last commit, which changes nothing that is already there: kv-blocks runs that
the index has applied are dropped by sequence, table writes are sets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import faust
from aiokafka import TopicPartition

from kvatlas.streams.faust_app.store import BulkStore
from kvatlas.streams.state.changelog import encode_meta, send_batch
from kvatlas.streams.state.claims import examine
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState

logger = logging.getLogger(__name__)

_ABSENT: Final = object()


class PartitionView:
    """One partition of a bulk table between two commits: reads through, gathers writes.

    Args:
        state: the partition.
        above: a view whose writes are not in the partition yet; reads see them.

    Attributes:
        writes: what changed, in the order of the first write of each key; None removes.
    """

    __slots__ = ("_known", "_state", "writes")

    def __init__(self, state: PartitionState, above: PartitionView | None = None) -> None:
        self._state = state
        # What was fetched ahead, and every write on top of it. Writes of the view before stay true once committed.
        self._known: dict[bytes, bytes | None] = {} if above is None else dict(above.writes)
        self.writes: dict[bytes, bytes | None] = {}

    def get(self, key: bytes) -> bytes | None:
        """Return the value under ``key``, None when there is none."""
        value: Any = self._known.get(key, _ABSENT)
        if value is _ABSENT:
            value = self._state.get(key)
        return value  # type: ignore[no-any-return]

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value; visible at once to reads of this view."""
        self.writes[key] = self._known[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""
        self.writes[key] = self._known[key] = None

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Fetch what is neither cached nor written in one multi-get."""
        missing = self._missing(keys)
        if missing:
            self._known.update(zip(missing, self._state.fetch(missing), strict=True))

    async def prefetch_apart(self, keys: Iterable[bytes]) -> None:
        """Fetch like :meth:`prefetch`, beside the event loop when there are many; the caller holds the lock."""
        missing = self._missing(keys)
        if missing:
            self._known.update(zip(missing, await self._state.fetch_apart(missing), strict=True))

    def _missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return the keys that only the database can tell; what the cache holds becomes known on the way."""
        known, cache = self._known, self._state.cache
        hits, young = 0, cache.young  # looked into directly: a call a key is what this loop would cost otherwise
        missing = []
        for key in keys:
            if key in known:
                continue
            value = young.get(key)
            if value is not None:
                hits += 1
                known[key] = value
            elif key in cache.old:
                known[key] = cache.get(key)
                young = cache.young
            else:
                missing.append(key)
        cache.hits += hits
        cache.misses += len(missing)
        return missing


class BulkTable(faust.Table[bytes, bytes]):
    """A table on :class:`BulkStore`; see the module's text for the order of a commit.

    Attributes:
        on_committed: told of every commit here, without waiting: partition, table keys written or removed, changelog
            offset before and after.
    """

    def __init__(self, app: Any, *, budget: RocksBudget, cache_bytes: int, changelog: str, **kwargs: Any) -> None:
        self._budget = budget
        self._cache_bytes = cache_bytes
        self._changelog = changelog
        self.on_committed: Callable[[int, Iterable[bytes], int | None, int], None] | None = None
        super().__init__(
            app, key_type=bytes, value_type=bytes, store="rocksdb://", **{"recovery_buffer_size": 4096, **kwargs}
        )

    def info(self) -> Any:
        """Return what Faust needs to clone this table."""
        return {
            **super().info(),
            "budget": self._budget,
            "cache_bytes": self._cache_bytes,
            "changelog": self._changelog,
        }

    def _changelog_topic_name(self) -> str:
        # Faust derives it from the consumer group, which differs between the roles of one deployment.
        return self._changelog

    def _new_store(self) -> BulkStore:
        return BulkStore(
            self._store,
            self.app,
            self,
            table_name=self.name,
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
            loop=self.loop,
            options={},
            budget=self._budget,
            cache_bytes=self._cache_bytes,
        )

    @property
    def store(self) -> BulkStore:
        """Our store."""
        return cast("BulkStore", self.data)

    def view(self, partition: int, *, above: PartitionView | None = None) -> PartitionView:
        """Return a fresh view of a partition, on top of one that is being committed when there is one."""
        return PartitionView(self.store.local(partition), above)

    async def commit(self, partition: int, view: PartitionView, source_offset: int, receive_ns: int) -> None:
        """Commit a flush: steps 4 and 5 of the order above.

        Args:
            partition: the table's partition.
            view: what the flush changed.
            source_offset: last source record that it reflects.
            receive_ns: newest receive time in it (bridge clock, ns).

        Raises:
            ChangelogError: the changelog was not acknowledged; nothing is written locally, the flush can be repeated.
            FencedError: another worker owns the partition now; nothing is written locally.
        """
        state = self.store.local(partition)
        old, before = state.meta, state.changelog_offset
        meta = old._replace(
            source_offset=source_offset, receive_ns=max(receive_ns, old.receive_ns), written_ns=time.time_ns()
        )
        app: Any = self.app
        placed = await send_batch(
            app.producer._ensure_producer(),
            self._changelog,
            partition,
            view.writes,
            before=encode_meta(old),
            after=encode_meta(meta),
        )
        if not placed.follows(before):
            at = TopicPartition(self._changelog, partition)
            between = await app.reader.between(at, 0 if before is None else before + 1, placed.last)
            state.foreign |= examine(between, old, f"changelog {self._changelog}/{partition}")
        await state.write_apart(view.writes, placed.last, meta)
        if self.on_committed is not None:
            self.on_committed(partition, view.writes, before, placed.last)
        if state.foreign:
            await self._write_again(partition, state)

    async def _write_again(self, partition: int, state: PartitionState) -> None:
        """Write the values of keys that a replaced writer overwrote in the changelog once more."""
        view, keys = self.view(partition), state.foreign
        logger.warning("%s/%d: %d keys of a replaced writer written again", self._changelog, partition, len(keys))
        for key in keys:
            value = state.get(key)
            if value is None:
                view.delete(key)
            else:
                view.put(key, value)
        state.foreign = set()
        try:
            await self.commit(partition, view, state.meta.source_offset, state.meta.receive_ns)
        except BaseException:
            state.foreign |= keys
            raise
