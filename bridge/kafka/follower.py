"""Follower of a topic without a consumer group: reads all partitions, first what is there, then what comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import fetch, fetch_wait_ms, start_client
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.bridge.runtime.tasks import end_tasks

log = logging.getLogger(__name__)

_POLL_MS: Final = 200
_RECORDS_PER_TURN: Final = 2_000
#: A client whose metadata's task has ended waits for ever for a leader.
_PLACE_SECONDS: Final = 120.0
_BACKOFF_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)


class TopicFollower:
    """One task that reads a topic into a function, and starts again after errors.

    Attributes:
        caught_up: set once everything that was there at the start has been applied.
        connected: whether the last fetch worked.
        records: records applied.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        topic: str,
        apply: Callable[..., object],
        *,
        client_id: str,
        from_end: bool = False,
        start_at: Mapping[int, int] | None = None,
        applied: Callable[[int, int], None] | None = None,
        lost: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Describe what to follow.

        Args:
            kafka: how to reach Kafka.
            topic: name before the deployment's prefix.
            apply: gets every record's key and value; must not raise, must be fast, may see a record again after a
                reconnect.
            client_id: shown in the broker's logs.
            from_end: start with what comes from now on.
            start_at: partition -> offset to start at, where the topic still has it.
            applied: told partition and next offset after every batch of a partition.
            lost: awaited when records that were to come next are gone from the topic (its retention, or the topic was
                made anew); all of it is read again after that, and :attr:`caught_up` is unset until it has been.
        """
        self.caught_up = asyncio.Event()
        self.connected = False
        self.records = 0
        self._kafka = kafka
        self._topic = kafka.topic(topic)
        self._apply = apply
        self._client_id = client_id
        self._from_end = from_end
        self._task: asyncio.Task[None] | None = None
        self._applied = applied
        self._lost = lost
        starts = (start_at or {}).items()
        self._positions: dict[TopicPartition, int] = {TopicPartition(self._topic, number): at for number, at in starts}

    def start(self) -> None:
        """Start reading in the background."""
        self._task = asyncio.create_task(self._run(), name=f"follow {self._topic}")

    @property
    def task(self) -> asyncio.Task[None]:
        """The task that reads; it ends by itself only with an error."""
        assert self._task is not None
        return self._task

    async def stop(self) -> None:
        """Stop reading."""
        if self._task is not None:
            await end_tasks([self._task])
            self._task = None

    def failed(self) -> BaseException | None:
        """Return what ended the reading, None while it goes on."""
        done = self._task is not None and self._task.done() and not self._task.cancelled()
        return self._task.exception() if done and self._task is not None else None

    async def wait(self, timeout_seconds: float) -> None:
        """Wait until all that was there has been applied.

        Raises:
            LogError: not within the time.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.caught_up.wait()
        except TimeoutError as error:
            raise LogError(
                f"topic {self._topic} on {self._kafka.brokers} was not read to its end in {timeout_seconds:g} s; "
                "check that Kafka runs and the topic exists (`kvatlas topics`)"
            ) from error

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                await self._follow()
            except (KafkaError, OSError, TimeoutError) as error:
                pause = _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)]
                (log.warning if failures in (0, 10) else log.debug)(
                    "topic %s: %s; trying again in %.1f s", self._topic, error, pause
                )
                failures = 0 if self.connected else failures + 1
                self.connected = False
                await asyncio.sleep(pause)

    async def _follow(self) -> None:
        # Subscribed without a group: every partition is ours, new ones too; a missing topic raises and is tried again.
        wait_ms = await fetch_wait_ms(self._kafka)
        consumer = AIOKafkaConsumer(
            self._topic,
            **client_config(self._kafka, self._client_id),
            group_id=None,
            enable_auto_commit=False,
            # Who must know of lost records is not moved past them in silence: the error leads back here, to be placed.
            auto_offset_reset="earliest" if self._lost is None else "none",
            fetch_max_wait_ms=wait_ms,
            metadata_max_age_ms=30_000,
        )
        try:
            await start_client(consumer)
            async with asyncio.timeout(_PLACE_SECONDS):
                partitions = await self._place(consumer)
                ends = await consumer.end_offsets(partitions)
            behind = {tp for tp in partitions if self._positions[tp] < ends[tp]}
            while True:
                if not behind:
                    self.caught_up.set()
                batches = await fetch(consumer, timeout_ms=_POLL_MS, max_records=_RECORDS_PER_TURN)
                self.connected = True
                self._apply_all(batches)
                if behind:
                    for tp in list(behind):
                        if await consumer.position(tp) >= ends[tp]:
                            behind.discard(tp)
                if batches:
                    await asyncio.sleep(0)  # a long backlog must not starve requests
        finally:
            with contextlib.suppress(Exception):  # closing raises what ended the client, which was told
                await consumer.stop()

    async def _place(self, consumer: Any) -> list[TopicPartition]:
        partitions = sorted(consumer.assignment())
        begins = await consumer.beginning_offsets(partitions)
        ends = await consumer.end_offsets(partitions)
        # After a reconnect go on where we were, unless the topic was made anew or has dropped it.
        gone = [tp for tp in partitions if not begins[tp] <= self._positions.get(tp, begins[tp]) <= ends[tp]]
        if gone and self._lost is not None:
            numbers = ", ".join(str(tp.partition) for tp in gone)
            log.warning("topic %s no longer has what came next in partitions %s: read anew", self._topic, numbers)
            self.caught_up.clear()
            await self._lost()
            gone = partitions
        for tp in gone:
            self._positions.pop(tp, None)
        for tp in partitions:
            self._positions.setdefault(tp, ends[tp] if self._from_end else begins[tp])
            consumer.seek(tp, self._positions[tp])
        return partitions

    def _apply_all(self, batches: dict[TopicPartition, list[Any]]) -> None:
        for tp, messages in batches.items():
            for message in messages:
                self._hand(message)
                self._positions[tp] = message.offset + 1
            if messages and self._applied is not None:
                self._applied(tp.partition, self._positions[tp])
            self.records += len(messages)

    def _hand(self, message: Any) -> None:
        self._apply(message.key, message.value)


class RecordFollower(TopicFollower):
    """A follower whose function gets the records themselves, with their headers."""

    def _hand(self, message: Any) -> None:
        self._apply(message)
