"""The fleet and the workers as their own topics tell them, for ``kvatlas top``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.model.loads import load_age_seconds
from kvatlas.bridge.model.workers import WorkerDirectory
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history.top_scorers import ScorerRow, Scorers
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.lookups.versions import VersionReader, Versions

_NS_PER_MS: Final = 1_000_000
_READ_SECONDS: Final = 15.0
_STORE: Final = "store:"


class PodRow(msgspec.Struct, frozen=True, kw_only=True):
    """One pod: liveness, position, how fast it moves, and what it holds.

    Attributes:
        epoch: ``incarnation << 32 | clears``.
        messages_per_second: since the look before.
        age_ms: since its last message was received; -1 before the first.
        lost, first_lost, last_lost: messages that no replay repaired, and the newest such range.
        blocks: tier -> blocks, as the workers counted them last, from a sample where there are many.
        load: what the pod reports of itself: ``running``, ``waiting``, ``cache_usage``; empty where it does not.
        load_age_ms: since that was read off its engine, stale past 15 s; -1 where it reports none.
        coverage: how much of the engine's stream is known: ``whole``, ``partial``, or empty.
    """

    pod: str
    state: str
    model: str
    epoch: int
    sequence: int
    messages_per_second: float
    age_ms: float
    lost: int
    first_lost: int
    last_lost: int
    blocks: dict[str, int]
    load: dict[str, float] = {}
    load_age_ms: float = -1.0
    coverage: str = ""


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One worker: what it serves, and how far behind the log it is.

    Attributes:
        lag_records: records of ``kv-blocks`` that it has not applied yet.
        records_per_second: records applied since the last look.
    """

    worker: str
    endpoint: str
    partitions: list[int]
    standby: list[int]
    restoring: list[int]
    lag_records: int
    records_per_second: float
    expired: bool


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One look at everything.

    Attributes:
        version: of this layout; it changes only when a field's meaning does, new fields do not change it.
        pods, workers, scorers: a row each; no scorers unless they were named.
        stores: shared store -> blocks in it.
        unserved: partitions of ``kv-blocks`` that no worker answers for.
    """

    version: int = 1
    pods: list[PodRow]
    workers: list[WorkerRow]
    scorers: list[ScorerRow]
    stores: dict[str, int]
    unserved: list[int]


class Watch:
    """Follows ``kv-pods`` and ``kv-workers``, of the index version that answers; use as ``async with``."""

    def __init__(
        self, kafka: KafkaSettings, scorers: Sequence[str] = (), clock_ns: Callable[[], int] = time.time_ns
    ) -> None:
        """Describe what to look at; ``scorers`` are the host:port of their telemetry.

        Raises:
            SettingsError: one of them is no address.
        """
        self._kafka = kafka
        self._scorers = Scorers(scorers)
        self._clock_ns = clock_ns
        self._versions = Versions(
            lambda name: VersionReader(name, kafka, client_id="kvatlas-top", clock_ns=clock_ns), "", lambda _used: None
        )
        self._ranges = RangeReader(kafka, "kvatlas-top")
        self._before: tuple[float, dict[str, int], dict[str, int]] = (time.monotonic(), {}, {})

    async def __aenter__(self) -> Watch:
        """Read what is there.

        Raises:
            LogError: Kafka does not answer, or the topics are missing.
        """
        try:
            await self._versions.start(_READ_SECONDS)
            await self._ranges.__aenter__()
        except BaseException:
            await self._versions.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Disconnect."""
        await self._versions.stop()
        await self._ranges.__aexit__()

    @property
    def pods(self) -> Mapping[str, records.PodRecord]:
        """The pods' records, by pod id."""
        return self._pods.merged

    def failed(self) -> BaseException | None:
        """Return what ended the reading of a topic or the look at its ends, None while both go on."""
        errors = (reader.failed() for reader in self._versions.readers.values())
        return self._ranges.failed() or next(filter(None, errors), None)

    async def look(self) -> Picture:
        """Return the state now; rates are since the look before, 0 at the first.

        Raises:
            LogError: Kafka does not answer.
        """
        await self._versions.settle()
        now = self._clock_ns()
        moment = time.monotonic()
        before, sequences, offsets = self._before
        seconds = max(moment - before, 1e-3)
        ends = await self._ends()
        held = self._held(now)
        pods = [
            self._pod(record, now, sequences, seconds, held.get(record.pod, {}))
            for record in self._pods.listed(gone=True)
        ]
        workers = [
            self._worker(record, now, ends, offsets, seconds) for _, record in sorted(self._workers.records.items())
        ]
        self._before = (
            moment,
            {row.pod: row.sequence for row in pods},
            {name: sum(record.offsets.values()) for name, record in self._workers.records.items()},
        )
        return Picture(
            pods=pods,
            workers=workers,
            scorers=await self._scorers.look(),
            stores={name.removeprefix(_STORE): sum(held[name].values()) for name in held if name.startswith(_STORE)},
            unserved=sorted(self._workers.uncovered()),
        )

    def _held(self, now: int) -> dict[str, dict[str, int]]:
        """Add up what the workers counted, each in its own partitions."""
        held: dict[str, dict[str, int]] = {}
        for record in self._workers.records.values():
            if record.expires_ns and record.expires_ns < now:
                continue  # its partitions are another's by now, who counts them too
            for pod, tiers in record.blocks.items():
                whole = held.setdefault(pod, {})
                for tier, blocks in tiers.items():
                    whole[tier] = whole.get(tier, 0) + blocks
        return held

    @property
    def _pods(self) -> PodTable:
        return self._versions.used.pods

    @property
    def _workers(self) -> WorkerDirectory:
        return self._versions.used.workers

    async def _ends(self) -> dict[int, int]:
        layout = self._workers.layout
        if layout is None:
            return {}
        topic = self._kafka.topic(topics.blocks_topic(self._versions.used.name))
        edges = await self._ranges.edges(topic, range(layout.partition_count))
        return {number: edge.end for number, edge in edges.items()}

    @staticmethod
    def _pod(
        record: records.PodRecord, now: int, before: dict[str, int], seconds: float, blocks: dict[str, int]
    ) -> PodRow:
        moved = record.last_sequence - before.get(record.pod, record.last_sequence)
        return PodRow(
            pod=record.pod,
            state=record.state,
            model=record.model,
            epoch=record.epoch,
            sequence=record.last_sequence,
            messages_per_second=round(max(moved, 0) / seconds, 1),
            age_ms=round((now - record.receive_ns) / _NS_PER_MS, 1) if record.receive_ns else -1.0,
            lost=record.lost,
            first_lost=record.first_lost,
            last_lost=record.last_lost,
            blocks=blocks,
            load=record.load,
            load_age_ms=round(load_age_seconds(record, now) * 1e3, 1) if record.load else -1.0,
            coverage=record.coverage,
        )

    @staticmethod
    def _worker(
        record: records.WorkerRecord, now: int, ends: dict[int, int], before: dict[str, int], seconds: float
    ) -> WorkerRow:
        applied = sum(record.offsets.values())
        lag = sum(max(0, ends.get(part, 0) - record.offsets.get(part, -1) - 1) for part in record.partitions)
        moved = applied - before.get(record.worker, applied)
        return WorkerRow(
            worker=record.worker,
            endpoint=record.endpoint,
            partitions=sorted(record.partitions),
            standby=sorted(record.standby),
            restoring=sorted(record.restoring),
            lag_records=lag,
            records_per_second=round(max(moved, 0) / seconds, 1),
            expired=bool(record.expires_ns) and record.expires_ns < now,
        )
