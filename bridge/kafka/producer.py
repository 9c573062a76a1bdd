"""Records to Kafka: per partition in order, at least once, in batches, within bounded memory.

One request per broker is in flight, with a batch of every partition that has something; what arrives meanwhile makes
the next one. So batches grow with the load by themselves, and a record waits for one request at most before its own.
The idempotent producer repeats a batch until the broker has it; when the producer itself fails, it is replaced and the
batch sent again, so nothing that was accepted is dropped (readers drop repetitions by sequence).

But for what no repetition brings in: a record that is larger alone than its topic's ``max.message.bytes``. It is taken
out, so that it does not hold up its partition for ever, and who sent it is told (:attr:`QueuedRecord.refused`). A batch
of several that is too large is sent in smaller ones, from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, ProducerClosed, RecordListTooLargeError

from kvatlas.bridge.errors import KvatlasError, LogError
from kvatlas.bridge.kafka.config import client_config, pace_metadata
from kvatlas.bridge.kafka.fetching import metadata_error, metadata_task, sender_task, start_client
from kvatlas.bridge.kafka.rights import lost_right
from kvatlas.bridge.model.sink import QueuedRecord
from kvatlas.bridge.runtime.histogram import Buckets
from kvatlas.bridge.runtime.settings import KafkaSettings

_CLIENT_ID: Final = "kvatlas-bridge"
_BATCH_BYTES: Final = 1024 * 1024
_RETRY_SECONDS: Final = 0.5
#: A right that is taken away and given back at once, as a tool that writes all of them anew does, ends nothing.
_RIGHT_TRIES: Final = 6
_WAIT_SECONDS: Final = 0.05
_OVERHEAD_BYTES: Final = 256

log = logging.getLogger(__name__)


class SendWindow:
    """Lets the batches for one broker go together: open while no request is in flight, and ``pause_seconds`` long shut.

    The client sends one request at a time to a broker. A batch that is closed while another request is in flight waits
    for it in vain; here it stays open until it can go.
    """

    def __init__(self, pause_seconds: float) -> None:
        """Start open."""
        self._pause = pause_seconds
        self._open = asyncio.Event()
        self._open.set()
        self._flying = 0
        self._began = 0.0

    def pause(self, seconds: float) -> None:
        """Change the pause, from now on; none opens a gate that only waits."""
        self._pause = seconds
        if not seconds and not self._flying:
            self._open.set()

    async def __aenter__(self) -> None:
        """Wait until the next batches go."""
        await self._open.wait()
        if not self._flying:
            self._began = time.monotonic()
        self._flying += 1
        self._open.clear()

    async def __aexit__(self, *_: object) -> None:
        """Open when all that went together have come back, and no sooner than the pause says."""
        self._flying -= 1
        if not self._flying:
            left = self._began + self._pause - time.monotonic()
            if left > 0:
                asyncio.get_running_loop().call_later(left, self._reopen)
            else:
                self._open.set()

    def _reopen(self) -> None:
        if not self._flying:  # a flush may have opened it before
            self._open.set()


class RecordProducer:
    """Sends records to one cluster: the record sink of a bridge.

    Attributes:
        pending_bytes: bytes accepted and not acknowledged.
        sent: records acknowledged.
        sent_bytes: size of their batches on the log, compressed.
        failures: batches that had to be sent again by us.
        refused: records taken out because they are too large for their topic.
        latency: how long batches took from send to acknowledgement, each record counted.
        failed: gets a :class:`RightsError` once Kafka keeps on refusing a topic to the account, or what ended a task.
        may_send: whether records may go out now; what is accepted meanwhile waits.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        compression: str = "zstd",
        linger_seconds: float = 0.002,
        message_bytes: int = 32 * 1024 * 1024,
        buffer_bytes: int = 256 * 1024 * 1024,
    ) -> None:
        """Describe the publisher; :meth:`start` connects."""
        self._settings = settings
        self._compression = None if compression == "none" else compression
        self._linger = linger_seconds
        self._message_bytes = message_bytes
        self._buffer_bytes = buffer_bytes
        self._producer: Any = None
        self._queues: dict[tuple[str, int], deque[QueuedRecord]] = {}
        self._flying: dict[tuple[str, int], int] = {}
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._wake: dict[tuple[str, int], asyncio.Event] = {}
        self._limits: dict[tuple[str, int], asyncio.Timeout] = {}  # of what is with the producer
        self._most: dict[tuple[str, int], int] = {}  # bytes that a batch may hold, once larger ones were refused
        self._gates: dict[int | None, SendWindow] = {}
        self._replacing = asyncio.Lock()
        self.pending_bytes = 0
        self.sent = 0
        self.sent_bytes = 0
        self.failures = 0
        self.refused = 0
        self.latency = Buckets()
        self.failed: asyncio.Future[None] | None = None
        self.may_send: Callable[[], bool] = lambda: True

    async def start(self) -> None:
        """Connect.

        Raises:
            LogError: no broker answers.
        """
        self.failed = asyncio.get_running_loop().create_future()
        self._producer = await self._connect()

    async def _connect(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **client_config(self._settings, _CLIENT_ID),
            enable_idempotence=True,
            acks="all",
            compression_type=self._compression,
            max_batch_size=_BATCH_BYTES,
            max_request_size=self._message_bytes + 1024 * 1024,
            retry_backoff_ms=100,
        )
        pace_metadata(producer.client)
        started = False
        try:
            await start_client(producer)
        except KafkaError as error:
            raise LogError(f"cannot reach Kafka at {self._settings.brokers}: {error}") from error
        else:
            started = True
            metadata_task(producer).add_done_callback(lambda task: self._fail(metadata_error(task)))
        finally:
            if not started:  # whatever ended it, a cancelled task too
                await _close(producer, 1.0)
        return producer

    async def partitions(self, topic: str) -> int:
        """Return how many partitions a topic has."""
        assert self._producer is not None
        return len(await self._producer.partitions_for(self._settings.topic(topic)))

    def room(self, _key: bytes) -> bool:
        """Whether the buffer takes more."""
        return self.pending_bytes < self._buffer_bytes

    def send(self, topic: str, partition: int, item: QueuedRecord) -> None:
        """Accept a record; it goes out after those accepted before it for this partition."""
        place = (self._settings.topic(topic), partition)
        queue = self._queues.get(place)
        if queue is None:
            queue = self._queues[place] = deque()
            self._wake[place] = asyncio.Event()
            task = self._tasks[place] = asyncio.create_task(self._run(place), name=f"publish-{place[0]}-{partition}")
            task.add_done_callback(self._ended)
        queue.append(item)
        self.pending_bytes += len(item.value) + _OVERHEAD_BYTES
        self._wake[place].set()

    def discard(self, topic: str, partition: int) -> None:
        """Forget what is accepted for a partition and not on its way yet."""
        place = (self._settings.topic(topic), partition)
        queue, flying = self._queues.get(place, deque()), self._flying.get(place, 0)
        while len(queue) > flying:
            self.pending_bytes -= len(queue.pop().value) + _OVERHEAD_BYTES

    def _withdraw(self, queue: deque[QueuedRecord], key: bytes) -> list[QueuedRecord] | None:
        """Take back a key's records that have an origin, up to the first one without; None when one ends them.

        Nothing of the partition may be on its way.
        """
        kept, taken, ended = list[QueuedRecord](), list[QueuedRecord](), False
        for item in queue:
            ended = ended or (item.key == key and item.origin is None)
            (kept if ended or item.key != key else taken).append(item)
        queue.clear()
        queue.extend(kept)
        self.pending_bytes -= sum(len(item.value) + _OVERHEAD_BYTES for item in taken)
        return None if ended else taken

    async def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything is acknowledged, sent without pauses; False when the time is over first."""
        deadline = time.monotonic() + timeout_seconds
        while self.pending_bytes and time.monotonic() < deadline:
            for gate in self._gates.values():
                gate.pause(0.0)
            await asyncio.sleep(0.01)
        for gate in self._gates.values():
            gate.pause(self._linger)
        return not self.pending_bytes

    async def stop(self) -> None:
        """Stop; what was not acknowledged is for replay."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        producer, self._producer = self._producer, None
        if producer is not None:
            await _close(producer, 2.0)

    async def _run(self, place: tuple[str, int]) -> None:
        queue, wake = self._queues[place], self._wake[place]
        while True:
            if not queue:
                wake.clear()
                await wake.wait()
            await self._send_head(place, queue)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """End the service with what ended a partition's task: nothing would be sent for it any more."""
        self._fail(None if task.cancelled() else task.exception())

    def _fail(self, error: BaseException | None) -> None:
        if error is not None and self.failed is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _send_head(self, place: tuple[str, int], queue: deque[QueuedRecord]) -> None:
        tries = 0
        while True:
            while self._replacing.locked() or not self.may_send():  # noqa: ASYNC110 - a lease ends by the clock
                await asyncio.sleep(_WAIT_SECONDS)
            producer = self._producer
            assert producer is not None
            try:
                async with self._gate(producer, place), asyncio.timeout(None) as limit:
                    if not queue:
                        return  # discarded
                    if self._replacing.locked() or producer is not self._producer:
                        continue
                    self._limits[place] = limit
                    started = time.monotonic()
                    batch, count = self._build(producer, queue, self._most.get(place, self._message_bytes))
                    self._flying[place] = count
                    future = await producer.send_batch(batch, place[0], partition=place[1])
                    base: Any = await future
                break
            except (MessageSizeTooLargeError, RecordListTooLargeError) as error:
                self._flying[place] = 0
                self._limits.pop(place, None)
                self._too_large(place, queue, count, error)
                await self._replace(producer)  # the sequences of the refused batch are used up
            except (KafkaError, TimeoutError) as error:
                self._flying[place] = 0
                self._limits.pop(place, None)
                self.failures += 1
                log.warning("Kafka did not take a batch for %s/%d (%s); sending it again", *place, error)
                tries += 1
                self._note_refusal(error, tries)
                await asyncio.sleep(_RETRY_SECONDS)
                if not getattr(error, "retriable", False):
                    await self._replace(producer)
        self._limits.pop(place, None)
        self._flying[place] = 0
        self.latency.add(time.monotonic() - started, count)
        for number in range(count):
            item = queue.popleft()
            self.pending_bytes -= len(item.value) + _OVERHEAD_BYTES
            if item.acknowledged is not None:
                item.acknowledged(item, base.offset + number)
        self.sent += count
        self.sent_bytes += batch.size()

    def _too_large(self, place: tuple[str, int], queue: deque[QueuedRecord], count: int, error: KafkaError) -> None:
        """Make the next batch smaller, or take out the record that is too large alone."""
        if count > 1:
            self._most[place] = sum(len(item.value) + _OVERHEAD_BYTES for item in islice(queue, count)) // 2
            log.warning("%s/%d: a batch of %d records is too large for the topic; sending smaller ones", *place, count)
            return
        item = queue.popleft()
        self.pending_bytes -= len(item.value) + _OVERHEAD_BYTES
        self.refused += 1
        reason = f"{len(item.value)} bytes are too large for topic {place[0]} ({error}): raise its max.message.bytes"
        log.error("%s/%d: a record of %r left out: %s", *place, item.key, reason)
        if item.refused is not None:
            item.refused(item, reason, None if item.origin is None else self._withdraw(queue, item.key))

    def _gate(self, producer: Any, place: tuple[str, int]) -> SendWindow:
        leader: int | None = producer.client.cluster.leader_for_partition(TopicPartition(*place))
        gate = self._gates.get(leader)
        if gate is None:
            gate = self._gates[leader] = SendWindow(self._linger)
        return gate

    def _note_refusal(self, error: BaseException, tries: int) -> None:
        self._fail(lost_right(error, self._settings) if tries >= _RIGHT_TRIES else None)

    @staticmethod
    def _build(producer: AIOKafkaProducer, queue: deque[QueuedRecord], most_bytes: int) -> tuple[Any, int]:
        batch = producer.create_batch()
        count = size = 0
        now = int(time.time() * 1000)
        for item in queue:
            size += len(item.value) + _OVERHEAD_BYTES
            if count and size > most_bytes:
                break
            if batch.append(key=item.key, value=item.value, timestamp=now, headers=item.headers) is None:
                break
            count += 1
        batch.close()
        return batch, count

    async def _replace(self, failed: Any) -> None:
        async with self._replacing:
            if self._producer is not failed:
                return
            await _close(failed, 1.0)
            # A producer that is closed never answers who still waits for it to know the topic.
            for limit in self._limits.values():
                limit.reschedule(0.0)
            self._limits.clear()
            while True:
                try:
                    self._producer = await self._connect()
                except KvatlasError as error:  # a password file that is being replaced, too
                    log.warning("%s; trying again", error)
                    await asyncio.sleep(_RETRY_SECONDS)
                else:
                    return


async def _close(producer: Any, seconds: float) -> None:
    """Close a producer and its connections, whether or not a broker is there."""
    try:
        # Called here, not in a task of its own: a task that is cancelled before it begins would close nothing.
        async with asyncio.timeout(seconds):
            await producer.stop()
    except Exception:  # noqa: BLE001 # closing also raises what ended one of its tasks, which was told
        # It waits for what it still holds to be sent; that is in our queues too.
        sender = sender_task(producer)
        if sender is not None:
            sender.cancel()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(producer.client.close(), seconds)
        if sender is not None:
            await asyncio.wait([sender], timeout=seconds)
        # Nobody sends these any more, and whoever waits for them would wait for ever.
        producer._message_accumulator.fail_all(ProducerClosed())
