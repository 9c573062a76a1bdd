"""How fast changes of the index reach its mirror: the mirror's own code over a table in memory."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

from kvatlas.bridge.errors import KvatlasError
from kvatlas.streams.index.holders import HOLDER_BYTES
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition, Names
from kvatlas.streams.mirror.mirror import Mirror
from kvatlas.streams.mirror.part import MirrorSource
from kvatlas.streams.mirror.redis_link import connect
from kvatlas.streams.mirror.server import MirrorServer
from kvatlas.streams.state.changelog import Meta
from kvatlas.streams.state.partition import PartitionState, Role

_FLUSH: Final = 8_192
_PREFIX: Final = "kvatlas-bench"


class _State:
    """A partition in memory, as far as the mirror reads it."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.changelog_offset = -1
        self.meta = Meta()
        self.role = Role.ACTIVE

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.values.get(key) for key in keys]

    fetch = get_many

    def items(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        return iter(sorted(item for item in self.values.items() if item[0] >= start))


async def mirror_rate(url: str, entries: int) -> tuple[float, float]:
    """Return changed entries a second into the mirror, by the clock and by this process's CPU time.

    Raises:
        KvatlasError: the mirror is not what the table is.
    """
    rng = random.Random(4)  # noqa: S311 # the same keys every time
    state, client = _State(), connect(url)

    async def changed(_number: int, _after: MirrorPosition, _through: int) -> list[bytes] | None:
        return None

    mirror = Mirror(
        MirrorServer(client, _PREFIX),
        worker="bench",
        layout=MirrorLayout(partitions=1, block_size_tokens=16, index_version="base"),
        source=MirrorSource(
            states=lambda: {0: cast("PartitionState", state)},
            generation=lambda: 1,
            pod=lambda _pod: None,
            pods=list,
            pods_known=lambda: True,
            changed=changed,
        ),
    )
    await mirror.turn()
    flushes = [[rng.randbytes(16) for _ in range(_FLUSH)] for _ in range(max(entries // _FLUSH, 1))]
    value = rng.randbytes(2 * HOLDER_BYTES)
    began, spent = time.perf_counter(), time.process_time()
    for keys in flushes:
        before = state.changelog_offset
        state.values.update(dict.fromkeys(keys, value))
        state.changelog_offset += _FLUSH
        mirror.note(0, keys, before, state.changelog_offset)
        await mirror.turn()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - spent
    names: Any = [Names(_PREFIX).blocks + key for key in flushes[-1]]
    if await client.mget(names) != [value] * _FLUSH or await client.dbsize() < len(state.values):
        raise KvatlasError("the mirror is not what the table is")
    await client.aclose()
    return len(state.values) / seconds, len(state.values) / cpu_seconds
