"""Recovered pods without an endpoint: marks them stale or gone."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final

import msgspec

from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.ingest.shared import Shared
from kvatlas.bridge.model import epochs, records, topics
from kvatlas.bridge.model.records import Control

_REASON: Final = "not listed by discovery since this bridge has the pod"

log = logging.getLogger(__name__)


class Absent:
    """Marks recovered pods stale, then gone, by how long no endpoint has claimed them."""

    def __init__(self, shared: Shared) -> None:
        """Judge what these streams share."""
        self._shared = shared
        self._since: dict[str, float] = {}

    def look(self, now_seconds: float, listed: Collection[str]) -> None:
        """Mark what has been silent or unlisted for too long.

        A bridge that shares pods through a group is the only one that has them, so a pod that is not listed is gone.
        One that takes every pod cannot know whether another bridge lists it, so it only says that it is stale.

        Args:
            now_seconds: a monotonic clock.
            listed: the endpoints of all streams.
        """
        shared, settings = self._shared, self._shared.settings
        for pod in self._since.keys() - shared.recovered.keys():
            del self._since[pod]
        for pod, known in list(shared.recovered.items()):
            record = known.record
            if record.state == records.GONE or not shared.owned(pod):
                continue
            silent = now_seconds - self._since.setdefault(pod, now_seconds)
            if record.endpoint not in listed and silent >= settings.gone_seconds:
                self._gone(known) if settings.ownership == "group" else self._stale(known)
            elif silent >= settings.stale_seconds:
                self._stale(known)

    def _stale(self, known: Recovered) -> None:
        if known.record.state != records.STALE:
            known.record = msgspec.structs.replace(known.record, state=records.STALE)
            self._shared.put_record(known.record)

    def _gone(self, known: Recovered) -> None:
        record, shared = known.record, self._shared
        log.info("pod %s at %s: %s", record.pod, record.endpoint, _REASON)
        incarnation = shared.next_incarnation(epochs.incarnation_of(record.epoch))
        control = Control(type="gone", incarnation=incarnation, reason=_REASON)
        fixed = [(topics.H_ENGINE, record.engine.encode()), (topics.H_MODEL, record.model.encode())]
        shared.recovered[record.pod] = Recovered(shared.put_gone(record, control, fixed))
