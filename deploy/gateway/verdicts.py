"""Verdicts about decisions, as ``kv-decisions`` holds them."""

from __future__ import annotations

import asyncio

from kvatlas.bridge.model import records
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.deploy.history.log import LogReader
from kvatlas.deploy.history.moment import EARLIEST, LATEST
from kvatlas.deploy.whatif.recorded import read_decisions
from kvatlas.scorer.scoring.decisions import SERVED


def verdicts(kafka: KafkaSettings) -> dict[str, str]:
    """Return each judged request's verdict by its id: ``exact``, ``over evicted``, ``under stored``, ...

    Raises:
        LogError: Kafka does not answer.
    """
    return {record.request_id: f"{record.outcome} {record.cause}".strip() for record in asyncio.run(_served(kafka))}


async def _served(kafka: KafkaSettings) -> list[records.DecisionRecord]:
    async with LogReader(kafka) as reader:
        return [record for record in await read_decisions(reader, EARLIEST, LATEST) if record.kind == SERVED]
