"""How far an index version is: what its workers cover, and how far they are behind the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from aiokafka import TopicPartition

from kvatlas.bridge.kafka.fetching import patiently
from kvatlas.bridge.kafka.follower import TopicFollower
from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.reindex.catalog import admin_of

_CLIENT_ID: Final = "kvatlas-reindex"
_READ_SECONDS: Final = 20.0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One index version, as of one look.

    Attributes:
        version: its name.
        active: whether scorers answer from it.
        block_size_tokens, partitions: as its workers announce them; 0 while there is none.
        workers: workers that announce themselves now.
        uncovered: partitions that no worker answers for.
        events_end: records that ``kv-events`` ever had.
        events_total, events_lag: those on the log now, and those of them that are not resolved yet.
        blocks_lag: records of its block updates that are not in its index yet.
    """

    version: str
    active: bool
    block_size_tokens: int
    partitions: int
    workers: int
    uncovered: list[int]
    events_end: int
    events_total: int
    events_lag: int
    blocks_lag: int

    def behind(self, max_lag_records: int) -> str | None:
        """Return why it cannot take over now, None when it can."""
        if not self.workers:
            return f"no worker keeps it; start some with `kvatlas worker --index-version {self.version}`"
        if self.uncovered:
            return f"no worker answers for {len(self.uncovered)} of {self.partitions} partitions"
        if self.events_lag > max_lag_records:
            return f"{self.events_lag} of {self.events_total} kv-events records are still to be resolved"
        if self.blocks_lag > max_lag_records:
            return f"{self.blocks_lag} records of block updates are still to be applied"
        return None


class ProgressReader:
    """Looks at index versions; use as ``async with``."""

    def __init__(self, kafka: KafkaSettings, app: str, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._kafka = kafka
        self._app = app
        self._clock_ns = clock_ns
        self._tables: dict[str, WorkerDirectory] = {}
        self._newest: dict[bytes | None, bytes | None] = {}
        self._follower = TopicFollower(kafka, topics.WORKERS, self._apply, client_id=_CLIENT_ID)
        self._ranges = RangeReader(kafka, _CLIENT_ID)

    async def __aenter__(self) -> ProgressReader:
        """Read what is there.

        Raises:
            LogError: Kafka does not answer, or the topics are missing.
        """
        self._follower.start()
        try:
            await self._follower.wait(_READ_SECONDS)
            await self._ranges.__aenter__()
        except BaseException:
            await self._follower.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._follower.stop()
        await self._ranges.__aexit__()

    def _apply(self, key: bytes | None, value: bytes | None) -> None:
        self._newest[key] = value
        for table in self._tables.values():
            table.apply(key, value)

    def _table(self, version: str) -> WorkerDirectory:
        if version not in self._tables:
            table = self._tables[version] = WorkerDirectory(self._clock_ns, version)
            for key, value in self._newest.items():
                table.apply(key, value)
        return self._tables[version]

    @property
    def catalog(self) -> records.IndexCatalog:
        """The catalog as it was read last."""
        return self._table(topics.BASE_VERSION).catalog

    async def look(self, version: str) -> Progress:
        """Return the state of a version now.

        Raises:
            LogError: Kafka does not answer.
        """
        table = self._table(version)
        layout = table.layout
        now = self._clock_ns()
        app = topics.version_app(self._app, version)
        end, total, events_lag = await self._lag(topics.EVENTS, (app, f"{app}-resolve"))
        _, _, blocks_lag = await self._lag(topics.blocks_topic(version), (app, f"{app}-index"))
        return Progress(
            version=version,
            active=version == self.catalog.active,
            block_size_tokens=layout.block_size_tokens if layout else 0,
            partitions=layout.partition_count if layout else 0,
            workers=sum(record.expires_ns > now for record in table.records.values()),
            uncovered=table.uncovered(),
            events_end=end,
            events_total=total,
            events_lag=events_lag,
            blocks_lag=blocks_lag,
        )

    async def _lag(self, topic: str, groups: tuple[str, ...]) -> tuple[int, int, int]:
        """Return the end of a topic, its records, and how many of them no group has committed.

        A worker commits about once a second, so this is at most a second's records too high and never too low.
        """
        name = self._kafka.topic(topic)
        edges = await self._ranges.edges(name, await self._ranges.partitions(name))
        done = {number: edge.first for number, edge in edges.items()}
        async with admin_of(self._kafka) as admin:
            for group in groups:
                found = await committed(admin, self._kafka.topic(group))
                for number in edges:
                    if (meta := found.get(TopicPartition(name, number))) is not None:
                        done[number] = max(done[number], meta.offset)
        end = sum(edge.end for edge in edges.values())
        left = sum(max(edge.end - done[number], 0) for number, edge in edges.items())
        return end, end - sum(edge.first for edge in edges.values()), left


async def committed(admin: Any, group: str, wait_seconds: float = 30.0) -> Any:
    """Return a group's committed offsets; a broker that has just been made finds no coordinator at first.

    Raises:
        KafkaError: the brokers refused, or were not ready in time.
    """
    return await patiently(lambda: admin.list_consumer_group_offsets(group), wait_seconds)
