"""The Faust app of a worker: topics, tables, two agents, and what has to happen around a rebalance. Wiring only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple, cast

import faust
from aiokafka import TopicPartition
from faust.types import TP
from yarl import URL

from kvatlas.bridge.kafka.config import password, ssl_context
from kvatlas.bridge.kafka.lease import Lease
from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.streams.faust_app.consumer import IdleSource, SourceConsumer, SourceTransport
from kvatlas.streams.faust_app.recovery import BulkTableManager
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.index.apply import is_entry as index_entry
from kvatlas.streams.options import WorkerSettings
from kvatlas.streams.resolve.entries import is_entry as engine_entry
from kvatlas.streams.resolve.options import resolve_options
from kvatlas.streams.resolve.resolver import Resolver
from kvatlas.streams.state.changelog import Meta, encode_meta, send_claim
from kvatlas.streams.state.database import RocksBudget
from kvatlas.streams.state.partition import Role, Valid
from kvatlas.streams.state.restore import MAX_LOCAL_AGE_SECONDS, BulkReader
from kvatlas.streams.tasks.index_task import IndexTask
from kvatlas.streams.tasks.output import Output
from kvatlas.streams.tasks.pods import PodPublisher
from kvatlas.streams.tasks.resolve_task import ResolveTask
from kvatlas.streams.tasks.sessions import SessionPublisher
from kvatlas.streams.tasks.task import PartitionTask, TaskLimits, TaskParts
from kvatlas.streams.tasks.task_set import TaskSet

ENGINE_BLOCKS: Final = "engine_blocks"
BLOCK_INDEX: Final = "block_index"

_MAX_POLL_SECONDS: Final = 7 * 24 * 3600.0  # a restore may take long without a poll; heartbeats go on meanwhile
_DRAIN_SECONDS: Final = 3.0
#: Updates applied before the event loop is given to lookups: about 5 ms.
SLICE_UPDATES: Final = 2_048
#: A flush is full with so many records or updates: large enough to cost little per update, and repeated at a crash.
_FLUSH_RECORDS: Final = 1_024
_FLUSH_UPDATES: Final = 8_192
#: Largest changelog batch; the topics are made to take it.
_BATCH_BYTES: Final = 24 * 1024 * 1024
#: RocksDB's block cache, all partitions together: what is read often is in the tables' own cache before it.
_BLOCK_CACHE_BYTES: Final = 64 * 1024 * 1024
#: RocksDB's memtables, all partitions together: a flush of the busiest table every some ten seconds.
_WRITE_BUFFER_BYTES: Final = 128 * 1024 * 1024
#: Brokers' longest wait for an answer; a member's session must not end first.
_REQUEST_SECONDS: Final = 30.0


class WorkerApp(faust.App):
    """The app; built by :func:`build_app`.

    Attributes:
        reader: bulk reader of changelogs.
        tasks: source topic -> tasks of its agent.
        sources: source topic -> table that its agent writes.
        kafka: how to reach the brokers.
        roles_listener: called when roles changed, with whether all active partitions are caught up.
        lease: whether the group surely counts this worker in.
        publisher: of pod records; None when the resolve agent does not run here.
        sessions: tells where sessions were seen; None as above.
        on_failed: called with the error, from any thread, when something has ended that nothing repairs.
    """

    reader: BulkReader
    tasks: dict[str, TaskSet]
    sources: dict[str, BulkTable]
    kafka: KafkaSettings
    lease: Lease
    publisher: PodPublisher | None
    sessions: SessionPublisher | None
    roles_listener: Callable[[bool], None] | None
    on_failed: Callable[[BaseException], None]

    def bulk_table(self, name: str) -> BulkTable | None:
        """Return one of our tables, None when this role does not have it."""
        return next((table for table in self.sources.values() if table.name == name), None)

    def source_positions(self, assignment: set[TP]) -> Mapping[TP, int]:
        """Return where each assigned source partition goes on, as its table says."""
        positions = {}
        for tp in assignment:
            table = self.sources.get(tp.topic)
            if table is not None and (state := table.states.get(tp.partition)) is not None:
                positions[tp] = state.meta.source_offset + 1
        return positions

    def source_consumer(self) -> SourceConsumer:
        """Return Faust's consumer."""
        return cast("SourceConsumer", self.consumer)

    def waiting(self) -> Iterator[IdleSource]:
        """Yield the source partitions whose tasks wait for a record."""
        for topic, table in self.sources.items():
            tasks = self.tasks[topic]
            for partition in list(table.states):
                if (wanted := tasks.waiting(partition)) is not None:
                    yield IdleSource(TP(topic, partition), wanted)

    def source_end(self, topic: str, partition: int) -> int | None:
        """Return the end of a source partition as seen last, None when unknown."""
        try:
            end = self.consumer.highwater(TP(topic, partition))
        except Exception:  # noqa: BLE001 # not assigned, or not fetched yet: Faust and aiokafka raise many kinds
            return None
        return None if end is None else int(end)

    def aiokafka_producer(self) -> Any:
        """Return the ``AIOKafkaProducer`` inside Faust's producer."""
        producer: Any = self.producer
        return producer._ensure_producer()

    def on_roles_changed(self) -> None:
        """Let tasks run again after a restore and tell who listens."""
        for tasks in self.tasks.values():
            tasks.resume()
        self.tell(restored=True)

    async def quiesce(self) -> None:
        """Commit what was applied, drop what is queued, and demote what is active to a flagged copy."""
        await asyncio.gather(*(tasks.stop(_DRAIN_SECONDS) for tasks in self.tasks.values()))
        if self.publisher is not None:
            self.publisher.forget()
        for table in self.sources.values():
            for state in table.states.values():
                if state.role is Role.ACTIVE:
                    state.role = Role.STANDBY
        self.tell(restored=False)

    def tell(self, *, restored: bool) -> None:
        """Tell the listener that roles changed; ``restored`` says that all active partitions are caught up."""
        if self.roles_listener is not None:
            self.roles_listener(restored)


def group_of(settings: WorkerSettings) -> str:
    """Return the consumer group: one for whole workers, one per agent when they run apart."""
    app = settings.versioned_app
    return app if settings.role == "all" else f"{app}-{settings.role}"


def build_app(
    settings: WorkerSettings,
    kafka: KafkaSettings,
    *,
    partitions: Mapping[str, int],
    worker_id: str,
    clock: Callable[[], int],
    on_crash: Callable[[BaseException], None],
    slice_updates: int = SLICE_UPDATES,
) -> WorkerApp:
    """Build the app of one worker.

    Args:
        settings: the worker's.
        kafka: how to reach the brokers.
        partitions: topic (without prefix) -> number of partitions, as the brokers say.
        worker_id: names this worker in the brokers' logs.
        clock: wall clock, ns since the epoch.
        on_crash: called with the error, from any thread, when a task or an agent ends by one, or a database cannot be
            used any more.
        slice_updates: updates applied before the event loop is given to others.
    """
    request_seconds = max(_REQUEST_SECONDS, settings.session_timeout_seconds)
    app = WorkerApp(
        kafka.topic(group_of(settings)),
        broker=[URL(f"kafka://{address.strip()}") for address in kafka.brokers.split(",")],
        broker_client_id=f"kvatlas-worker-{worker_id}",
        broker_credentials=_credentials(kafka),
        broker_session_timeout=settings.session_timeout_seconds,
        broker_heartbeat_interval=settings.session_timeout_seconds / 3,
        broker_request_timeout=request_seconds,
        broker_rebalance_timeout=max(settings.session_timeout_seconds * 2, 10.0),
        broker_max_poll_interval=_MAX_POLL_SECONDS,
        broker_commit_interval=1.0,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=4 * 1024 * 1024,
        producer_acks=-1,
        producer_max_batch_size=_BATCH_BYTES,
        producer_max_request_size=_BATCH_BYTES + 1024 * 1024,
        producer_request_timeout=request_seconds,
        datadir=settings.state_dir,
        store="memory://",
        key_serializer="raw",
        value_serializer="raw",
        stream_wait_empty=False,
        stream_recovery_delay=0.0,
        stream_buffer_maxsize=2,  # each has all that one fetch brought
        table_standby_replicas=settings.standbys,
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_enabled=False,
        TableManager=BulkTableManager,
    )
    app.transport = SourceTransport(app.conf.broker_consumer, app)
    app.roles_listener = None
    app.on_failed = on_crash
    app.kafka = kafka
    app.publisher = app.sessions = None
    app.tasks, app.sources = {}, {}
    budget = RocksBudget(_BLOCK_CACHE_BYTES, _WRITE_BUFFER_BYTES, on_failed=on_crash)
    engine_changelog, index_changelog = (
        kafka.topic(topic.name) for topic in topics.changelog_topics(settings.versioned_app)
    )
    output = Output(
        app.aiokafka_producer,
        (kafka.topic(settings.blocks_topic), partitions[settings.blocks_topic]),
        (kafka.topic(topics.DLQ), partitions[topics.DLQ]),
        kafka.topic(topics.EVENTS),
    )
    parts = _Parts(app, settings, kafka, partitions, output, budget, clock, on_crash, slice_updates, worker_id)
    tables: dict[str, str] = {}
    if settings.role in ("all", "resolve"):
        tables[engine_changelog] = ENGINE_BLOCKS
        _add_resolve(parts, engine_changelog)
    if settings.role in ("all", "index"):
        tables[index_changelog] = BLOCK_INDEX
        _add_tasks(
            parts,
            "index",
            name=BLOCK_INDEX,
            topic=settings.blocks_topic,
            changelog=index_changelog,
            valid=index_entry,
            make_task=lambda common: IndexTask(common, output),
        )

    async def claim(at: TopicPartition, meta: Meta) -> int:
        return await send_claim(app.aiokafka_producer(), at.topic, at.partition, encode_meta(meta))

    app.reader = BulkReader(kafka, f"kvatlas-restore-{worker_id}", tables, MAX_LOCAL_AGE_SECONDS, claim=claim)
    app.lease = Lease(settings.session_timeout_seconds)

    async def revoked(*_: Any, **__: Any) -> None:
        await app.quiesce()

    app.on_partitions_revoked.connect(revoked, weak=False)
    return app


class _Parts(NamedTuple):
    """What the agents of one app are built from."""

    app: WorkerApp
    settings: WorkerSettings
    kafka: KafkaSettings
    partitions: Mapping[str, int]
    output: Output
    budget: RocksBudget
    clock: Callable[[], int]
    on_crash: Callable[[BaseException], None]
    slice_updates: int
    worker_id: str


def _add_resolve(parts: _Parts, changelog: str) -> None:
    app, settings, partitions = parts.app, parts.settings, parts.partitions
    options = resolve_options(settings)
    app.publisher = publisher = PodPublisher(
        app.aiokafka_producer,
        (parts.kafka.topic(topics.PODS), partitions[topics.PODS]),
        writer=pod_ids.streams_writer(settings.index_version),
    )
    app.sessions = sessions = SessionPublisher(
        app.aiokafka_producer,
        (parts.kafka.topic(topics.DECISIONS), partitions[topics.DECISIONS]),
        worker=parts.worker_id,
        clock=parts.clock,
    )

    def make_task(common: TaskParts) -> ResolveTask:
        resolver = Resolver(options, partitions[settings.blocks_topic], parts.clock)
        return ResolveTask(common, resolver, output=parts.output, pods=publisher, sessions=sessions)

    _add_tasks(
        parts,
        "resolve",
        name=ENGINE_BLOCKS,
        topic=topics.EVENTS,
        changelog=changelog,
        valid=engine_entry,
        make_task=make_task,
    )


def _add_tasks(
    parts: _Parts,
    agent: str,
    *,
    name: str,
    topic: str,
    changelog: str,
    valid: Valid,
    make_task: Callable[[TaskParts], PartitionTask],
) -> None:
    app, settings, source = parts.app, parts.settings, parts.kafka.topic(topic)
    share = settings.cache_bytes // (2 if settings.role == "all" else 1)
    table = BulkTable(app, name, source, changelog, budget=parts.budget, cache_bytes=share, valid=valid)
    app.tables.add(table)
    app.sources[source] = table
    app.tasks[source] = TaskSet(
        agent,
        table,
        TaskLimits(_FLUSH_RECORDS, _FLUSH_UPDATES, parts.slice_updates, settings.commit_interval_ms / 1000),
        make_task=make_task,
        on_failed=parts.on_crash,
    )
    _agent(parts, source, agent, app.tasks[source])


def _agent(parts: _Parts, source: str, name: str, tasks: TaskSet) -> None:
    topic = parts.app.topic(
        source,
        key_serializer="raw",
        value_serializer="raw",
        allow_empty=True,
        acks=False,  # an event here was only handed over; which offsets are done, the tasks tell the consumer
    )

    async def agent(stream: Any) -> None:
        try:
            async for event in stream.events():
                await tasks.offer(event.message.records)
        except Exception as error:
            parts.on_crash(error)  # Faust would start another agent in the place of this one
            raise

    parts.app.agent(topic, name=name)(agent)


def _credentials(kafka: KafkaSettings) -> Any:
    context = ssl_context(kafka) if kafka.security_protocol in ("SSL", "SASL_SSL") else None
    if kafka.security_protocol.startswith("SASL"):
        return faust.SASLCredentials(
            username=kafka.sasl_username,
            password=password(kafka),
            ssl_context=context,
            mechanism=kafka.sasl_mechanism,
        )
    return faust.SSLCredentials(context=context) if context is not None else None
