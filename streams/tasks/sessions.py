"""Session publisher: tells pickers on which pods sessions were seen, at a bounded rate."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

from aiokafka.errors import KafkaError

from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.records import DecisionRecord
from kvatlas.bridge.model.sessions import MOST_SESSIONS, SESSION_SECONDS, SESSIONS
from kvatlas.streams.resolve.effects import Sighting

logger = logging.getLogger(__name__)

_SECOND_NS: Final = 1_000_000_000
#: A session that stays where it is is told again after so long, while it is active.
_AGAIN_NS: Final = 60 * _SECOND_NS
_EVERY_SECONDS: Final = 0.2
_BACKOFF_SECONDS: Final = 2.0
#: Sessions that are told in one turn; what is more waits for the next.
_MOST_A_TURN: Final = 5_000


class SessionPublisher:
    """Writes ``kv-decisions`` records of kind ``sessions``: for each pod the sessions that its events named lately.

    A session is told when it was seen on another pod than was told last, or a minute later; once a turn at most. It is
    a hint for pickers, which forget it in ten minutes: what is older is not told, and nothing waits for it.

    Args:
        producer: returns the started ``AIOKafkaProducer``.
        topic: ``kv-decisions`` and its number of partitions.
        worker: this worker's id, for the records.
        clock: wall clock, ns since the epoch.
    """

    def __init__(
        self, producer: Callable[[], Any], topic: tuple[str, int], *, worker: str, clock: Callable[[], int]
    ) -> None:
        self._producer = producer
        self._topic, self._partitions = topic
        self._worker = worker
        self._clock = clock
        self._waiting: OrderedDict[str, Sighting] = OrderedDict()
        self._told: OrderedDict[str, Sighting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, sessions: Mapping[str, Sighting]) -> None:
        """Take note of where sessions were seen, by hash; what is news waits for the next turn."""
        oldest = self._clock() - int(SESSION_SECONDS * _SECOND_NS)
        for session, seen in sessions.items():
            told = self._told.get(session)
            known = self._waiting.get(session, told)
            if seen.receive_ns < oldest or (known is not None and known.receive_ns > seen.receive_ns):
                continue
            if told is not None and told.pod == seen.pod and seen.receive_ns - told.receive_ns < _AGAIN_NS:
                self._waiting.pop(session, None)
            else:
                self._waiting[session] = seen
        _shorten(self._waiting)

    async def run(self) -> None:
        """Tell what waits, in turns, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            try:
                await self.flush()
            except KafkaError as error:
                logger.warning("kv-decisions: sessions not acknowledged, tried again: %s", error)
                await asyncio.sleep(_BACKOFF_SECONDS)

    async def flush(self) -> None:
        """Tell what waits, as much as one turn takes, one record a pod, and wait until the brokers have it.

        Raises:
            KafkaError: not acknowledged; it waits again.
        """
        turn = [self._waiting.popitem(last=False) for _ in range(min(len(self._waiting), _MOST_A_TURN))]
        if not turn:
            return
        by_pod: dict[str, dict[str, int]] = {}
        for session, seen in turn:
            by_pod.setdefault(seen.pod, {})[session] = seen.receive_ns
            self._told[session] = seen
            self._told.move_to_end(session)
        _shorten(self._told)
        try:
            await asyncio.gather(*[await self._send(pod, sessions) for pod, sessions in by_pod.items()])
        except KafkaError:
            for session, seen in turn:
                self._told.pop(session, None)
                self._waiting.setdefault(session, seen)
            _shorten(self._waiting)
            raise

    async def _send(self, pod: str, sessions: dict[str, int]) -> Any:
        record = DecisionRecord(
            kind=SESSIONS,
            request_id="",
            pod=pod,
            scorer=self._worker,
            decided_ns=max(sessions.values()),
            sessions=sessions,
        )
        partition = pod_ids.pod_partition(pod, self._partitions)
        return await self._producer().send(self._topic, records.encode(record), key=pod.encode(), partition=partition)


def _shorten(known: OrderedDict[str, Sighting]) -> None:
    """Forget the sessions that came first when there are too many."""
    while len(known) > MOST_SESSIONS:
        known.popitem(last=False)
