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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import faust
from aiokafka import TopicPartition
from faust.types import TP

from kvatlas.streams.state.changelog import encode_meta, send_batch
from kvatlas.streams.state.claims import examine
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.overlay import ChangeSet
from kvatlas.streams.state.partition import PartitionState, Role, Valid

logger = logging.getLogger(__name__)

_THREADS: Final = 2


class BulkTable(faust.Table[bytes, bytes]):
    """A table whose partitions are ours; Faust hands it rebalances, and never looks for keys or offsets in it.

    See the module's text for the order of a commit.

    Args:
        app: the app.
        budget: RocksDB's caches and memtables, shared with other tables.
        cache_bytes: of values, all partitions together.
        source: full name of the topic that the table reflects.
        changelog: full name of the changelog topic; Faust's would follow the consumer group, which differs between the
            roles of one deployment.
        valid: tells whether a key and its value may stand in the table.

    Attributes:
        states: partitions of this worker, active, standby or being restored.
    """

    def __init__(
        self, app: Any, name: str, source: str, changelog: str, *, budget: RocksBudget, cache_bytes: int, valid: Valid
    ) -> None:
        topic = app.topic(changelog, key_serializer="raw", value_serializer="raw", acks=False, allow_empty=True)
        super().__init__(app, name=name, key_type=bytes, value_type=bytes, changelog_topic=topic)
        self._worker, self._source = app, source
        self.states: dict[int, PartitionState] = {}
        self._valid = valid
        self._budget = budget
        self._cache_bytes = cache_bytes
        self._changelog = changelog
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"rocksdb-{self.name}")

    # --- partitions -----------------------------------------------------------------------------------------------

    def local(self, partition: int) -> PartitionState:
        """Return a partition's state, opening it at first use."""
        state = self.states.get(partition)
        if state is None:
            path = Path(self.app.conf.tabledir) / f"{self.name}-{partition}.db"
            state = PartitionState(partition, path, self._budget, 0, self._threads, valid=self._valid)
            self.states[partition] = state
            self._share_cache()
        return state

    def _close_partition(self, partition: int) -> None:
        self.states.pop(partition).close()
        logger.info("%s: closed partition %d", self.name, partition)
        self._share_cache()

    def _share_cache(self) -> None:
        for state in self.states.values():
            state.cache.resize(self._cache_bytes // len(self.states))

    def close(self) -> None:
        """Close everything."""
        for partition in list(self.states):
            self._close_partition(partition)
        self._threads.shutdown(wait=True)

    # --- its source topic -----------------------------------------------------------------------------------------

    @property
    def sure(self) -> bool:
        """Whether the group surely counts this worker in."""
        return bool(self._worker.lease.valid)

    def partition(self, number: int) -> PartitionState | None:
        """Return a partition, None when it is not ours to write."""
        state = self.states.get(number)
        return state if state is not None and state.role is Role.ACTIVE else None

    def rewind(self, number: int, offset: int) -> None:
        """Have the source partition read again from an offset."""
        self._worker.source_consumer().rewind(TP(self._source, number), offset)

    def committed(self, number: int, offset: int) -> None:
        """Take note that the table has a source partition up to a record."""
        self._worker.source_consumer().committed(TP(self._source, number), offset)

    # --- what Faust calls -----------------------------------------------------------------------------------------

    async def on_start(self) -> None:
        """Nothing is to be started: the topics are there, and partitions are opened as they are assigned."""

    async def on_stop(self) -> None:
        """Close everything."""
        self.close()

    async def on_rebalance(
        self,
        assigned: set[TP],  # noqa: ARG002
        revoked: set[TP],  # noqa: ARG002
        newly_assigned: set[TP],  # noqa: ARG002
        generation_id: int = 0,  # noqa: ARG002
    ) -> None:
        """Close partitions that went elsewhere; what stays is a standby until the restore has looked at it."""
        assignor = self.app.assignor
        ours = assignor.assigned_actives() | assignor.assigned_standbys()
        wanted = {tp.partition for tp in ours if tp.topic == self._changelog}
        for partition, state in list(self.states.items()):
            if partition not in wanted:
                self._close_partition(partition)
            elif state.role is Role.ACTIVE:
                state.role = Role.STANDBY

    async def on_recovery_completed(self, active_tps: set[TP], standby_tps: set[TP]) -> None:
        """Nothing is to be done: the restore was ours."""

    # --- commits --------------------------------------------------------------------------------------------------

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
        placed = await send_batch(
            self._worker.aiokafka_producer(),
            self._changelog,
            partition,
            changes.writes,
            before=encode_meta(old),
            after=encode_meta(meta),
        )
        if not placed.follows(before):
            at = TopicPartition(self._changelog, partition)
            between = await self._worker.reader.between(at, 0 if before is None else before + 1, placed.last)
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
