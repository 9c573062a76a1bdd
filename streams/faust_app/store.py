"""Faust's RocksDB store with our partitions inside."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from faust.stores import rocksdb
from faust.types import TP

from kvatlas.streams.errors import StoreError
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import PartitionState, Role, Valid

logger = logging.getLogger(__name__)

_THREADS: Final = 2


class BulkStore(rocksdb.Store):
    """Faust's RocksDB store with our partitions inside; Faust asks it for offsets and hands it rebalances."""

    def __init__(self, *args: Any, budget: RocksBudget, cache_bytes: int, valid: Valid, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._budget = budget
        self._cache_bytes = cache_bytes
        self._valid = valid
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"rocksdb-{self.table_name}")
        self.states: dict[int, PartitionState] = {}

    # --- partitions -----------------------------------------------------------------------------------------------

    def local(self, partition: int) -> PartitionState:
        """Return a partition's state, opening it at first use."""
        state = self.states.get(partition)
        if state is None:
            state = PartitionState(
                partition, self.partition_path(partition), self._budget, 0, self._threads, valid=self._valid
            )
            self.states[partition] = state
            self._share_cache()
        return state

    def close_partition(self, partition: int) -> None:
        """Close a partition that is no longer ours."""
        state = self.states.pop(partition, None)
        self._dbs.pop(partition, None)
        if state is not None:
            state.close()
            logger.info("%s: closed partition %d", self.table_name, partition)
            self._share_cache()

    def _share_cache(self) -> None:
        for state in self.states.values():
            state.cache.resize(self._cache_bytes // len(self.states))

    def _db_for_partition(self, partition: int) -> Any:
        return self.local(partition)._db.raw

    # --- what Faust calls -----------------------------------------------------------------------------------------

    def persisted_offset(self, tp: TP) -> int | None:
        """Return the changelog offset that a partition's local state reflects."""
        return self.local(tp.partition).changelog_offset

    def set_persisted_offset(self, tp: TP, offset: int) -> None:
        """Store a changelog offset apart from a batch; only Faust's own paths come here."""
        self.local(tp.partition).set_changelog_offset(offset)

    async def need_active_standby_for(self, tp: TP) -> bool:  # noqa: ARG002
        """Say that a standby copy has to be read: no other process shares our folder."""
        return True

    def apply_changelog_batch(self, batch: Iterable[Any], to_key: Any, to_value: Any) -> None:  # noqa: ARG002
        """Apply changelog events that Faust read itself: in bulk, and through the cache."""
        groups: dict[int, list[tuple[bytes, bytes | None]]] = {}
        last: dict[int, int] = {}
        for event in batch:
            message = event.message
            groups.setdefault(message.partition, []).append((message.key, message.value))
            last[message.partition] = max(message.offset, last.get(message.partition, -1))
        for partition, records in groups.items():
            self.local(partition).load(records, last[partition])

    async def on_rebalance(
        self,
        assigned: set[TP],  # noqa: ARG002
        revoked: set[TP],  # noqa: ARG002
        newly_assigned: set[TP],  # noqa: ARG002
        generation_id: int = 0,  # noqa: ARG002
    ) -> None:
        """Close partitions that went elsewhere; what stays is a standby until the restore has looked at it."""
        topics = self.table.changelog_topic.topics
        assignor = self.app.assignor
        wanted = {
            tp.partition for tp in assignor.assigned_actives() | assignor.assigned_standbys() if tp.topic in topics
        }
        for partition in list(self.states):
            if partition not in wanted:
                self.close_partition(partition)
            elif self.states[partition].role is Role.ACTIVE:
                self.states[partition].role = Role.STANDBY

    async def stop(self) -> None:
        """Close everything."""
        for partition in list(self.states):
            self.close_partition(partition)
        self._threads.shutdown(wait=True)

    def reset_state(self) -> None:
        """Throw all local state away; Kafka keeps the changelog."""
        for partition in list(self.states):
            self.close_partition(partition)
        super().reset_state()

    def _set(self, key: bytes, value: bytes | None) -> None:  # noqa: ARG002
        raise StoreError("a bulk table is written with commit(), not item by item")

    def _del(self, key: bytes) -> None:  # noqa: ARG002
        raise StoreError("a bulk table is written with commit(), not item by item")
