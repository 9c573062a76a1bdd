"""What a changelog partition says has changed: the way on for a mirror that is a little behind."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.kafka.ranges import RangeReader
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.runtime.settings import KafkaSettings
from kvatlas.streams.mirror.layout import MirrorPosition

logger = logging.getLogger(__name__)

_SECONDS: Final = 20.0


async def changed_keys(
    kafka: KafkaSettings,
    changelog: str,
    partition: int,
    *,
    after: MirrorPosition,
    through: int,
    most: int,
    max_age_seconds: float,
    client_id: str,
) -> list[bytes] | None:
    """Return the block keys that a changelog has in a stretch, or None when it cannot tell all of them.

    Args:
        kafka: how to reach the brokers.
        changelog: full topic name.
        partition: its partition.
        after: position that the stretch begins behind.
        through: last offset of the stretch.
        most: give up on a longer stretch.
        max_age_seconds: give up on an older one: a compacted topic forgets what was removed long ago.
        client_id: name in the brokers' logs.
    """
    if time.time_ns() - after.committed_ns > max_age_seconds * 1e9 or through - after.changelog_offset > most:
        return None
    first = after.changelog_offset + 1
    found: dict[bytes, None] = {}
    try:
        async with asyncio.timeout(_SECONDS), RangeReader(kafka, client_id) as reader:
            edge = (await reader.edges(changelog, [partition]))[partition]
            if edge.first > first or edge.end <= through:
                return None
            async for _, batch in reader.read(changelog, {partition: (first, through + 1)}):
                found.update(dict.fromkeys(record.key for record in batch if len(record.key or b"") == KEY_BYTES))
    except (KvatlasError, TimeoutError) as error:
        logger.warning(
            "%s/%d: changes cannot be read, the mirror copies the partition: %r", changelog, partition, error
        )
        return None
    return list(found)
