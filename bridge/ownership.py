"""Which pods are this bridge's: the partitions of ``kv-events`` that a consumer group gives it.

The group is used for membership alone: its partitions stay paused and no offset is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from kvatlas.bridge import records
from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka import client_config, lost_right
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.settings import KafkaSettings

Change = Callable[[list[int]], Awaitable[None]]


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
        self._first = asyncio.Event()

    def owns(self, partition: int) -> bool:
        """Whether a partition is ours now."""
        return partition in self._owned

    async def start(self) -> None:
        """Join; returns with the first assignment.

        Raises:
            LogError: Kafka does not answer.
            RightsError: the account may not be in the group.
        """
        if self._settings.ownership == "all":
            await self._gained(self._all)
            self._owned = set(self._all)
            return
        session = int(self._settings.session_timeout_seconds * 1000)
        self._consumer = AIOKafkaConsumer(
            **client_config(self._kafka, "kvatlas-bridge"),
            group_id=f"{self._kafka.topic_prefix}{self._settings.group}",
            enable_auto_commit=False,
            session_timeout_ms=session,
            heartbeat_interval_ms=max(session // 4, 100),
            rebalance_timeout_ms=max(session, 10_000),
            auto_offset_reset="latest",
        )
        self._consumer.subscribe([self._kafka.topic(records.EVENTS)], listener=self)
        try:
            await self._consumer.start()
        except KafkaError as error:
            raise lost_right(error, self._kafka) or self._unjoined(error) from error
        self._pump = asyncio.create_task(self._keep())
        first = asyncio.ensure_future(self._first.wait())
        await asyncio.wait({first, self._pump}, return_when=asyncio.FIRST_COMPLETED)
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
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        if self._consumer is not None:
            self._gained = self._lost = _nothing
            await self._consumer.stop()

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Hand over before another bridge starts."""
        lost = [place.partition for place in revoked]
        self._owned.difference_update(lost)
        if lost:
            await self._lost(lost)

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Take over: positions first, then streams."""
        self._consumer.pause(*assigned)
        gained = [place.partition for place in assigned]
        if gained:
            await self._gained(gained)
        self._owned.update(gained)
        self._first.set()

    async def _keep(self) -> None:
        # A consumer that never polls is put out of its group; every partition is paused, so this reads nothing.
        while True:
            try:
                await self._consumer.getmany(timeout_ms=1000)
            except KafkaError as error:
                raise lost_right(error, self._kafka) or self._unjoined(error) from error


async def _nothing(_: list[int]) -> None:
    return
