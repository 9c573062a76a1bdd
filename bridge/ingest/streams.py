"""Engine streams: the endpoints of a process, from what is listed to records in a sink.

A bridge runs them with Kafka as the sink, an indexer with the index in its own process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

import msgspec

from kvatlas.bridge.engines.spec import EngineSpec
from kvatlas.bridge.engines.wires import Wires
from kvatlas.bridge.errors import EngineError
from kvatlas.bridge.ingest.endpoint import EngineEndpoint
from kvatlas.bridge.ingest.inbound import Inbound
from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.model import epochs, records, topics
from kvatlas.bridge.model.records import Control
from kvatlas.bridge.model.sink import RecordSink
from kvatlas.bridge.options import BridgeSettings
from kvatlas.bridge.runtime.tasks import Background

#: How often :meth:`EngineStreams.tick` is to be called.
TICK_SECONDS: Final = 0.25
_UNLISTED: Final = "not listed by discovery since this bridge has the pod"
#: How often changed pod records are written; what is urgent goes at once.
RECORD_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


class EngineStreams:
    """All endpoints of a process.

    Attributes:
        endpoints: by address; one that is listed otherwise than before is kept under another name until its pod left.
        shared: what the sessions of their pods use.
        wires: their sockets, closed by who has closed the endpoints.
    """

    def __init__(
        self, settings: BridgeSettings, sink: RecordSink, now_ns: Callable[[], int], background: Background
    ) -> None:
        """Open nothing yet; ``now_ns`` is the wall clock, ``background`` watches the replays."""
        self.endpoints: dict[str, EngineEndpoint] = {}
        self.shared = Shared(settings, sink, now_ns)
        self._settings = settings
        self.wires = Wires(settings)
        self._background = background
        self._absent: dict[str, float] = {}  # recovered pods that no endpoint has taken, since when
        self._inbound: list[Inbound] = []
        self._missing: dict[str, float] = {}  # endpoints listed no longer, since when
        self._replaced = 0
        self._written = 0.0

    # --- endpoints ------------------------------------------------------------------------------------------------

    def open(self, spec: EngineSpec) -> EngineEndpoint:
        """Begin to hear an endpoint.

        Raises:
            EngineError: the address cannot be used.
        """
        found = self.endpoints[spec.key] = EngineEndpoint(spec, self.shared, self.wires, self._background)
        return found

    def bind(self, texts: Iterable[str]) -> None:
        """Hear engines that connect here.

        Raises:
            EngineError: an address cannot be bound.
        """
        for text in texts:
            self._inbound.append(Inbound(text, self.shared, self.wires, self.open))

    @property
    def bound(self) -> list[str]:
        """Addresses where engines connect."""
        return [inbound.address for inbound in self._inbound]

    async def sync(self, specs: Iterable[EngineSpec]) -> None:
        """Hear what is listed; an endpoint that is not leaves, and is gone after the limit."""
        wanted = {spec.key: spec for spec in specs}
        for key, spec in wanted.items():
            self._missing.pop(key, None)
            if key in self.endpoints and self.endpoints[key].spec != spec:
                await self._replace(key)
            if key not in self.endpoints:
                try:
                    self.open(spec)
                except EngineError as error:
                    log.error("%s; left out", error)
        for key, endpoint in self.endpoints.items():
            if endpoint.spec.bound:
                continue
            endpoint.leaving = key not in wanted
            if endpoint.leaving:
                self._missing.setdefault(key, time.monotonic())

    async def _replace(self, key: str) -> None:
        """Stop hearing an address of which other things are said now; the next endpoint there may take its pod.

        A pod that the next one does not take, since another one has the address now, ends like one that is not listed.
        """
        old = self.endpoints.pop(key)
        log.info("%s: listed otherwise than before; connecting anew", key)
        await old.close()
        self._replaced += 1
        self.endpoints[f"{key} (before change {self._replaced})"] = old

    def seconds_to_next_end(self) -> float:
        """Return when the next endpoint that is not listed is gone."""
        return min(self._missing.values(), default=math.inf) + self._settings.gone_seconds - time.monotonic()

    async def end_missing(self) -> None:
        """End what has not been listed for too long."""
        for key, since in list(self._missing.items()):
            if time.monotonic() - since >= self._settings.gone_seconds:
                del self._missing[key]
                await self.end(key)

    async def end(self, key: str) -> None:
        """Stop hearing a pod and record that it is gone, also when the service is stopped meanwhile."""
        endpoint = self.endpoints.pop(key)
        try:
            await endpoint.close()
        finally:
            endpoint.end()

    async def close(self) -> None:
        """Stop hearing; what was accepted still goes out."""
        for inbound in self._inbound:
            inbound.close()
        await asyncio.gather(*(endpoint.close() for endpoint in self.endpoints.values()))

    # --- pods -----------------------------------------------------------------------------------------------------

    def adopt(self, pods: Mapping[str, Recovered]) -> None:
        """Go on with pods as they were left."""
        self.shared.recovered.update(pods)
        for known in pods.values():
            if known.ahead:  # the next start need not read so far back
                self.shared.put_record(known.record)
                known.ahead = False

    def release(self, partitions: Collection[int]) -> None:
        """Give away the pods of some partitions; their endpoints wait from then on."""
        shared = self.shared
        for endpoint in self.endpoints.values():
            if endpoint.session is not None and shared.partition(endpoint.pod) in partitions:
                endpoint.session.write_record()
                endpoint.hand_over()
        for pod in [pod for pod in shared.recovered if shared.partition(pod) in partitions]:
            del shared.recovered[pod]

    def write_records(self) -> None:
        """Write the record of every pod."""
        for endpoint in self.endpoints.values():
            if endpoint.session is not None:
                endpoint.session.write_record()

    def expire(self, now_seconds: float) -> None:
        """Mark recovered pods stale, then gone, by how long no endpoint has taken them; by a monotonic clock.

        A bridge that shares pods through a group is the only one that has them, so a pod that is not listed is gone.
        One that takes every pod cannot know whether another bridge lists it, so it only says that it is stale.
        """
        shared, settings = self.shared, self._settings
        self._absent = {pod: since for pod, since in self._absent.items() if pod in shared.recovered}
        for pod, known in list(shared.recovered.items()):
            record = known.record
            if record.state == records.GONE or not shared.owned(pod):
                continue
            silent = now_seconds - self._absent.setdefault(pod, now_seconds)
            unlisted = record.endpoint not in self.endpoints and silent >= settings.gone_seconds
            if unlisted and settings.ownership == "group":
                log.info("pod %s at %s: %s", pod, record.endpoint, _UNLISTED)
                incarnation = shared.next_incarnation(epochs.incarnation_of(record.epoch))
                control = Control(type="gone", incarnation=incarnation, reason=_UNLISTED)
                fixed = [(topics.H_ENGINE, record.engine.encode()), (topics.H_MODEL, record.model.encode())]
                shared.recovered[pod] = Recovered(shared.put_gone(record, control, fixed))
            elif (unlisted or silent >= settings.stale_seconds) and record.state != records.STALE:
                known.record = msgspec.structs.replace(record, state=records.STALE)
                shared.put_record(known.record)

    async def tick(self, *, complete: bool) -> None:
        """Do what is due: waiting pods, states, signs of life, records; every :data:`TICK_SECONDS`.

        Args:
            complete: whether all that is listed is known, so that a pod without an endpoint has left.
        """
        settings, now, seconds = self._settings, self.shared.now_ns(), time.monotonic()
        due = seconds - self._written >= RECORD_SECONDS
        if due:
            self._written = seconds
            if complete:
                self.expire(seconds)
        for inbound in self._inbound:
            for endpoint in inbound.left(seconds, settings.gone_seconds):
                await self.end(endpoint.spec.key)
        for endpoint in list(self.endpoints.values()):
            endpoint.tick(now, due=due)
