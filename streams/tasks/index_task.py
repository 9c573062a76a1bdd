"""The index agent's task: block updates into ``block_index``, where lookups see them at once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

from kvatlas.bridge.errors import WireError
from kvatlas.streams import metrics
from kvatlas.streams.index.apply import apply_blocks, table_keys_of
from kvatlas.streams.index.blocks_record import BlocksRecord, decode_blocks
from kvatlas.streams.tasks.output import Output
from kvatlas.streams.tasks.task import PartitionTask, TaskParts


class IndexTask(PartitionTask):
    """One partition of ``kv-blocks``.

    Args:
        parts: what every task works with.
        output: sends dead letters.
    """

    agent: ClassVar[str] = "index"

    def __init__(self, parts: TaskParts, output: Output) -> None:
        super().__init__(parts)
        self._output = output
        #: Records that cannot be read: offset, value, reason. What was sent before a failure is not sent again.
        self._dead: list[tuple[int, bytes, str]] = []

    async def apply(self, records: Iterator[Any]) -> bool:
        """Apply records of block updates to ``block_index``."""
        counts: Counter[str] = Counter()
        readable: list[tuple[BlocksRecord, list[bytes]]] = []
        last, receive_ns = -1, 0
        for message in records:
            value, last = message.value or b"", message.offset
            try:
                record = decode_blocks(value)
            except WireError as error:
                self._dead.append((last, value, str(error)))
                counts["dead"] += 1
                continue
            readable.append((record, table_keys_of(record)))
            receive_ns = max(receive_ns, record.receive_ns)
            self.took(len(record.ops))
        if last < 0:
            return False
        await self.overlay.prefetch_apart(itertools.chain.from_iterable(keys for _, keys in readable))
        for record, keys in readable:
            apply_blocks(self.overlay, record, counts, table_keys=keys)
            await self.give_way(len(record.ops))
        self.advance(last, receive_ns, updates=counts["updates"], counts=counts)
        metrics.visible("index", receive_ns)
        return bool(self._dead)

    async def send(self) -> None:
        """Dead-letter what cannot be read."""
        while self._dead:
            offset, value, reason = self._dead[-1]
            await self._output.send_dead_blocks(self.partition.partition, offset, value, reason)
            self._dead.pop()
