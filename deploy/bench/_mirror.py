"""How fast changes of the index reach its mirror: the mirror's own code over a changelog in memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection
from typing import Any, Final, NamedTuple, cast

from kvatlas.bridge.errors import KvatlasError
from kvatlas.bridge.kafka.member import Assignment, GroupMember
from kvatlas.bridge.kafka.ranges import Edges
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.streams.index.holders import HOLDER_BYTES
from kvatlas.streams.mirror.layout import MirrorLayout, Names
from kvatlas.streams.mirror.mirror import Mirror
from kvatlas.streams.mirror.redis_link import connect
from kvatlas.streams.mirror.server import MirrorServer

_FLUSH: Final = 8_192
_PREFIX: Final = "kvatlas-bench"


class _Record(NamedTuple):
    offset: int
    key: bytes
    value: bytes


class _Log:
    """A changelog partition in memory, as far as the mirror reads it."""

    def __init__(self) -> None:
        self.flush: list[_Record] = []
        self.length = 0

    def append(self, keys: list[bytes], value: bytes) -> None:
        self.flush = [_Record(self.length + number, key, value) for number, key in enumerate(keys)]
        self.length += len(keys)

    async def assignment(self) -> Assignment:
        return Assignment(1, 1, frozenset({0}))

    async def edge(self, _partition: int) -> Edges:
        return Edges(0, self.length)

    def go_on(self, _partition: int, _offset: int) -> None:
        self.flush = []

    async def position(self, _partition: int) -> int:
        return self.length

    def end(self, _partition: int) -> int:
        return self.length

    async def fetch(self, partitions: Collection[int], **_: int) -> dict[int, list[_Record]]:
        await asyncio.sleep(0)
        found, self.flush = self.flush, []
        return {0: found} if found and partitions else {}

    async def leave(self) -> None:
        """Nothing is left behind."""


async def mirror_rate(url: str, entries: int) -> tuple[float, float]:
    """Return changed entries a second into the mirror, by the clock and by this process's CPU time.

    Raises:
        KvatlasError: the mirror is not what the table is.
    """
    rng = random.Random(4)  # noqa: S311 # the same keys every time
    log, client, known = _Log(), connect(url), asyncio.Event()
    known.set()
    mirror = Mirror(
        MirrorServer(client, _PREFIX),
        cast("GroupMember", log),
        pods=PodDirectory(),
        pods_known=known,
        name="bench",
        layout=MirrorLayout(partitions=1, block_size_tokens=16, index_version="base"),
        max_age_seconds=3600.0,
    )
    await mirror.turn()
    flushes = [[rng.randbytes(16) for _ in range(_FLUSH)] for _ in range(max(entries // _FLUSH, 1))]
    value = rng.randbytes(2 * HOLDER_BYTES)
    began, spent = time.perf_counter(), time.process_time()
    for keys in flushes:
        log.append(keys, value)
        await mirror.turn()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - spent
    names: Any = [Names(_PREFIX).blocks + key for key in flushes[-1]]
    if await client.mget(names) != [value] * _FLUSH or await client.dbsize() < log.length:
        raise KvatlasError("the mirror is not what the table is")
    await client.aclose()
    return log.length / seconds, log.length / cpu_seconds
