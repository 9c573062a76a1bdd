"""What pickers are told of sessions: news alone, once a turn, bounded, and again after a failure."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from aiokafka.errors import KafkaTimeoutError

from kvatlas.bridge.model import records
from kvatlas.bridge.model.pod_ids import pod_partition
from kvatlas.streams.resolve.effects import Sighting
from kvatlas.streams.tasks.sessions import SessionPublisher

SECOND = 1_000_000_000
NOW = 1_000_000 * SECOND
A, B = "a" * 16, "b" * 16


class Topic:
    """Keeps what is acknowledged on ``kv-decisions``."""

    def __init__(self) -> None:
        self.sent: list[records.DecisionRecord] = []
        self.refuses = False

    async def send(self, topic: str, value: bytes, *, key: bytes, partition: int) -> asyncio.Future[Any]:
        record = records.decode(records.DecisionRecord, value)
        assert (topic, key, partition) == ("decisions", record.pod.encode(), pod_partition(record.pod, 4))
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.refuses:
            done.set_exception(KafkaTimeoutError())
        else:
            self.sent.append(record)
            done.set_result(None)
        return done

    def taken(self) -> dict[str, dict[str, int]]:
        """Return pod -> its sessions, of the records since the last call."""
        found = {record.pod: record.sessions for record in self.sent}
        assert len(found) == len(self.sent)
        self.sent.clear()
        return found


@pytest.fixture
def topic() -> Topic:
    return Topic()


@pytest.fixture
def publisher(topic: Topic) -> SessionPublisher:
    return SessionPublisher(lambda: topic, ("decisions", 4), worker="w", clock=lambda: NOW)


async def test_one_record_a_pod_says_which_sessions_it_was_seen_with(topic: Topic, publisher: SessionPublisher) -> None:
    """Each session once, where it was last; nothing is sent when there is nothing to say."""
    await publisher.flush()
    publisher.offer({A: Sighting("p", NOW - 2), B: Sighting("p", NOW - 3)})
    publisher.offer({A: Sighting("q", NOW - 1)})
    await publisher.flush()
    (other, record) = sorted(topic.sent, key=lambda one: one.pod)
    assert (record.kind, record.request_id, record.scorer, record.decided_ns) == ("sessions", "", "w", NOW - 1)
    assert (other.sessions, record.sessions) == ({B: NOW - 3}, {A: NOW - 1})
    topic.sent.clear()
    await publisher.flush()
    assert not topic.sent


async def test_what_was_told_is_told_again_when_it_changes_or_after_a_minute(
    topic: Topic, publisher: SessionPublisher
) -> None:
    """A session that stays costs a record a minute; one that moves is told at the next turn."""
    base = NOW - 300 * SECOND
    for seconds, pod, told in [(0, "p", True), (59, "p", False), (60, "p", True), (61, "q", True), (62, "q", False)]:
        publisher.offer({A: Sighting(pod, base + seconds * SECOND)})
        await publisher.flush()
        assert topic.taken() == ({pod: {A: base + seconds * SECOND}} if told else {})


async def test_a_session_that_came_back_within_a_turn_is_no_news(topic: Topic, publisher: SessionPublisher) -> None:
    publisher.offer({A: Sighting("p", NOW - 30)})
    await publisher.flush()
    topic.taken()
    publisher.offer({A: Sighting("q", NOW - 20)})
    publisher.offer({A: Sighting("p", NOW - 10)})
    await publisher.flush()
    assert topic.taken() == {}


async def test_what_is_old_or_older_than_what_is_known_is_not_told(topic: Topic, publisher: SessionPublisher) -> None:
    """A log that is read again tells nothing, and a partition that is behind does not take a session back."""
    publisher.offer({B: Sighting("p", NOW - 601 * SECOND)})
    publisher.offer({A: Sighting("p", NOW - 10)})
    publisher.offer({A: Sighting("q", NOW - 20)})
    await publisher.flush()
    assert topic.taken() == {"p": {A: NOW - 10}}
    publisher.offer({A: Sighting("q", NOW - 15)})
    await publisher.flush()
    assert topic.taken() == {}


async def test_a_turn_is_bounded_and_so_is_what_waits(topic: Topic, publisher: SessionPublisher) -> None:
    """5,000 sessions a turn, the rest later, 100,000 in all: the oldest go first."""
    publisher.offer({f"{number:016x}": Sighting(f"pod-{number % 3}", NOW - 1) for number in range(100_007)})
    assert len(publisher) == 100_000
    await publisher.flush()
    told = topic.taken()
    assert Counter(len(sessions) for sessions in told.values()).total() == 3
    assert sum(map(len, told.values())) == 5_000
    assert f"{6:016x}" not in told["pod-0"]
    assert f"{7:016x}" in told["pod-1"]
    assert len(publisher) == 95_000


async def test_what_was_not_acknowledged_waits_unless_it_is_overtaken(
    topic: Topic, publisher: SessionPublisher
) -> None:
    publisher.offer({A: Sighting("p", NOW - 30), B: Sighting("p", NOW - 30)})
    topic.refuses = True
    with pytest.raises(KafkaTimeoutError):
        await publisher.flush()
    publisher.offer({A: Sighting("q", NOW - 10)})
    topic.refuses = False
    await publisher.flush()
    assert topic.taken() == {"p": {B: NOW - 30}, "q": {A: NOW - 10}}
