"""Reading the source topics: where reading begins, and reading again what was lost on its way to a task.

Between the brokers and an agent, Faust may drop records that the consumer has already moved past: a rebalance empties
the streams' queues, and cuts off the delivery in progress. What an agent has not seen is then never read again. So
nothing here trusts the consumer's position: it is set to what the tables reflect after every restore, a task that
sees a gap has it read again, and a :class:`Watchdog` does the same when nothing comes although there is something.

Faust carries what one fetch brought for a topic as one message, a :class:`FetchedRecords`: two tasks, an event and an
acknowledgement a record are most of what a worker would do otherwise, and its turns of the event loop most of the
time that a record is on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, NamedTuple

from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from kvatlas.bridge.kafka.fetching import fetch_wait_ms, fetcher_task, metadata_task

logger = logging.getLogger(__name__)

_WATCH_SECONDS: Final = 1.0
_STUCK_SECONDS: Final = 5.0
#: Streams that have enough leave records with the client, and their partitions out of the next fetch.
_WAIT_MS: Final = 50
#: An offset that no topic reaches.
_BEHIND_ALL: Final = 1 << 62


class FetchedRecords(ConsumerMessage):
    """What one fetch brought for a topic.

    It stands in its first partition behind all that Faust has delivered there: what is before that, Faust would drop
    as delivered, when records are read again. Tasks drop what they have.

    Attributes:
        records: partition -> what aiokafka read, in order of their offsets.
    """

    records: Mapping[int, Sequence[Any]]

    def __init__(self, topic: str, records: Mapping[int, Sequence[Any]], generation_id: int) -> None:
        partition, found = next(iter(records.items()))
        last = found[-1]
        super().__init__(
            topic,
            partition,
            _BEHIND_ALL,
            last.timestamp / 1000,
            last.timestamp_type,
            [],
            None,
            None,
            None,
            tp=TP(topic, partition),
            generation_id=generation_id,
        )
        self.records = records


class _Fetched(NamedTuple):
    """What a fetch brought, and the group's generation that it was made in: in another one it is nobody's."""

    records: Mapping[Any, Sequence[Any]]
    generation: int


class SourceConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread with a fetch wait of ours: Faust's is fixed at 1.5 s.

    Changelogs, which are assigned with the sources, are not fetched at all: aiokafka holds all fetches back while one
    partition's records are not taken.
    """

    app: Any
    _wait_ms: int

    def _create_worker_consumer(self, transport: Any) -> Any:
        self._made = consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = self._wait_ms
        return consumer

    async def on_start(self) -> None:
        """Start the consumer, and have each heartbeat that the group accepts renew the lease."""
        self._wait_ms = await fetch_wait_ms(self.app.kafka, _WAIT_MS)
        await super().on_start()
        self.app.lease.renew_with_heartbeats(self._made)
        for task in (fetcher_task(self._made), metadata_task(self._made)):
            task.add_done_callback(self._ended)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Leave changelogs alone from the first, and tell of the assignment."""
        self._made.pause(*(TopicPartition(*tp) for tp in assigned if tp.topic not in self.app.sources))
        await super().on_partitions_assigned(assigned, generation_id)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.app.on_failed(error)  # the consumer itself only has nothing new any more

    def rewind(self, tp: TP, offset: int) -> None:
        """Read a partition from ``offset`` on, soon; no effect when it is not assigned any more."""
        self.thread_loop.call_soon_threadsafe(self._rewind, tp, offset)

    def _rewind(self, tp: TP, offset: int) -> None:
        try:
            self.seek(tp, offset)
        except IllegalStateError:
            logger.debug("%s/%d: not read again from %d, it is not ours any more", tp.topic, tp.partition, offset)


class SourceConsumer(driver.Consumer):
    """Faust's consumer, which starts where the tables end.

    What the table reflects is stored in it, so that is the position; the group's committed offset is only a hint
    that may be behind (a crash before the commit) or ahead (the table's state was lost and is to be rebuilt). It is
    what tasks have committed: Faust acknowledges nothing of the source topics.
    """

    app: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._done: dict[TP, int] = {}
        self._ahead: asyncio.Future[_Fetched] | None = None

    def _new_consumer_thread(self) -> Any:
        self._reading = SourceConsumerThread(self, loop=self.loop, beacon=self.beacon)
        return self._reading

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        """Yield what is there: a :class:`FetchedRecords` for each source topic; changelogs are not read here."""
        ahead, self._ahead = self._ahead or self._ask(timeout), None
        found, generation = await ahead
        if self.should_stop:
            return
        if not self._current(generation):
            with contextlib.suppress(IllegalStateError, TimeoutError):  # then the next rebalance is under way
                await self.perform_seek()  # the consumer has moved past what is not handed over
            return
        self._ahead = self._ask(timeout)  # the next fetch is under way while this one is handed over
        sources: dict[str, dict[int, Sequence[Any]]] = {}
        for at, fetched in found.items():
            # Faust may have taken a partition out of those it wants meanwhile, as its stream has enough.
            if fetched and at.topic in self.app.sources:
                sources.setdefault(at.topic, {})[at.partition] = fetched
        for topic, by_partition in sources.items():
            if not self._current(generation):
                return
            batch = FetchedRecords(topic, by_partition, generation)
            yield batch.tp, batch

    def _ask(self, timeout: float) -> asyncio.Future[_Fetched]:
        return asyncio.ensure_future(self._fetch(timeout))

    async def _fetch(self, timeout: float) -> _Fetched:
        if not self.flow_active:
            resumed: Any = self.can_resume_flow
            await self.wait(resumed)
        generation = self.app.consumer_generation_id
        found, _ = await self._wait_next_records(timeout)
        return _Fetched(found or {}, generation)

    async def on_stop(self) -> None:
        """Stop, with the fetch that is under way."""
        if self._ahead is not None:
            self._ahead.cancel()
            self._ahead = None
        await super().on_stop()

    def _current(self, generation: int) -> bool:
        """Tell whether what was fetched is still ours to deliver."""
        return bool(self.flow_active and self.app.consumer_generation_id == generation)

    def committed(self, tp: TP, offset: int) -> None:
        """Take note that a task has committed a source partition up to a record, and all before it."""
        self._done[tp] = offset + 1

    async def force_commit(
        self,
        topics: Any = None,  # noqa: ARG002
        start_new_transaction: bool = True,  # noqa: ARG002
    ) -> bool:
        """Commit to the group what tasks have committed."""
        done, self._done = self._done, {}
        ours = self.assignment()
        offsets = {tp: offset for tp, offset in done.items() if tp in ours}
        return bool(offsets) and bool(await self._reading.commit(offsets))

    async def perform_seek(self) -> None:
        """Seek to the tables' offsets instead of the group's."""
        await self.seek_to_tables()

    async def seek_to_tables(self) -> None:
        """Read every source partition from where its table ends, whatever the position is now."""
        wanted = dict(self.app.source_positions(self.assignment()))
        if wanted:
            await self.seek_wait(wanted)

    def rewind(self, tp: TP, offset: int) -> None:
        """Read a partition from ``offset`` on, soon."""
        self._reading.rewind(tp, offset)


class SourceTransport(driver.Transport):
    """Faust's aiokafka transport with :class:`SourceConsumer`."""

    Consumer: ClassVar[Any] = SourceConsumer


class IdleSource(NamedTuple):
    """A source partition whose task has nothing to do.

    Attributes:
        tp: the partition.
        wanted: offset of the record that the task waits for.
    """

    tp: TP
    wanted: int


class Watchdog:
    """Has a partition read again when its task waits for a record that the topic has.

    Args:
        waiting: yields the partitions whose tasks wait.
        end_of: topic, partition -> its end as seen last, None when unknown.
        rewind: reads a partition again from an offset.
        clock: monotonic, seconds.

    Attributes:
        rewinds: how often it had to.
    """

    def __init__(
        self,
        waiting: Callable[[], Iterator[IdleSource]],
        end_of: Callable[[str, int], int | None],
        rewind: Callable[[TP, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rewinds = 0
        self._waiting = waiting
        self._end_of = end_of
        self._rewind = rewind
        self._clock = clock
        self._since: Mapping[TP, tuple[int, float]] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            self.look()

    def look(self) -> None:
        """Look once."""
        now = self._clock()
        since: dict[TP, tuple[int, float]] = {}
        for tp, wanted in self._waiting():
            end = self._end_of(*tp)
            if end is None or end <= wanted:
                continue
            before, began = self._since.get(tp, (wanted, now))
            since[tp] = (wanted, began if before == wanted else now)
            if now - since[tp][1] >= _STUCK_SECONDS:
                since[tp] = (wanted, now)
                self.rewinds += 1
                logger.warning(
                    "%s/%d: waits for record %d although the topic ends at %d; read again from there",
                    tp.topic,
                    tp.partition,
                    wanted,
                    end,
                )
                self._rewind(tp, wanted)
        self._since = since
