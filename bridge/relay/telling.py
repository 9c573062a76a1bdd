"""What tells the index of holders that are no engines: cache servers and pools, as pods of their own without tokens.

A bridge tells of the holders whose partition it owns: at first all that is held, in a new epoch, then every change. So
a restart and a takeover are the same, and no position is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from kvatlas.bridge.ingest.recovered import Recovered, apply_control
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.model import epochs, pod_ids, records, topics
from kvatlas.bridge.model.chunk_cache import ChunkHolder
from kvatlas.bridge.model.records import Control, KeyedBatch, PodRecord
from kvatlas.bridge.model.sink import QueuedRecord

_MESSAGE_BYTES: Final = 256 * 1024

log = logging.getLogger(__name__)


class _Told:
    """The stream of one holder on ``kv-events``, as far as this bridge writes it."""

    def __init__(self, record: PodRecord) -> None:
        self.record = record
        self.sequence = -1
        self.described = False

    @property
    def incarnation(self) -> int:
        return epochs.incarnation_of(self.record.epoch)


class HolderTeller:
    """Tells of one source's holders."""

    def __init__(self, shared: Shared, engine: str, source: str) -> None:
        """Tell nothing yet.

        Args:
            shared: where to.
            engine: what the holders are, in records and headers.
            source: where their events come from, for people.
        """
        self._shared = shared
        self._engine = engine
        self._source = source
        self._told: dict[str, _Told] = {}
        self._fixed: topics.Headers = [(topics.H_ENGINE, engine.encode()), (topics.H_ANNOUNCEMENTS, b"presence")]

    def lost(self, partitions: Sequence[int]) -> None:
        """Tell nothing more of the pods of some partitions; they are told anew once they are ours again."""
        for pod in list(self._told):
            if self._shared.partition(pod) in partitions:
                del self._told[pod]

    def forget(self, why: str, *pods: str) -> None:
        """Take note that what was told, of these pods or of all, is not true any more: it is told anew."""
        for pod in pods or tuple(self._told):
            if (told := self._told.pop(pod, None)) is not None:
                log.warning("%s: %s; told anew", pod, why)
                self._shared.recovered[pod] = Recovered(told.record)

    async def tell(
        self, pod: str, holder: ChunkHolder, serves: Sequence[str], endpoint: str, facts: Mapping[str, Any]
    ) -> None:
        """Tell what changed of one holder, where this bridge owns its pod.

        Args:
            pod: the holder's pod id.
            holder: what it holds.
            serves: the pods that load from it.
            endpoint: where its events come from.
            facts: further fields of its record.
        """
        shared = self._shared
        told = self._told.get(pod)
        if not shared.owned(pod):
            return
        if told is None:
            told = self._told[pod] = self._take_over(pod, endpoint)
            holder.restate()
        if told.described and not holder.changed and list(told.record.serves) == list(serves):
            return
        if holder.gap:
            behind = holder.split()
            done = await self._send(told, holder)
            if done:
                incarnation = shared.next_incarnation(told.incarnation)
                self._control(told, Control(type="gap", incarnation=incarnation, reason=f"{self._source} lost events"))
            holder.join(behind, told=done)
            if not done:
                return
        if not await self._send(told, holder):
            return
        changes = {"serves": list(serves), "state": records.LIVE, "receive_ns": shared.now_ns()} | dict(facts)
        told.record = msgspec.structs.replace(told.record, last_sequence=told.sequence, **changes)
        told.described = True
        shared.put_record(told.record)

    def _take_over(self, pod: str, endpoint: str) -> _Told:
        shared = self._shared
        known = shared.recovered.pop(pod, None)
        record = known.record if known is not None else PodRecord(pod=pod, writer=pod_ids.WRITER_BRIDGE)
        kind = "restart" if record.epoch else "start"
        told = _Told(msgspec.structs.replace(record, engine=self._engine, endpoint=endpoint))
        incarnation = shared.next_incarnation(epochs.incarnation_of(record.epoch))
        self._control(told, Control(type=kind, incarnation=incarnation, reason=f"told anew from {self._source}"))
        log.info("%s: told anew from %s", pod, self._source)
        return told

    async def _send(self, told: _Told, holder: ChunkHolder) -> bool:
        """Tell what changed; False when there is no room for all of it, or the pod was given away meanwhile."""
        changes = holder.changes(_MESSAGE_BYTES)
        key = told.record.pod.encode()
        while self._shared.sink.room(key) and self._told.get(told.record.pod) is told:
            events = next(changes, None)
            if events is None:
                return True
            self._message(told, KeyedBatch(timestamp=self._shared.now_ns() / 1e9, events=list(events)))
            await asyncio.sleep(0)  # a large cache must not hold up the engines
        return False

    def _message(self, told: _Told, batch: KeyedBatch) -> None:
        shared = self._shared
        told.sequence += 1
        headers = [
            (topics.H_CONTENT_TYPE, topics.CONTENT_KEYS.encode()),
            (topics.H_SEQUENCE, b"%d" % told.sequence),
            (topics.H_RECEIVE_NS, b"%d" % shared.now_ns()),
            (topics.H_INCARNATION, b"%d" % told.incarnation),
            *self._fixed,
        ]
        pod = told.record.pod
        item = QueuedRecord(pod.encode(), records.encode(batch), headers)
        shared.sink.send(topics.EVENTS, shared.partition(pod), item)

    def _control(self, told: _Told, control: Control) -> None:
        told.record = apply_control(told.record, control)
        self._shared.put_control(told.record.pod, control, self._fixed, None)
