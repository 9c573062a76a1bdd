"""What a fetch brings is handed over whole, whatever Faust thinks of its partitions meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import faust
from aiokafka import TopicPartition
from faust.types import TP
from yarl import URL

from kvatlas.streams.faust_app.consumer import FetchedRecords, SourceConsumer, SourceTransport

TOPIC = "kv-events"
PARTITIONS = [TP(TOPIC, number) for number in range(3)]


class App(faust.App):
    """An app that never starts, with a source topic."""

    def __init__(self) -> None:
        super().__init__("fetched", broker="kafka://127.0.0.1:1", store="memory://")
        self.sources = {TOPIC: None}


class Fetching(SourceConsumer):
    """A consumer whose fetches bring one record of each partition."""

    offset = 0

    async def _getmany(self, active_partitions: Any, timeout: float) -> Any:
        await asyncio.sleep(0)
        self.offset += 1
        record = SimpleNamespace(offset=self.offset, timestamp=0, timestamp_type=0)
        return {TopicPartition(*at): [record] for at in PARTITIONS}

    def assignment(self) -> set[TP]:
        return set(PARTITIONS)


async def _ignored(*_: Any, **__: Any) -> None:
    return None


async def test_a_fetch_under_way_loses_nothing_when_a_stream_has_enough() -> None:
    """A stream's queue takes its partition out of the active ones; records that were fetched already still come."""
    app = App()
    transport = SourceTransport([URL("kafka://127.0.0.1:1")], app)
    consumer = Fetching(transport, _ignored, _ignored, _ignored)
    app.flow_control.resume()
    consumer.resume_flow()
    consumer.resume_partitions(set(PARTITIONS))
    try:
        seen: dict[int, list[int]] = {}
        for _ in range(4):
            async for tp, batch in consumer.getmany(1.0):
                assert isinstance(batch, FetchedRecords)
                for number, records in batch.records.items():
                    seen.setdefault(number, []).extend(record.offset for record in records)
                consumer.on_buffer_full(tp)
    finally:
        await consumer.on_stop()
    assert seen == {at.partition: [1, 2, 3, 4] for at in PARTITIONS}
