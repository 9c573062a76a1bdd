"""The server's side of the mirror: claims, writes and layout, each refused by the server when it is not ours to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from kvatlas.bridge.errors import DECODE_ERRORS
from kvatlas.streams import metrics
from kvatlas.streams.mirror.layout import CLAIM, PODS, WRITE, MirrorLayout, Names
from kvatlas.streams.mirror.redis_link import escaped

CLAIM_MS: Final = 30_000
_SCAN_KEYS: Final = 1_000


class LostError(Exception):
    """A write was refused: the partition is another's, or the server is not where we thought."""


class MirroredPartition(NamedTuple):
    """A partition as we hold it: what every write to it names.

    Attributes:
        number: the partition.
        token: our claim.
        position: the server's position, empty for none.
    """

    number: int
    token: bytes
    position: bytes


class MirrorServer:
    """A Redis or Valkey server that has a mirror. Every call may raise ``RedisError`` or ``OSError``.

    Args:
        client: from :func:`kvatlas.streams.mirror.redis_link.connect`.
        prefix: of the keys.
    """

    def __init__(self, client: Any, prefix: str) -> None:
        self._client = client
        self._names = Names(prefix)
        self._claim = client.register_script(CLAIM)
        self._write = client.register_script(WRITE)
        self._pods = client.register_script(PODS)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def agree(self, layout: MirrorLayout) -> str:
        """Enter the layout; returns the workers that write under another one, empty when it is ours now."""
        names, wanted = self._names, msgspec.msgpack.encode(layout)
        found = await self._client.get(names.layout)
        if found == wanted:
            return ""
        before = _partitions_in(found)
        held = await self._client.mget([names.claim(number) for number in range(before)]) if before else []
        others = ", ".join(sorted({value[8:].decode("utf-8", "replace") for value in held if value}))
        if others:
            return others
        # Positions and pods of the earlier layout; its entries go with the copies.
        for number in range(max(before, layout.partitions)):
            await self._client.delete(names.position(number), names.pods(number))
        await self._client.set(names.layout, wanted)
        return ""

    async def claim(self, number: int, token: bytes) -> tuple[bool, bytes]:
        """Claim a partition: (True, its position) or (False, the other's claim)."""
        names = self._names
        ours, found = await self._claim(keys=[names.claim(number), names.position(number)], args=[token, CLAIM_MS])
        return bool(ours), found

    async def write(
        self,
        held: MirroredPartition,
        chunks: Iterable[tuple[Sequence[bytes], Sequence[bytes | None]]],
        after: bytes = b"",
    ) -> None:
        """Write entries in one round trip, a piece at a time inside the server.

        Args:
            held: claim and position that have to hold.
            chunks: keys and values; None and empty values remove.
            after: position to write with the last chunk; empty keeps it, ``b"-"`` removes it.

        Raises:
            LostError: refused; chunks before the refused one are written.
        """
        names = self._names
        places = [names.claim(held.number), names.position(held.number)]
        pipeline = self._client.pipeline(transaction=False)
        parts = list(chunks)
        for sent, (keys, values) in enumerate(parts, 1):
            await self._write(
                keys=[*places, *(names.blocks + key for key in keys)],
                args=[held.token, held.position, after if sent == len(parts) else b"", *(v or b"" for v in values)],
                client=pipeline,
            )
        for done in await pipeline.execute():
            if done != 1:
                raise LostError
        metrics.MIRROR_KEYS.inc(sum(len(keys) for keys, _ in parts))

    async def pod_names(self, number: int) -> list[bytes]:
        """Return the pod ids in a partition's hash."""
        found: list[bytes] = await self._client.hkeys(self._names.pods(number))
        return found

    async def write_pods(self, held: MirroredPartition, fields: Mapping[bytes, bytes]) -> None:
        """Write pods of a partition; empty values remove.

        Raises:
            LostError: refused, nothing is written.
        """
        keys = [self._names.claim(held.number), self._names.pods(held.number)]
        if await self._pods(keys=keys, args=[held.token, *itertools.chain.from_iterable(fields.items())]) != 1:
            raise LostError

    async def scan(self, cursor: int) -> tuple[int, list[bytes]]:
        """Return some of the block keys in the server, and where to go on; 0 is begin and end."""
        skip = len(self._names.blocks)
        cursor, names = await self._client.scan(cursor, match=escaped(self._names.blocks), count=_SCAN_KEYS)
        return cursor, [name[skip:] for name in names]


def _partitions_in(layout: bytes | None) -> int:
    """Return the partitions of a layout that was found, 0 for none or one that cannot be read."""
    try:
        return msgspec.msgpack.decode(layout, type=MirrorLayout).partitions if layout else 0
    except DECODE_ERRORS:
        return 0
