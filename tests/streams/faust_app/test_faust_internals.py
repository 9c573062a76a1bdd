"""What the worker takes from inside Faust: an upgrade that moves any of it fails here, with its name.

``REACHED`` is all of it that is private; what aiokafka and gRPC have of that kind is listed in ``tests/test_rooms.py``.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from types import SimpleNamespace
from typing import Any, Final

import aiokafka
import faust
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.consumer.group_coordinator import GroupCoordinator
from faust.tables.base import Collection
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport import consumer
from faust.transport.conductor import Conductor
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from yarl import URL

from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.streams.faust_app import recovery
from kvatlas.streams.faust_app.app import WorkerApp, build_app
from kvatlas.streams.faust_app.consumer import FetchedRecords, SourceConsumer, SourceConsumerThread, SourceTransport
from kvatlas.streams.faust_app.table import BulkTable
from kvatlas.streams.options import WorkerSettings
from tests.test_rooms import R6_KNOWN, modules

#: Private names of Faust and aiokafka that ``streams.faust_app`` reads or overrides, and whose they are.
REACHED: Final[dict[str, type]] = {
    "_create_worker_consumer": driver.AIOKafkaConsumerThread,
    "_ensure_producer": driver.Producer,
    "_fetch_max_wait_ms": AIOKafkaConsumer,
    "_new_consumer_thread": driver.Consumer,
    "_recovery": TableManager,
    "_wait_next_records": consumer.Consumer,
}
BASES: Final = (faust.App, faust.Table, Recovery, TableManager, driver.AIOKafkaConsumerThread, driver.Consumer)


def test_the_list_is_complete() -> None:
    """No module of the room reads another private name, nor does a class of it override or set one."""
    found: set[str] = set()
    for module, tree in modules().items():
        if not module.startswith("streams.faust_app"):
            continue
        nodes = list(ast.walk(tree))
        ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        ours |= {
            node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
        own = {
            node.attr
            for node in attributes
            if isinstance(node.value, ast.Name) and node.value.id == "self" and isinstance(node.ctx, ast.Store)
        }
        names = ours | own | {node.attr for node in attributes}
        fausts = {name for name in names if any(hasattr(base, name) for base in BASES)}
        found |= fausts | (names - ours - own)
    private = {name for name in found if name.startswith("_") and not name.startswith("__")}
    assert private - R6_KNOWN == set(REACHED)


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer", ["transport"]),
        (driver.AIOKafkaConsumerThread, "seek", ["partition", "offset"]),
        (driver.AIOKafkaConsumerThread, "commit", ["offsets"]),
        (driver.AIOKafkaConsumerThread, "on_partitions_assigned", ["assigned", "generation_id"]),
        (driver.Consumer, "_new_consumer_thread", []),
        (driver.Producer, "_ensure_producer", []),
        (consumer.Consumer, "_wait_next_records", ["timeout"]),
        (consumer.Consumer, "getmany", ["timeout"]),
        (consumer.Consumer, "force_commit", ["topics", "start_new_transaction"]),
        (consumer.Consumer, "perform_seek", []),
        (consumer.ThreadDelegateConsumer, "seek_wait", ["partitions"]),
        (Collection, "on_rebalance", ["assigned", "revoked", "newly_assigned", "generation_id"]),
        (Collection, "on_recovery_completed", ["active_tps", "standby_tps"]),
        (Recovery, "on_rebalance", ["assigned", "revoked", "newly_assigned", "generation_id"]),
        (Recovery, "on_recovery_completed", ["generation_id"]),
        (GroupCoordinator, "_do_heartbeat", []),
        (AIOKafkaProducer, "create_batch", []),
        (AIOKafkaProducer, "send_batch", ["batch", "topic", "partition"]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_is_overridden_or_called_has_the_shape_we_know(owner: type, name: str, parameters: list[str]) -> None:
    """Each method exists with the parameters that we pass or take."""
    found = [parameter for parameter in inspect.signature(getattr(owner, name)).parameters if parameter != "self"]
    assert found[: len(parameters)] == parameters


def test_table_manager_makes_its_recovery_in_a_property() -> None:
    """BulkTableManager replaces the property and the attribute behind it."""
    assert isinstance(TableManager.recovery, property)
    assert "self._recovery" in inspect.getsource(TableManager.recovery.fget)  # type: ignore[arg-type]
    assert "await self._recovery.stop()" in inspect.getsource(TableManager.on_stop)
    assert isinstance(recovery.BulkTableManager.recovery, property)


def test_recovery_waits_for_a_signal_that_we_never_give() -> None:
    """Faust's own recovery begins with its ``on_rebalance``, in whose place ours is; its end is what we call."""
    source = inspect.getsource(Recovery._restart_recovery.fun)  # a mode task wraps the function
    assert source.index("self.signal_recovery_start") < source.index("self._set_recovery_started()")
    assert "signal_recovery_start.set()" in inspect.getsource(Recovery.on_rebalance)
    last = inspect.getsource(Recovery.on_recovery_completed)
    steps = [
        *("consumer.resume_partitions(", "consumer.perform_seek()", "flow_control.resume()", "consumer.resume_flow()"),
        *("_fetcher.maybe_start()", "on_actives_ready()", "on_rebalance_end()"),
    ]
    assert sorted(steps, key=last.index) == steps


def test_tables_are_asked_for_nothing_that_ours_have_not() -> None:
    """Neither an assignment nor its end touches the store that a table of Faust's has, and ours has not."""
    for method in (TableManager.on_rebalance, TableManager.on_stop, Recovery.on_recovery_completed):
        assert ".data" not in inspect.getsource(method)
    for method in ("on_start", "on_rebalance", "on_recovery_completed"):
        assert "self.data" in inspect.getsource(getattr(Collection, method))
        assert method in vars(BulkTable)


async def test_aiokafka_takes_the_fetch_wait_before_its_start() -> None:
    """The attribute that the consumer thread sets is the one the fetcher is made with."""
    made = AIOKafkaConsumer(fetch_max_wait_ms=7)
    assert made._fetch_max_wait_ms == 7
    assert "self._fetch_max_wait_ms" in inspect.getsource(aiokafka.AIOKafkaConsumer.start)


def test_batches_go_the_way_of_messages() -> None:
    """Faust delivers what getmany yields unless it stands before what was delivered, and commits by force_commit."""
    drain = inspect.getsource(consumer.Consumer._drain_messages)
    for step in ("getmany = self.getmany", "async for tp, message in ait", "offset >= r_offset", "callback(message)"):
        assert step in drain
    assert "self.force_commit(" in inspect.getsource(consumer.Consumer.commit)
    assert SourceTransport.Consumer is SourceConsumer
    assert issubclass(SourceConsumerThread, driver.AIOKafkaConsumerThread)


def test_records_that_are_read_again_are_not_dropped() -> None:
    """Whatever Faust has noted as delivered of a partition, or sought, a fetch stands at or behind it."""
    record = SimpleNamespace(offset=5, timestamp=0, timestamp_type=0)
    first, again = (FetchedRecords("t", {0: [record]}, 1) for _ in range(2))
    assert again.offset >= first.offset > 1 << 50
    assert (first.tp, first.generation_id) == (TP("t", 0), 1)


def build(tmp_path: Any) -> WorkerApp:
    """Return an app that never starts."""
    settings = WorkerSettings(state_dir=str(tmp_path))
    kafka = KafkaSettings(brokers="127.0.0.1:1")
    partitions = {topics.EVENTS: 3, "kv-blocks": 3, topics.PODS: 1, topics.DLQ: 1, topics.DECISIONS: 1}
    return build_app(
        settings, kafka, partitions=partitions, worker_id="w", clock=lambda: 0, on_crash=lambda _error: None
    )


def source_consumer(app: WorkerApp) -> SourceConsumer:
    """Return a consumer that never starts."""

    async def ignored(*_: Any, **__: Any) -> None:
        return None

    return SourceConsumer(SourceTransport([URL("kafka://127.0.0.1:1")], app), ignored, ignored, ignored)


async def test_changelogs_are_assigned_and_never_fetched(tmp_path: Any) -> None:
    """They are paused before anybody is told of an assignment; Faust would only not ask for what was fetched."""
    app = build(tmp_path)
    made = source_consumer(app)
    thread = made._reading
    thread._wait_ms = 7
    client = thread._create_worker_consumer(app.transport)
    changelog = next(iter(app.sources.values())).changelog_topic_name
    assigned = {TP(topic, 1) for topic in (*app.sources, changelog)}
    client.assign([TopicPartition(*tp) for tp in assigned])
    told: list[set[TP]] = []

    async def tell(_loop: Any, tps: set[TP], _generation: int) -> None:
        assert client.paused() == {TopicPartition(changelog, 1)}
        told.append(tps)

    made.threadsafe_partitions_assigned = tell
    async with asyncio.timeout(90):
        await thread.on_partitions_assigned(assigned, 3)
    assert told == [assigned]
    await client.stop()


async def test_faust_tracks_no_acknowledgements_of_source_topics(tmp_path: Any) -> None:
    """Its notes would say what was handed over, which is not what is done; changelogs have the names that we give."""
    app = build(tmp_path)
    conductor = Conductor(app)
    for agent in app.agents.values():
        conductor.add(agent.channel)
    for table in app.sources.values():
        conductor.add(table.changelog_topic)
    await conductor._update_indices()
    assert conductor.acking_topics == set()
    assert {agent.get_topic_names()[0] for agent in app.agents.values()} == set(app.sources)
    changelogs = {table.changelog_topic_name for table in app.sources.values()}
    assert changelogs == app.tables.changelog_topics
    assert all(name.endswith("-changelog") for name in changelogs)


async def test_only_finished_offsets_are_committed(tmp_path: Any) -> None:
    """What a task has committed is committed to the group once, of the partitions that are ours."""
    app = build(tmp_path)
    made = source_consumer(app)
    ours, lost = TP("kv-blocks", 2), TP("kv-blocks", 1)
    sent: list[dict[TopicPartition, int]] = []

    class Reading:
        """The consumer's thread."""

        def assignment(self) -> set[TP]:
            return {ours}

        async def commit(self, offsets: Any) -> bool:
            sent.append(offsets)
            return True

    made._reading = made._thread = Reading()
    assert not await made.force_commit()
    for tp in (ours, lost):
        made.committed(tp, 41)
    assert await made.force_commit()
    assert not await made.force_commit()
    assert sent == [{ours: 42}]


def test_each_accepted_heartbeat_is_the_coordinators_own_call() -> None:
    """The heartbeat routine calls the method that we wrap on the instance, and True means accepted."""
    routine = inspect.getsource(GroupCoordinator._heartbeat_routine)
    assert "success = await self._do_heartbeat()" in routine
    assert "_coordinator = GroupCoordinator(" in inspect.getsource(AIOKafkaConsumer.start)
