"""Shared services of pod sessions: the record sink, limits, counters, and which endpoint has which pod."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.ingest.memory import HeldBytes
from kvatlas.bridge.ingest.messages import EngineMessage, StreamPosition
from kvatlas.bridge.ingest.recovered import Handover, Recovered, apply_control
from kvatlas.bridge.model import pod_ids, records, topics
from kvatlas.bridge.model.records import Control, PodRecord
from kvatlas.bridge.model.sink import Acknowledge, QueuedRecord, RecordSink
from kvatlas.bridge.options import BridgeSettings

_DLQ_BYTES: Final = 1024 * 1024
#: Live messages held while holes are repaired, over all pods; beyond it they are left to replay.
_HOLD_TOTAL_BYTES: Final = 512 * 1024 * 1024

log = logging.getLogger(__name__)


class PodHolder(Protocol):
    """An endpoint that has a pod, as others see it."""

    spec: EngineSpec
    leaving: bool

    def hand_over(self) -> Handover | None:
        """Give the pod away and wait for it; None when there is none."""

    def continue_without(self, message: EngineMessage, behind: list[QueuedRecord], reason: str) -> None:
        """Record a message as lost, and send what waited behind it under the epoch after that."""


class Shared:
    """Shared services and counters of pod sessions.

    Attributes:
        dead: messages that were dead-lettered, by reason.
        oversized: messages over the size limit.
        keyless: blocks forwarded without keys, where tokens are stripped.
        recovered: pods that the log knows and no endpoint has.
        claims: the endpoint that has a pod; one at most, so that no pod is on the log twice.
        conflicts: times that an endpoint was left out because another one has its pod.
        messages, bytes, events: forwarded.
        owns: whether a partition is this process's.
        observe: gets the receive time (ns) of each acknowledged message; for measuring.
    """

    def __init__(self, settings: BridgeSettings, sink: RecordSink, now_ns: Callable[[], int]) -> None:
        """Gather what the sessions need."""
        self.settings = settings
        self.sink = sink
        self.now_ns = now_ns
        self.recovered: dict[str, Recovered] = {}
        self.partitions = 1
        self.holding = HeldBytes(_HOLD_TOTAL_BYTES)
        self.owns: Callable[[int], bool] = lambda _: True
        self.dead: dict[str, int] = {}
        self.claims: dict[str, PodHolder] = {}
        self.oversized = self.keyless = self.conflicts = 0
        self.messages = self.bytes = self.events = self.acknowledged = 0
        self.observe: Callable[[int], None] | None = None

    def partition(self, pod: str) -> int:
        """Return the partition of a pod."""
        return pod_ids.pod_partition(pod, self.partitions)

    def take(self, pod: str, holder: PodHolder) -> Handover:
        """Give a pod to an endpoint; returns where it goes on: where another one stands, the log ends, or anew."""
        other = self.claims.get(pod)
        known = other.hand_over() if other is not None else None
        if known is None and (logged := self.recovered.pop(pod, None)) is not None:
            known = Handover(logged.record, logged.position(), logged.blocks)
        self.claims[pod] = holder
        return known or Handover(PodRecord(pod=pod, writer=pod_ids.WRITER_BRIDGE), StreamPosition(), None)

    def owned(self, pod: str) -> bool:
        """Whether a pod is this process's."""
        return self.owns(self.partition(pod))

    def dead_letter(self, pod: str, frames: list[bytes], reason: str, origin: str) -> None:
        """Put what cannot be tracked on the DLQ, cut to a bounded size."""
        label = reason.partition(":")[0]
        self.dead[label] = self.dead.get(label, 0) + 1
        log.warning("%s: %s", origin, reason)
        key = pod.encode()
        if not self.sink.room(key):
            return
        if self.settings.strip_tokens:
            frames = [b""]  # what cannot be read may hold tokens
        value = (
            frames[-1] if len(frames) == 3 else msgspec.msgpack.encode([frame[:_DLQ_BYTES] for frame in frames[:16]])
        )
        headers = [(topics.H_REASON, reason.encode()), (topics.H_ORIGIN, origin.encode())]
        item = QueuedRecord(key, value[:_DLQ_BYTES], headers, None, self._cut)
        self.sink.send(topics.DLQ, self.partition(pod), item)

    def _cut(self, item: QueuedRecord, _reason: str, _behind: object) -> None:
        """Keep less of what is too large even for the DLQ."""
        if item.value:
            less = item._replace(value=item.value[: len(item.value) // 4])
            self.sink.send(topics.DLQ, self.partition(item.key.decode()), less)

    def put_record(self, record: PodRecord) -> None:
        """Put a pod's record on ``kv-pods``."""
        value = records.encode(msgspec.structs.replace(record, updated_ns=self.now_ns()))
        key = pod_ids.pod_key(pod_ids.WRITER_BRIDGE, record.pod)
        self.sink.send(topics.PODS, self.partition(record.pod), QueuedRecord(key, value, []))

    def put_control(self, pod: str, control: Control, fixed: topics.Headers, acknowledged: Acknowledge | None) -> None:
        """Put a turn of a pod's stream on ``kv-events``, in order with its messages; ``fixed`` says whose it is."""
        headers = [
            (topics.H_CONTENT_TYPE, topics.CONTENT_CONTROL.encode()),
            (topics.H_INCARNATION, b"%d" % control.incarnation),
            (topics.H_RECEIVE_NS, b"%d" % self.now_ns()),
            *fixed,
        ]
        # A pod's end is made of nothing that could come again.
        origin = None if control.type == "gone" else control
        item = QueuedRecord(pod.encode(), records.encode(control), headers, acknowledged, None, origin)
        self.sink.send(topics.EVENTS, self.partition(pod), item)

    def put_gone(self, record: PodRecord, control: Control, fixed: topics.Headers) -> PodRecord:
        """Record that a pod is gone, on both topics; returns its record from then on."""
        final = msgspec.structs.replace(apply_control(record, control), load={}, load_ns=0)
        number = self.partition(record.pod)

        def acknowledged(_item: QueuedRecord, offset: int) -> None:
            self.put_record(msgspec.structs.replace(final, events_partition=number, events_offset=offset))

        self.put_control(record.pod, control, fixed, acknowledged)
        return final

    def next_incarnation(self, previous: int) -> int:
        """Return an incarnation above ``previous``; it follows the clock, so it grows even when the log is lost."""
        return max(previous + 1, self.now_ns() // 1_000_000_000)
