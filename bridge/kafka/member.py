"""Member of a consumer group that keeps its positions elsewhere, such as in the store that it fills.

The group only shares out the partitions. Those given to a member stand still until it has said where to go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError

from kvatlas.bridge.errors import KvatlasError, LogError
from kvatlas.bridge.kafka.config import client_config
from kvatlas.bridge.kafka.fetching import fetch, fetch_wait_ms, start_client
from kvatlas.bridge.kafka.lease import generation_of
from kvatlas.bridge.kafka.ranges import Edges, edges_of
from kvatlas.bridge.kafka.rights import lost_right
from kvatlas.bridge.runtime.settings import KafkaSettings

#: A store that is away for long must not cost the membership.
_POLL_MS: Final = 24 * 3600 * 1000


class Assignment(NamedTuple):
    """What a group gave a member.

    Attributes:
        number: grows with each assignment of this member; positions are lost with it.
        generation: of the group: later ones are given later, whoever gets them.
        partitions: ours until the next.
    """

    number: int = 0
    generation: int = 0
    partitions: frozenset[int] = frozenset()


def group_config(kafka: KafkaSettings, client_id: str, group: str, session_timeout_seconds: float) -> dict[str, Any]:
    """Return the keyword arguments of a consumer that is in a group without leaving its positions there.

    Raises:
        SettingsError: TLS or SASL settings are refused.
    """
    session = int(session_timeout_seconds * 1000)
    return {
        **client_config(kafka, client_id),
        "group_id": group,
        "enable_auto_commit": False,
        "session_timeout_ms": session,
        "heartbeat_interval_ms": max(session // 4, 100),
        "rebalance_timeout_ms": max(session, 10_000),
    }


class GroupMember(ConsumerRebalanceListener):  # type: ignore[misc]
    """Reads the partitions of one topic that a group gives it; joins when it is first asked for them.

    Args:
        kafka: how to reach Kafka.
        topic: its full name.
        group: full name of the group.
        client_id: shown in the brokers' logs.
        session_timeout_seconds: silence after which its partitions go to others.
    """

    def __init__(
        self, kafka: KafkaSettings, topic: str, group: str, *, client_id: str, session_timeout_seconds: float
    ) -> None:
        self._kafka, self._topic = kafka, topic
        self._options: dict[str, Any] = {
            **group_config(kafka, client_id, group, session_timeout_seconds),
            "auto_offset_reset": "earliest",
            "max_poll_interval_ms": _POLL_MS,
        }
        self._given = Assignment()
        self._joined: Any = None

    async def assignment(self) -> Assignment:
        """Return what is ours now; none before the group has shared out.

        Raises:
            LogError: Kafka does not answer.
            RightsError: the account may not be in the group, or not read the topic.
        """
        if self._joined is None:
            try:
                wait_ms = await fetch_wait_ms(self._kafka)
            except KafkaError as error:
                raise self._error(error) from error
            consumer: Any = AIOKafkaConsumer(**self._options, fetch_max_wait_ms=wait_ms)
            consumer.subscribe([self._topic], listener=self)
            self._joined = consumer  # the first assignment may come before it has started
            try:
                await start_client(consumer)
            except BaseException as error:
                await self.leave()
                if isinstance(error, KafkaError):
                    raise self._error(error) from error
                raise
        return self._given

    async def leave(self) -> None:
        """Leave the group; the next question joins it anew."""
        consumer, self._joined = self._joined, None
        self._given = self._given._replace(partitions=frozenset())
        if consumer is not None:
            with contextlib.suppress(Exception):  # closing raises what ended the client, which was told
                await consumer.stop()

    @property
    def _consumer(self) -> Any:
        if self._joined is None:
            raise LogError(f"the group that reads {self._topic} has been left")
        return self._joined

    def on_partitions_revoked(self, revoked: Any) -> None:
        """Nothing is to be done: whoever gets them knows where to go on."""

    def on_partitions_assigned(self, assigned: Any) -> None:
        """Have them wait for :meth:`go_on`."""
        consumer = self._consumer
        consumer.pause(*assigned)
        self._given = Assignment(
            self._given.number + 1, generation_of(consumer), frozenset(place.partition for place in assigned)
        )

    def go_on(self, partition: int, offset: int) -> None:
        """Read a partition from an offset on, if it still is ours."""
        place = TopicPartition(self._topic, partition)
        if place in self._consumer.assignment():
            self._consumer.seek(place, offset)
            self._consumer.resume(place)

    async def edge(self, partition: int) -> Edges:
        """Return where a partition begins and ends now.

        Raises:
            LogError: Kafka does not answer.
        """
        try:
            return (await edges_of(self._consumer, self._topic, [partition]))[partition]
        except KafkaError as error:
            raise self._error(error) from error

    async def position(self, partition: int) -> int:
        """Return the offset of the next record; -1 when the partition is not ours any more.

        Raises:
            LogError: Kafka does not answer.
        """
        try:
            offset: int = await self._consumer.position(TopicPartition(self._topic, partition))
        except IllegalStateError:
            return -1
        except KafkaError as error:
            raise self._error(error) from error
        return offset

    def end(self, partition: int) -> int:
        """Return where a partition ended when it was fetched last; 0 before that, or when it is not ours."""
        consumer, place = self._joined, TopicPartition(self._topic, partition)
        return (consumer.highwater(place) or 0) if consumer is not None and place in consumer.assignment() else 0

    async def fetch(self, partitions: Collection[int], *, timeout_ms: int, max_records: int) -> dict[int, list[Any]]:
        """Return the next records of some partitions, waiting up to ``timeout_ms`` for one.

        Raises:
            LogError: another membership has to take this one's place.
            TaskEndedError: the client keeps its metadata no more.
        """
        ours = self._consumer.assignment()
        places = [place for number in partitions if (place := TopicPartition(self._topic, number)) in ours]
        if not places:
            return {}
        try:
            found = await fetch(self._consumer, *places, timeout_ms=timeout_ms, max_records=max_records)
        except KafkaError as error:
            raise self._error(error) from error
        return {place.partition: records for place, records in found.items()}

    def _error(self, error: KafkaError) -> KvatlasError:
        said = lost_right(error, self._kafka)
        return said or LogError(f"{self._topic} cannot be followed at {self._kafka.brokers}: {error!r}")
