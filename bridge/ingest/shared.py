"""Shared services of a bridge's streams: producer, limits, counters, and which stream holds which pod."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
import zmq

from kvatlas.bridge.engines.subscriber import Connection, Receive, Subscriber
from kvatlas.bridge.ingest.recovered import Recovered, apply_control
from kvatlas.bridge.ingest.tracker import HeldBytes
from kvatlas.bridge.kafka.producer import Acknowledge, QueuedRecord, RecordProducer
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.records import Control, PodRecord
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.tasks import Background

if TYPE_CHECKING:
    from kvatlas.bridge.ingest.stream import PodStream

_DLQ_BYTES: Final = 1024 * 1024

log = logging.getLogger(__name__)


class Shared:
    """Shared services and counters of a bridge's streams.

    Attributes:
        dead: messages that were dead-lettered, by reason.
        oversized: messages over the size limit.
        keyless: blocks forwarded without keys, where tokens are stripped.
        recovered: pods that the log knows and no stream holds.
        claims: the stream that holds a pod; one at most, so that no pod is on the log twice.
        conflicts: times that an endpoint was left out because another one holds its pod.
        messages, bytes, events: forwarded.
        background: watches the streams' tasks: a stream without its replays repairs nothing any more.
    """

    def __init__(
        self,
        settings: BridgeSettings,
        publisher: RecordProducer,
        topic: Callable[[str], str],
        now_ns: Callable[[], int],
    ) -> None:
        """Gather what the streams need."""
        self.settings = settings
        self.publisher = publisher
        self.topic = topic
        self.now_ns = now_ns
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.background = Background()
        self.recovered: dict[str, Recovered] = {}
        self.partitions = 1
        self.replays = asyncio.Semaphore(settings.replay_parallel)
        self.silent_replays = asyncio.Semaphore(settings.replay_parallel)
        self.holding = HeldBytes(settings.hold_total_bytes)
        self.owns: Callable[[int], bool] = lambda _: True
        self.dead: dict[str, int] = {}
        self.oversized = 0
        self.keyless = 0
        self.conflicts = 0
        self.claims: dict[str, PodStream] = {}
        self.events = 0
        self.messages = 0
        self.acknowledged = 0
        self.observe: Callable[[int], None] | None = None
        self.bytes = 0

    def room(self) -> bool:
        """Whether the buffer for Kafka takes more."""
        return self.publisher.pending_bytes < self.settings.buffer_bytes

    def dead_letter(self, pod: str, frames: list[bytes], reason: str, origin: str) -> None:
        """Put what cannot be tracked on the DLQ, cut to a bounded size."""
        label = reason.partition(":")[0]
        self.dead[label] = self.dead.get(label, 0) + 1
        log.warning("%s: %s", origin, reason)
        if not self.room():
            return
        if self.settings.strip_tokens:
            frames = [b""]  # what cannot be read may hold tokens
        value = (
            frames[-1] if len(frames) == 3 else msgspec.msgpack.encode([frame[:_DLQ_BYTES] for frame in frames[:16]])
        )
        headers = [(topics.H_REASON, reason.encode()), (topics.H_ORIGIN, origin.encode())]
        number = pod_ids.pod_partition(pod, self.partitions)
        item = QueuedRecord(pod.encode(), value[:_DLQ_BYTES], headers, None, self._cut)
        self.publisher.send(self.topic(topics.DLQ), number, item)

    def _cut(self, item: QueuedRecord, _reason: str) -> None:
        """Keep less of what is too large even for the DLQ."""
        if item.value:
            number = pod_ids.pod_partition(item.key.decode(), self.partitions)
            self.publisher.send(self.topic(topics.DLQ), number, item._replace(value=item.value[: len(item.value) // 4]))

    def put_record(self, record: PodRecord) -> None:
        """Put a pod's record on ``kv-pods``."""
        value = records.encode(msgspec.structs.replace(record, updated_ns=self.now_ns()))
        key = pod_ids.pod_key(pod_ids.WRITER_BRIDGE, record.pod)
        number = pod_ids.pod_partition(record.pod, self.partitions)
        self.publisher.send(self.topic(topics.PODS), number, QueuedRecord(key, value, [], None))

    def put_control(self, pod: str, control: Control, fixed: topics.Headers, acknowledged: Acknowledge | None) -> None:
        """Put a turn of a pod's stream on ``kv-events``, in order with its messages; ``fixed`` says whose it is."""
        headers = [
            (topics.H_CONTENT_TYPE, topics.CONTENT_CONTROL.encode()),
            (topics.H_INCARNATION, b"%d" % control.incarnation),
            (topics.H_RECEIVE_NS, b"%d" % self.now_ns()),
            *fixed,
        ]
        number = pod_ids.pod_partition(pod, self.partitions)
        # A pod's end is made of nothing that could come again.
        origin = None if control.type == "gone" else control
        item = QueuedRecord(pod.encode(), records.encode(control), headers, acknowledged, None, origin)
        self.publisher.send(self.topic(topics.EVENTS), number, item)

    def put_gone(self, record: PodRecord, control: Control, fixed: topics.Headers) -> PodRecord:
        """Record that a pod is gone, on both topics; returns its record from then on."""
        final = apply_control(record, control)
        number = pod_ids.pod_partition(record.pod, self.partitions)

        def acknowledged(offset: int) -> None:
            self.put_record(msgspec.structs.replace(final, events_partition=number, events_offset=offset))

        self.put_control(record.pod, control, fixed, acknowledged)
        return final

    def next_incarnation(self, previous: int) -> int:
        """Return an incarnation above ``previous``; it follows the clock, so it grows even when the log is lost."""
        return max(previous + 1, self.now_ns() // 1_000_000_000)


def open_socket(
    shared: Shared,
    address: str,
    receive: Receive,
    *,
    reconnected: Callable[[], None] = lambda: None,
    connection: Connection | None = None,
) -> Subscriber:
    """Open a SUB socket as the settings say; with ``connection`` it binds.

    Raises:
        EngineError: the address cannot be used.
    """
    return Subscriber(
        shared.context,
        address,
        receive,
        reconnected=reconnected,
        connection=connection,
        topic_filter=shared.settings.topic_filter,
        hwm=shared.settings.receive_hwm,
        max_bytes=shared.settings.socket_message_bytes,
    )
