"""The log read back for the page: a pod's timeline, dead letters, a request's story, the index as of a moment.

Each works on a bounded part of the log, one at a time: a page must not read Kafka for everybody at once.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import records, topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history import ask
from kvatlas.deploy.history.log import LogReader, Record
from kvatlas.deploy.history.moment import LATEST, Moment, parse_moment
from kvatlas.deploy.history.rebuild import PastIndex, rebuild
from kvatlas.streams.resolve.resolver import ResolveOptions

_LETTERS: Final = 500
_MARKS: Final = 500


class Past:
    """Questions to the log; one is answered at a time, the others wait.

    Args:
        kafka: how to reach it.
        options: what events mean, as the workers run.
    """

    def __init__(self, kafka: KafkaSettings, options: ResolveOptions) -> None:
        self._kafka = kafka
        self._options = options
        self._turn = asyncio.Lock()

    async def timeline(self, pod: str, since: str) -> list[dict[str, Any]]:
        """Return what happened to a pod since a moment: starts, gaps, restarts, as the bridge wrote them down.

        Raises:
            SettingsError: the moment is none.
            LogError: Kafka does not answer.
        """
        return await self._newest(topics.EVENTS, since, _MARKS, lambda record: _mark(record, pod.encode()))

    async def dead_letters(self, since: str) -> list[dict[str, Any]]:
        """Return the newest dead letters since a moment, with their reasons; values are left out.

        Raises:
            SettingsError: the moment is none.
            LogError: Kafka does not answer.
        """
        return await self._newest(topics.DLQ, since, _LETTERS, _letter)

    async def _newest(
        self, topic: str, since: str, most: int, row_of: Callable[[Record], dict[str, Any] | None]
    ) -> list[dict[str, Any]]:
        """Return the newest rows of a topic since a moment; None is no row."""
        start = parse_moment(since, time.time_ns() // 1_000_000)
        found: deque[dict[str, Any]] = deque(maxlen=most)
        async with self._turn, LogReader(self._kafka) as reader:
            async for chunk in reader.read(await reader.range(topic, start, LATEST)):
                found.extend(row for record in chunk if (row := row_of(record)) is not None)
        return list(found)

    async def ask(self, moment: str, model: str, question: ask.Question) -> dict[str, Any]:
        """Return scores and blocks as of a moment.

        Raises:
            SettingsError: the moment is none.
            LogError: Kafka does not answer, or the log does not reach back.
        """
        when: Moment = parse_moment(moment, time.time_ns() // 1_000_000)
        async with self._turn, LogReader(self._kafka) as reader:
            with tempfile.TemporaryDirectory(prefix="kvatlas-console-") as folder:
                past = await rebuild(
                    reader,
                    self._kafka,
                    when,
                    folder=Path(folder),
                    options=self._options,
                    clock=time.time_ns,
                    snapshots=None,
                    progress=None,
                )
                try:
                    # In a thread with a loop of its own: the tables are read from disk.
                    return await asyncio.to_thread(asyncio.run, _answer(past, model, question))
                finally:
                    past.close(keep=False)


async def _answer(past: PastIndex, model: str, question: ask.Question) -> dict[str, Any]:
    """Return scores, blocks and the reason of each pod's end."""
    return {**await ask.score(past, model, question), **await ask.explain(past, model, question)}


def _mark(record: Record, key: bytes) -> dict[str, Any] | None:
    """Return a control record of one pod as a row; None for every other record."""
    if record.key != key or dict(record.headers).get(topics.H_CONTENT_TYPE) != topics.CONTENT_CONTROL.encode():
        return None
    try:
        control = records.decode(records.Control, record.value or b"")
    except WireError:
        return None
    return {"at_ms": record.timestamp_ms, **msgspec.to_builtins(control)}


def _letter(record: Record) -> dict[str, Any]:
    headers = dict(record.headers)
    return {
        "at_ms": record.timestamp_ms,
        "pod": (record.key or b"").decode(errors="replace"),
        "reason": (headers.get(topics.H_REASON) or b"").decode(errors="replace"),
        "origin": (headers.get(topics.H_ORIGIN) or b"").decode(errors="replace"),
        "bytes": len(record.value or b""),
        "partition": record.partition,
        "offset": record.offset,
    }
