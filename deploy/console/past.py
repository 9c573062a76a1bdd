"""The log read back for the page: timelines, dead letters, stories, past states, windows of decisions.

Each works on a bounded part of the log, one at a time and on a thread of its own: a page must not read Kafka for
everybody at once, nor hold up those who only look at what is there. A question that nobody waits for any more ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from kvatlas.bridge.errors import SettingsError
from kvatlas.bridge.model import pod_ids, topics
from kvatlas.bridge.model.records import Control, DecisionRecord
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.console.turns import Turns
from kvatlas.deploy.history import ask, story
from kvatlas.deploy.history.beginnings import Beginning, find_beginning
from kvatlas.deploy.history.changes import changes_between
from kvatlas.deploy.history.filters import Filter, Wanted
from kvatlas.deploy.history.log import LogReader, Range, Record
from kvatlas.deploy.history.moment import EARLIEST, LATEST, Moment, parse_moment
from kvatlas.deploy.history.rebuild import PastIndex, rebuild
from kvatlas.deploy.history.summary import CLEARED, CONTROL
from kvatlas.deploy.whatif.recorded import read_decisions
from kvatlas.scorer.errors import DeadlineError
from kvatlas.streams.resolve.resolver import ResolveOptions

_LETTERS: Final = 500
_MARKS: Final = 500
_DECISIONS: Final = 200_000
#: A question that reads for longer has to be asked about less: others wait.
_QUESTION_SECONDS: Final = 300.0
#: So much of a dead letter is shown.
_SHOWN_BYTES: Final = 4_096

T = TypeVar("T")


async def apart(work: Coroutine[Any, Any, T]) -> T:
    """Run on a thread with an event loop of its own; cancelled here, it is cancelled there and waited for."""
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []
    over = False

    async def watched() -> T:
        task = asyncio.ensure_future(work)
        running.append((asyncio.get_running_loop(), task))
        if over:
            task.cancel()
        return await task

    thread = asyncio.ensure_future(asyncio.to_thread(asyncio.run, watched()))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        over = True
        for loop, task in running:
            with contextlib.suppress(RuntimeError):  # it ended just now, and its loop with it
                loop.call_soon_threadsafe(task.cancel)
        await asyncio.wait([thread])
        raise


class Past:
    """Questions to the log; one is answered at a time, the others wait.

    Args:
        kafka: how to reach it.
        options: what events mean, as the workers run.
    """

    def __init__(self, kafka: KafkaSettings, options: ResolveOptions) -> None:
        self.options = options
        self._kafka = kafka
        self._turns = Turns("questions to the log")

    async def _read(self, work: Callable[[LogReader], Awaitable[T]]) -> T:
        """Do work with a reader, on a thread with an event loop of its own.

        Raises:
            BusyError: too many questions wait.
            DeadlineError: it takes too long.
        """

        async def with_reader() -> T:
            async with LogReader(self._kafka, "kvatlas-console") as reader:
                return await work(reader)

        async with self._turns.turn():
            try:
                async with asyncio.timeout(_QUESTION_SECONDS) as reading:
                    return await apart(with_reader())
            except TimeoutError as error:
                if not reading.expired():
                    raise
                raise DeadlineError(
                    f"the log was read for {_QUESTION_SECONDS:g} s, and not to its end: ask about a shorter time"
                ) from error

    async def span(self) -> dict[str, float]:
        """Return the times of the first record on the log and of now, ms since the epoch; 0 for an empty log."""

        async def work(reader: LogReader) -> dict[str, float]:
            whole = await reader.range(topics.EVENTS, EARLIEST, LATEST)
            firsts = Range(topics.EVENTS, {part: (at, min(at + 1, end)) for part, (at, end) in whole.bounds.items()})
            times = [record.timestamp_ms async for chunk in reader.read(firsts) for record in chunk]
            return {"first_ms": min(times, default=0), "now_ms": time.time() * 1e3}

        return await self._read(work)

    async def timeline(self, pod: str, since: str) -> list[dict[str, Any]]:
        """Return what happened to a pod since a moment: starts, clears, gaps, restarts, as the log has them.

        Raises:
            SettingsError: the moment is none.
            LogError: Kafka does not answer.
        """
        wanted = Filter(Wanted(pods=frozenset({pod}), types=frozenset({CONTROL, CLEARED})))

        def rows(record: Record) -> list[dict[str, Any]]:
            message = wanted.message(record)
            if message is None:
                return []
            line = message.line()
            row = {"at_ms": record.timestamp_ms, "sequence": line.sequence, "incarnation": line.incarnation}
            return [
                {**row, **(msgspec.to_builtins(event) if isinstance(event, Control) else {"type": CLEARED})}
                for event, shown in zip(message.events, line.events, strict=True)
                if shown.type in (CONTROL, CLEARED)
            ]

        return await self._newest(topics.EVENTS, since, _MARKS, rows, pod)

    async def dead_letters(self, since: str) -> list[dict[str, Any]]:
        """Return the newest dead letters since a moment: where they came from, why, and the beginning of each.

        Raises:
            SettingsError: the moment is none.
            LogError: Kafka does not answer.
        """
        return await self._newest(topics.DLQ, since, _LETTERS, lambda record: [_letter(record)])

    async def _newest(
        self, topic: str, since: str, most: int, rows_of: Callable[[Record], list[dict[str, Any]]], pod: str = ""
    ) -> list[dict[str, Any]]:
        """Return the newest rows of a topic since a moment, in the order of time."""
        start = _moment(since)

        async def work(reader: LogReader) -> list[dict[str, Any]]:
            only = None
            if pod:
                only = [pod_ids.pod_partition(pod, len(await reader.partitions(topic)))]
            found: deque[dict[str, Any]] = deque(maxlen=most)
            span = await reader.range(topic, start, LATEST, only)
            if only is not None:
                async for chunk in reader.read(span):
                    found.extend(row for record in chunk for row in rows_of(record))
            else:
                async for record in reader.read_in_time(span):
                    found.extend(rows_of(record))
            return list(found)

        return await self._read(work)

    async def ask(self, moment: str, model: str, question: ask.Question) -> dict[str, Any]:
        """Return scores and blocks as of a moment, as ``kvatlas at`` does.

        Raises:
            SettingsError: the moment is none.
            LogError: Kafka does not answer, or the log does not reach back.
        """
        when = _moment(moment)

        async def work(reader: LogReader) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(prefix="kvatlas-console-") as folder:
                past = await rebuild(
                    reader,
                    self._kafka,
                    when,
                    folder=Path(folder),
                    options=self.options,
                    clock=time.time_ns,
                )
                try:
                    return await _answer(past, model, question)
                finally:
                    past.close(keep=False)

        return await self._read(work)

    async def changes(self, first: str, second: str) -> list[dict[str, Any]]:
        """Return what changed per pod between two moments, as ``kvatlas diff`` does.

        Raises:
            SettingsError: one is no moment, or the second is before the first.
            LogError: Kafka does not answer.
        """
        one, other = _moment(first), _moment(second)

        async def work(reader: LogReader) -> list[dict[str, Any]]:
            with tempfile.TemporaryDirectory(prefix="kvatlas-console-") as folder:
                found = await changes_between(
                    reader,
                    self._kafka,
                    one,
                    other,
                    folder=Path(folder),
                    options=self.options,
                )
            return [msgspec.to_builtins(change) for change in found]

        return await self._read(work)

    async def story(self, request_id: str, after_seconds: float) -> dict[str, Any]:
        """Return a request's whole story, as ``kvatlas why`` does.

        Raises:
            KvatlasError: no decision about it is on the log.
            LogError: Kafka does not answer.
        """

        async def work(reader: LogReader) -> dict[str, Any]:
            told = await story.tell(
                reader,
                self._kafka,
                request_id,
                after_seconds=after_seconds,
                options=self.options,
            )
            return told.document()

        return await self._read(work)

    async def decisions(self, since: str, until: str) -> list[DecisionRecord]:
        """Return the records about decisions in a window.

        Raises:
            SettingsError: a text is no moment, or the window holds too much.
            LogError: Kafka does not answer.
        """
        first, last = _moment(since), _moment(until)

        async def work(reader: LogReader) -> list[DecisionRecord]:
            span = await reader.range(topics.DECISIONS, first, last)
            if span.records > _DECISIONS:
                raise SettingsError(f"{span.records} records in this window, at most {_DECISIONS}: take a shorter one")
            return await read_decisions(reader, first, last)

        return await self._read(work)

    async def beginning(self, key: bytes, since: str) -> Beginning | None:
        """Return how a prompt begins that has a block, from the events since a moment that carry token ids.

        Raises:
            SettingsError: the moment is none, or too much was stored since.
            LogError: Kafka does not answer.
        """
        start = _moment(since)

        async def work(reader: LogReader) -> Beginning | None:
            span = await reader.range(topics.EVENTS, start, LATEST)
            return await find_beginning(reader, span, key, self.options.block_size_tokens)

        return await self._read(work)


def _moment(text: str) -> Moment:
    return parse_moment(text, time.time_ns() // 1_000_000)


async def _answer(past: PastIndex, model: str, question: ask.Question) -> dict[str, Any]:
    """Return scores, blocks and the reason of each pod's end."""
    return {**await ask.score(past, model, question), **await ask.explain(past, model, question)}


def _letter(record: Record) -> dict[str, Any]:
    headers = dict(record.headers)
    value = record.value or b""
    return {
        "at_ms": record.timestamp_ms,
        "pod": (record.key or b"").decode(errors="replace"),
        "reason": (headers.get(topics.H_REASON) or b"").decode(errors="replace"),
        "origin": (headers.get(topics.H_ORIGIN) or b"").decode(errors="replace"),
        "bytes": len(value),
        "partition": record.partition,
        "offset": record.offset,
        "hex": value[:_SHOWN_BYTES].hex(),
        "decoded": _decoded(value),
    }


def _decoded(value: bytes) -> str:
    """Return a value as people read it, cut: msgpack as JSON where it is that, else as text; empty for neither."""
    if len(value) > 16 * _SHOWN_BYTES:
        return ""
    try:
        read = msgspec.msgpack.decode(value)
        if isinstance(read, dict | list):
            return msgspec.json.encode(read, enc_hook=repr).decode(errors="replace")[:_SHOWN_BYTES]
    except (ValueError, TypeError, RecursionError, OverflowError):  # msgspec's own errors are ValueErrors
        pass
    try:
        return value.decode()[:_SHOWN_BYTES]
    except UnicodeDecodeError:
        return ""
