"""The bulk table: a ``faust.Table`` that is written one flush at a time.

Stock Faust writes a changelog record and a RocksDB entry for every assignment; a bulk table gathers changes in an
:class:`~kvatlas.streams.state.overlay.Overlay` and commits them as a whole. Order of what happens to source records,
for resolve; the index has (1), (4), (5), (6):

1. apply them to the overlay, where readers see them;
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
from typing import Any, cast

import faust
from aiokafka import TopicPartition

from kvatlas.streams.faust_app.store import BulkStore
from kvatlas.streams.state.changelog import encode_meta, send_batch
from kvatlas.streams.state.claims import examine
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import PartitionState, Valid

logger = logging.getLogger(__name__)


class BulkTable(faust.Table[bytes, bytes]):
    """A table on :class:`BulkStore`; see the module's text for the order of a commit."""

    def __init__(
        self, app: Any, *, budget: RocksBudget, cache_bytes: int, changelog: str, valid: Valid, **kwargs: Any
    ) -> None:
        self._valid = valid
        self._budget = budget
        self._cache_bytes = cache_bytes
        self._changelog = changelog
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
            "valid": self._valid,
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
            valid=self._valid,
        )

    @property
    def store(self) -> BulkStore:
        """Our store."""
        return cast("BulkStore", self.data)

    async def commit(self, state: PartitionState, changes: ChangeSet) -> None:
        """Commit changes of a partition: steps 4 and 5 of the order above; for whoever holds the partition's lock.

        Raises:
            ChangelogError: the changelog was not acknowledged; nothing is written locally, they can be committed again.
            FencedError: another worker owns the partition now; nothing is written locally.
        """
        partition = state.partition
        old, before = state.meta, state.changelog_offset
        meta = old._replace(
            source_offset=changes.source_offset,
            receive_ns=max(changes.receive_ns, old.receive_ns),
            written_ns=time.time_ns(),
        )
        app: Any = self.app
        placed = await send_batch(
            app.producer._ensure_producer(),
            self._changelog,
            partition,
            changes.writes,
            before=encode_meta(old),
            after=encode_meta(meta),
        )
        if not placed.follows(before):
            at = TopicPartition(self._changelog, partition)
            between = await app.reader.between(at, 0 if before is None else before + 1, placed.last)
            state.foreign |= examine(between, old, f"changelog {self._changelog}/{partition}")
        await state.write_apart(changes.writes, placed.last, meta)
        state.overlay.committed(changes)
        if state.foreign:
            await self._write_again(state)

    async def _write_again(self, state: PartitionState) -> None:
        """Write the values of keys that a replaced writer overwrote in the changelog once more."""
        keys = list(state.foreign)
        logger.warning("%s/%d: %d keys of a replaced writer written again", self._changelog, state.partition, len(keys))
        state.foreign = set()
        try:
            written = dict(zip(keys, state.get_many(keys), strict=True))
            await self.commit(state, ChangeSet(written, state.meta.source_offset, state.meta.receive_ns))
        except BaseException:
            state.foreign |= set(keys)
            raise
