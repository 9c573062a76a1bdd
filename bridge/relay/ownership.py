"""Partition ownership among bridges, by membership in a consumer group.

The group is used for membership alone: its partitions stay paused and no offset is committed.

A bridge that the group has not heard for the session timeout may have lost its pods to another one without knowing:
it was frozen, or cut off from Kafka. So it holds a *lease* that each answered heartbeat renews, and without one it puts
nothing on the log (:attr:`Publisher.may_send`). What it had accepted for pods that it lost is thrown away then; the
other bridge replays it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.fetching import fetch, start_client
from kvatlas.bridge.kafka.lease import Lease
from kvatlas.bridge.kafka.member import group_config
from kvatlas.bridge.kafka.rights import lost_right
from kvatlas.bridge.model import topics
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import end_tasks

Change = Callable[[list[int]], Awaitable[None]]

_RETRY_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


class Ownership(ConsumerRebalanceListener):  # type: ignore[misc]
    """The partitions this bridge writes; ``gained`` and ``lost`` are awaited around a change."""

    def __init__(
        self, settings: BridgeSettings, kafka: KafkaSettings, partitions: int, gained: Change, lost: Change
    ) -> None:
        """Describe the membership."""
        self._settings = settings
        self._kafka = kafka
        self._all = list(range(partitions))
        self._gained = gained
        self._lost = lost
        self._owned: set[int] = set()
        self._consumer: Any = None
        self._pump: asyncio.Task[None] | None = None
        self._taking: asyncio.Task[None] | None = None
        self._first = asyncio.Event()
        self._lease = Lease(settings.session_timeout_seconds)

    def owns(self, partition: int) -> bool:
        """Whether a partition is ours now."""
        return partition in self._owned

    def leased(self) -> bool:
        """Whether the group has heard this bridge lately, so that no other one has its pods."""
        return self._consumer is None or self._lease.valid

    async def start(self) -> None:
        """Join; returns with the first assignment, once the positions of its pods are known.

        Raises:
            LogError: Kafka does not answer.
            RightsError: the account may not be in the group.
        """
        if self._settings.ownership == "all":
            await self._gained(self._all)
            self._owned = set(self._all)
            return
        group = f"{self._kafka.topic_prefix}{self._settings.group}"
        options = group_config(self._kafka, "kvatlas-bridge", group, self._settings.session_timeout_seconds)
        self._consumer = AIOKafkaConsumer(**options, auto_offset_reset="latest")
        self._consumer.subscribe([self._kafka.topic(topics.EVENTS)], listener=self)
        try:
            await start_client(self._consumer)
        except KafkaError as error:
            raise lost_right(error, self._kafka) or self._unjoined(error) from error
        self._lease.renew_with_heartbeats(self._consumer)
        self._pump = asyncio.create_task(self._keep())
        first = asyncio.ensure_future(self._first.wait())
        try:
            await asyncio.wait({first, self._pump}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            first.cancel()
        if self._pump.done():
            self._pump.result()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Tasks whose end is the end of the membership."""
        return [self._pump] if self._pump is not None else []

    def _unjoined(self, error: KafkaError) -> LogError:
        return LogError(f"cannot be in group {self._settings.group} at {self._kafka.brokers}: {error!r}")

    async def stop(self) -> None:
        """Leave the group, so that another takes over at once."""
        if self._pump is not None:
            await end_tasks([self._pump])
        if self._consumer is not None:
            self._gained = self._lost = _nothing
            with contextlib.suppress(Exception):  # closing raises what ended the client, which was told
                await self._consumer.stop()
        await self._stop_taking()

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Hand over before another bridge starts."""
        await self._stop_taking()
        lost = [place.partition for place in revoked]
        self._owned.difference_update(lost)
        if lost:
            await self._lost(lost)

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Take over, beside the group's own work: it sends no heartbeat before this returns, and keeps no error."""
        self._lease.renew(self._lease.now())
        self._consumer.pause(*assigned)
        await self._stop_taking()
        self._taking = asyncio.create_task(self._take([place.partition for place in assigned]))

    async def _take(self, gained: list[int]) -> None:
        """Take pods over: positions first, then streams. Tried again while Kafka does not answer."""
        while gained:
            try:
                await self._gained(gained)
                break
            except LogError as error:
                log.warning("%s; trying again", error)
                await asyncio.sleep(_RETRY_SECONDS)
        self._owned.update(gained)
        self._first.set()

    async def _stop_taking(self) -> None:
        if self._taking is not None and not self._taking.done():
            self._taking.cancel()
            await asyncio.wait([self._taking])

    async def _keep(self) -> None:
        # A consumer that never polls is put out of its group; every partition is paused, so this reads nothing.
        while True:
            try:
                await fetch(self._consumer, timeout_ms=1000)
            except KafkaError as error:
                raise lost_right(error, self._kafka) or self._unjoined(error) from error
            if self._taking is not None and self._taking.done() and not self._taking.cancelled():
                self._taking.result()


async def _nothing(_: list[int]) -> None:
    return
