"""Tests of how block updates of several tasks share their records."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.errors import KafkaTimeoutError

from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.streams.index.blocks_record import decode_blocks
from kvatlas.streams.index.holders import pack_holder
from kvatlas.streams.resolve.effects import PodUpdates
from kvatlas.streams.tasks.output import Output

PARTITIONS = 2
EPOCH = epoch_of(7)


class Producer:
    """Keeps what is sent; acknowledges when the gate is open, fails as often as told."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures = 0

    async def send(self, topic: str, value: bytes, *, partition: int) -> asyncio.Future[Any]:
        assert topic == "blocks"
        self.sent.append((partition, value))
        return asyncio.ensure_future(self._acknowledge())

    async def _acknowledge(self) -> None:
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise KafkaTimeoutError

    def runs(self) -> list[tuple[int, list[int]]]:
        """Return (partition, pods) of every record, and empty what is kept."""
        sent, self.sent = self.sent, []
        return [(partition, [run.pod_ref for run in decode_blocks(value).runs]) for partition, value in sent]


def output_of(producer: Producer) -> Output:
    return Output(lambda: producer, ("blocks", PARTITIONS), ("dlq", 1), "events")


def updates(pod: int, sequence: int = 1) -> list[PodUpdates]:
    """Return one block in every partition."""
    found = PodUpdates(pod, EPOCH, sequence)
    keys = [number.to_bytes(4, "big") + bytes(12) for number in range(PARTITIONS)]
    found.add(keys, pack_holder(pod, 0, 1, 0, 0, EPOCH))
    return [found]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_comes_while_updates_are_sent_shares_the_next_records() -> None:
    """The first go at once; those of tasks that come meanwhile go together, one record a partition."""
    producer = Producer()
    producer.gate.clear()
    output = output_of(producer)
    first = asyncio.create_task(output.send_blocks(updates(1), 100))
    await settle()
    assert producer.runs() == [(0, [1]), (1, [1])]
    others = [asyncio.create_task(output.send_blocks(updates(pod), 100 + pod)) for pod in (2, 3, 4)]
    await settle()
    assert producer.runs() == []
    assert not first.done()
    producer.gate.set()
    await asyncio.gather(first, *others)
    newest = decode_blocks(producer.sent[0][1]).receive_ns
    assert producer.runs() == [(0, [2, 3, 4]), (1, [2, 3, 4])]
    assert newest == 104


async def test_a_failure_reaches_everybody_whose_updates_were_sent_and_nobody_else() -> None:
    """Each task sends its own again; the next ones are not held up."""
    producer = Producer()
    producer.gate.clear()
    output = output_of(producer)
    first = asyncio.create_task(output.send_blocks(updates(1), 100))
    await settle()
    second = asyncio.create_task(output.send_blocks(updates(2), 100))
    producer.failures = 1
    producer.gate.set()
    with pytest.raises(KafkaTimeoutError):
        await first
    await second
    await output.send_blocks(updates(1), 100)
    assert [pods for _, pods in producer.runs()] == [[1], [1], [2], [2], [1], [1]]


async def test_a_flow_that_is_cut_off_holds_nobody_up() -> None:
    """What it had waiting is sent or not; the others' updates are."""
    producer = Producer()
    producer.gate.clear()
    output = output_of(producer)
    first = asyncio.create_task(output.send_blocks(updates(1), 100))
    await settle()
    first.cancel()
    second = asyncio.create_task(output.send_blocks(updates(2), 100))
    await settle()
    producer.gate.set()
    await second
    assert [pods for _, pods in producer.runs()] == [[1], [1], [2], [2]]


async def test_no_updates_are_no_record() -> None:
    """An engine step that changes nothing in the index sends nothing."""
    producer = Producer()
    await output_of(producer).send_blocks([], 100)
    assert producer.sent == []
