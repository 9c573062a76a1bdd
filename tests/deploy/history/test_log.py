"""Merging the partitions of a log by time, from a broker that fills its answers with the first partition asked for."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from aiokafka.record.default_records import DefaultRecordBatchBuilder

from kvatlas.bridge.kafka.ranges import RangeFetcher
from kvatlas.bridge.model import topics
from kvatlas.deploy.history.log import Range, in_time

PARTITIONS, BATCHES, SIZE = 5, 40, 10


class FullAnswers:
    """A broker whose every answer is filled by one batch of the first partition that was asked for.

    Attributes:
        given: partition -> records handed out.
    """

    def __init__(self) -> None:
        self.given: Counter[int] = Counter()
        self.cluster = SimpleNamespace(leader_for_partition=lambda _: 0)

    async def fetcher(self, topic: str, bounds: Any, wants: Any) -> RangeFetcher:
        """Return what fetches a range from here."""
        return RangeFetcher(self, topic, bounds, wants)

    async def send(self, node: int, request: Any) -> Any:
        """Answer a fetch."""
        del node
        ((topic, partitions),) = request.topics
        partition, position, _ = partitions[0]
        builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1 << 20)
        for number in range(SIZE):
            # All partitions go forward together; records of one moment are a millisecond apart.
            moment = (position + number) * PARTITIONS + partition
            builder.append(number, moment, None, b"%d" % (position + number), [])
        batch = bytearray(builder.build())
        batch[:8] = position.to_bytes(8, "big")
        self.given[partition] += SIZE
        return SimpleNamespace(topics=[(topic, [(partition, 0, 0, bytes(batch))])])


async def test_partitions_are_read_side_by_side() -> None:
    """Records come in the order of time, and no partition is read far ahead while another is waited for."""
    client = FullAnswers()
    span = Range(topics.EVENTS, dict.fromkeys(range(PARTITIONS), (0, BATCHES * SIZE)))
    taken: Counter[int] = Counter()
    moments, ahead = [], 0
    async for record in in_time(client, topics.EVENTS, span):
        ahead = max(ahead, *(client.given[partition] - taken[partition] for partition in range(PARTITIONS)))
        taken[record.partition] += 1
        moments.append(record.timestamp_ms)
    assert moments == list(range(PARTITIONS * BATCHES * SIZE))
    assert ahead <= 4 * SIZE
