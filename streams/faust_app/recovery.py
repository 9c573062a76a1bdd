"""Where the bulk restore meets Faust: its table manager and recovery service, which reads no changelog itself.

Faust tells its recovery of an assignment inside the rebalance callback, during which aiokafka sends no heartbeats.
So :class:`BulkRecovery` only starts a task there; the task brings the assigned partitions up to date in bulk and then
does what Faust's recovery does at its end: it seeks the source topics and lets the streams run. Standby changelogs are
followed by our own reader.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery, ServiceStopped
from faust.types import TP

from kvatlas.bridge.runtime.tasks import end_tasks
from kvatlas.streams import metrics
from kvatlas.streams.errors import GoneError, StreamsError
from kvatlas.streams.state.partition import PartitionState, Role

logger = logging.getLogger(__name__)

_RETRY_SECONDS: Final = 1.0


class BulkRecovery(Recovery):
    """Faust's recovery service with a bulk restore in the place of its own."""

    app: Any
    _turn: asyncio.Task[None] | None = None
    _followers: asyncio.Task[None] | None = None

    async def on_rebalance(
        self,
        assigned: set[TP],  # noqa: ARG002
        revoked: set[TP],  # noqa: ARG002
        newly_assigned: set[TP],  # noqa: ARG002
        generation_id: int = 0,
    ) -> None:
        """Start the restore of what this worker is assigned now; returns at once."""
        metrics.REBALANCES.inc()
        self.app.lease.renew(self.app.lease.now())  # the group has just said what is ours
        await self._cancel()
        self._turn = asyncio.create_task(self._restore_and_resume(generation_id), name="bulk-restore")

    async def on_stop(self) -> None:
        """Stop restoring and following."""
        await self._cancel()
        await super().on_stop()

    async def _cancel(self) -> None:
        await end_tasks(task for task in (self._turn, self._followers) if task is not None)
        self._turn = self._followers = None

    async def _restore_and_resume(self, generation_id: int) -> None:
        try:
            assignor = self.app.assignor
            actives = self._states(assignor.assigned_actives())
            standbys = self._states(assignor.assigned_standbys())
            for state in (*actives.values(), *standbys.values()):
                async with state.lock:  # who began to write as their owner ends first, and sees then that it is not
                    pass
            await self.app.producer.flush()  # a batch of ours in flight belongs before the end that is read
            await self._restore(actives)
            for state in standbys.values():
                if state.role is Role.ACTIVE:
                    state.role = Role.STANDBY
            if standbys:
                self._followers = asyncio.create_task(self._follow(standbys), name="standbys")
            self.app.on_roles_changed()
            await self.on_recovery_completed(generation_id)
        except asyncio.CancelledError:
            raise
        except (IllegalStateError, ServiceStopped) as error:
            logger.info("a rebalance ends before its streams run: %r", error)  # by the next one, or by the app's end
        except Exception as error:  # noqa: BLE001 # whatever it is, the app must not run on half a restore
            await self.app.crash(error)

    async def _follow(self, standbys: dict[TopicPartition, PartitionState]) -> None:
        try:
            await self.app.reader.follow(standbys, self._standby_caught_up)
        except GoneError:  # Faust closes tables before it tells us of the rebalance, which ends this in a moment
            logger.debug("standby partitions are followed anew after the rebalance")
        except Exception as error:  # noqa: BLE001 # copies that nobody follows must not be answered from
            await self.app.crash(error)

    def _standby_caught_up(self) -> None:
        self.app.tell(restored=False)

    async def _restore(self, actives: dict[TopicPartition, PartitionState]) -> None:
        while True:
            try:
                await self.app.reader.restore(actives)
            except StreamsError as error:
                if not error.retriable:
                    raise
                logger.warning("restore: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return

    def _states(self, tps: set[TP]) -> dict[TopicPartition, PartitionState]:
        tables = {table.changelog_topic_name: table for table in self.app.sources.values()}
        ours = sorted(tp for tp in tps if tp.topic in tables)
        return {TopicPartition(*tp): tables[tp.topic].local(tp.partition) for tp in ours}


class BulkTableManager(TableManager):
    """Faust's table manager with :class:`BulkRecovery`."""

    @property
    def recovery(self) -> Any:
        """Return the recovery service."""
        if self._recovery is None:
            self._recovery = BulkRecovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery
