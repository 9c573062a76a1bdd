"""The Faust and aiokafka internals that the worker builds on: an upgrade that moves one fails here, with its name."""

from __future__ import annotations

import inspect
from collections import defaultdict
from types import SimpleNamespace

import aiokafka
import faust
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.consumer.group_coordinator import GroupCoordinator
from faust.stores import rocksdb
from faust.tables.base import Collection
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport import consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from kvatlas.streams.faust_app import recovery, table
from kvatlas.streams.faust_app.consumer import SourceConsumer, SourceConsumerThread, SourceTransport
from kvatlas.streams.state import partition


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (Collection, "_new_store", []),
        (Collection, "_changelog_topic_name", []),
        (Collection, "info", []),
        (rocksdb.Store, "persisted_offset", ["tp"]),
        (rocksdb.Store, "set_persisted_offset", ["tp", "offset"]),
        (rocksdb.Store, "need_active_standby_for", ["tp"]),
        (rocksdb.Store, "apply_changelog_batch", ["batch", "to_key", "to_value"]),
        (rocksdb.Store, "on_rebalance", ["assigned", "revoked", "newly_assigned", "generation_id"]),
        (rocksdb.Store, "partition_path", ["partition"]),
        (rocksdb.Store, "_db_for_partition", ["partition"]),
        (rocksdb.Store, "_set", ["key", "value"]),
        (rocksdb.Store, "_del", ["key"]),
        (Recovery, "on_rebalance", ["assigned", "revoked", "newly_assigned", "generation_id"]),
        (Recovery, "on_recovery_completed", ["generation_id"]),
        (consumer.Consumer, "perform_seek", []),
        (consumer.ThreadDelegateConsumer, "seek_wait", ["partitions"]),
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer", ["transport"]),
        (driver.Consumer, "_new_consumer_thread", []),
        (driver.Producer, "_ensure_producer", []),
        (faust.App, "_new_transport", []),
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
    assert isinstance(recovery.BulkTableManager.recovery, property)


def test_recovery_keeps_standbys_where_we_empty_them() -> None:
    """Faust reads the standbys that these two attributes name; our reader follows them instead."""
    source = inspect.getsource(Recovery._restart_recovery.fun)  # a mode task wraps the function
    assert "standby_tps = self.standby_tps" in source
    assert "if standby_tps:" in source
    assert "need_recovery" in source
    assert "self.standbys_for_table" in inspect.getsource(Recovery.on_rebalance)


def test_the_offset_key_is_fausts() -> None:
    """Faust's recovery reads the changelog offset under this key."""
    assert partition.OFFSET_KEY == b"__faust\0offset__"
    assert issubclass(table.BulkTable, faust.Table)


def test_the_note_of_delivered_offsets_is_where_we_replace_it() -> None:
    """Faust drops what is below its note of delivered offsets; ours says that there is none."""
    source = inspect.getsource(consumer.Consumer._drain_messages)
    assert "get_read_offset = self._read_offset.__getitem__" in source
    assert "if r_offset is None or" in source
    assert "self._read_offset" in inspect.getsource(consumer.Consumer.__init__)


def test_consumer_state_that_a_seek_sets() -> None:
    """perform_seek fills the committed offsets that acknowledgements are compared with."""
    assert "_committed_offset" in inspect.getsource(consumer.Consumer.perform_seek)
    assert "_committed_offset" in inspect.getsource(consumer.Consumer.ack)
    assert SourceTransport.Consumer is SourceConsumer
    assert issubclass(SourceConsumerThread, driver.AIOKafkaConsumerThread)


async def test_aiokafka_takes_the_fetch_wait_before_its_start() -> None:
    """The attribute that the consumer thread sets is the one the fetcher is made with."""
    made = AIOKafkaConsumer(fetch_max_wait_ms=7)
    assert made._fetch_max_wait_ms == 7
    assert "self._fetch_max_wait_ms" in inspect.getsource(aiokafka.AIOKafkaConsumer.start)


def test_batches_go_the_way_of_messages() -> None:
    """Faust delivers what getmany yields, and commits what _new_offset says for the partitions with something done."""
    drain = inspect.getsource(consumer.Consumer._drain_messages)
    assert "getmany = self.getmany" in drain
    assert "async for tp, message in ait" in drain
    assert "callback(message)" in drain
    stock = inspect.getsource(consumer.Consumer.getmany)
    for used in ("_wait_next_records(timeout)", "consumer_generation_id", "flow_active", "_buffered_partitions"):
        assert used in stock
    assert "self._filter_tps_with_pending_acks(topics)" in inspect.getsource(consumer.Consumer.force_commit)
    assert "self._new_offset(tp)" in inspect.getsource(consumer.Consumer._filter_committable_offsets)
    for method in ("getmany", "_filter_tps_with_pending_acks", "_new_offset"):
        assert method in vars(SourceConsumer)


def test_only_finished_offsets_are_committed() -> None:
    """What a task has committed is committed to the group once; what Faust acknowledged of a source topic is not."""
    made = SourceConsumer.__new__(SourceConsumer)
    made.app = SimpleNamespace(sources={"kv-blocks": None})
    made._done, made._acked, made._acked_index = {}, defaultdict(list), defaultdict(set)
    tp = TP("kv-blocks", 3)
    made._acked[tp].append(99)
    made._acked_index[tp].add(99)
    assert made._new_offset(tp) is None
    assert not made._acked[tp]
    made.committed(tp, 41)
    assert tp in set(made._filter_tps_with_pending_acks())
    assert made._new_offset(tp) == 42
    assert made._new_offset(tp) is None


def test_each_accepted_heartbeat_is_the_coordinators_own_call() -> None:
    """The heartbeat routine calls the method that we wrap on the instance, and True means accepted."""
    routine = inspect.getsource(GroupCoordinator._heartbeat_routine)
    assert "success = await self._do_heartbeat()" in routine
    assert "_coordinator = GroupCoordinator(" in inspect.getsource(AIOKafkaConsumer.start)
