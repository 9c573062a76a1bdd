"""Rates of the topics, for the page: how much is on each, and how fast it grows."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Final

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.model import topics
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import EARLIEST, LATEST

_LOOKED: Final = (topics.EVENTS, topics.BLOCKS, topics.PODS, topics.WORKERS, topics.DECISIONS, topics.DLQ)


class TopicRates:
    """Looks at the topics; rates are since the look before.

    Args:
        kafka: how to reach them.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._reader: LogReader | None = None
        self._before: dict[str, tuple[float, int]] = {}

    async def look(self) -> list[dict[str, Any]]:
        """Return a row for each topic: partitions, records that are kept, records a second; one not there says why.

        Raises:
            LogError: Kafka does not answer.
        """
        if self._reader is not None and self._reader.failed() is not None:
            await self.close()
        if self._reader is None:
            self._reader = await LogReader(self._kafka, "kvatlas-console").__aenter__()
        return [await self._row(self._reader, topic) for topic in _LOOKED]

    async def _row(self, reader: LogReader, topic: str) -> dict[str, Any]:
        try:
            span = await reader.range(topic, EARLIEST, LATEST)
        except LogError as error:
            return {"topic": topic, "error": str(error)}
        now, end = time.monotonic(), sum(last for _, last in span.bounds.values())
        before, count = self._before.get(topic, (now, end))
        self._before[topic] = (now, end)
        rate = round(max(0, end - count) / (now - before), 1) if now > before else 0.0
        return {
            "topic": topic,
            "partitions": len(span.bounds),
            "records": span.records,
            "records_per_second": rate,
            "error": "",
        }

    async def close(self) -> None:
        """Disconnect."""
        reader, self._reader = self._reader, None
        if reader is not None:
            with contextlib.suppress(Exception):  # closing raises what ended the client
                await reader.__aexit__()
