"""The resolve agent's task: engine messages into ``engine_blocks``, block updates and pod records."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams import metrics
from kvatlas.streams.resolve.effects import DeadLetter, Effects, PodUpdates
from kvatlas.streams.resolve.message import parse_message
from kvatlas.streams.resolve.resolver import Resolver
from kvatlas.streams.tasks.output import Output
from kvatlas.streams.tasks.pods import PodPublisher
from kvatlas.streams.tasks.task import PartitionTask, TaskParts

logger = logging.getLogger(__name__)


class ResolveTask(PartitionTask):
    """One partition of ``kv-events``.

    Args:
        parts: what every task works with.
        resolver: applies messages; of this task alone.
        output: sends block updates and dead letters.
        pods: sends pod records.
    """

    agent: ClassVar[str] = "resolve"

    def __init__(self, parts: TaskParts, resolver: Resolver, *, output: Output, pods: PodPublisher) -> None:
        super().__init__(parts)
        self._resolver = resolver
        self._output = output
        self._publisher = pods
        # What follows from the records applied last; what was sent before a failure is not sent again.
        self._pods: dict[str, PodRecord] = {}
        self._segments: list[PodUpdates] = []
        self._dead: list[DeadLetter] = []
        self._urgent = False
        self._newest_ns = 0

    async def apply(self, records: Iterator[Any]) -> bool:
        """Apply engine messages to ``engine_blocks``."""
        effects = Effects(self._output.blocks_partitions)
        last, updates = -1, 0
        for message in records:
            self._one(message, effects)
            last, before, updates = message.offset, updates, effects.updates
            self.took(updates - before)
            await self.give_way(updates - before)
        if last < 0:
            return False
        for pod, text in effects.notices:
            logger.warning("%s: %s", pod, text)
        self.advance(last, effects.receive_ns, updates=updates, counts=effects.counts)
        self._pods, self._segments, self._dead = effects.pods, effects.segments, effects.dead
        self._urgent, self._newest_ns = effects.urgent, effects.receive_ns
        return True

    def _one(self, message: Any, effects: Effects) -> None:
        parsed = parse_message(message.key, message.value, message.headers, message.partition, message.offset)
        try:
            self._resolver.apply(self.overlay, parsed, effects)
        except Exception as error:
            # A bug of ours must not stop every pod of the partition; the letter keeps the message for a replay.
            logger.exception("kv-events/%d/%d: cannot be applied", message.partition, message.offset)
            reason = f"internal error: {error!r}"
            value = bytes(message.value or b"")
            effects.dead.append(
                DeadLetter(parsed.pod, value, reason, message.partition, message.offset, parsed.headers)
            )

    async def send(self) -> None:
        """Send raised epochs, block updates and dead letters, in this order; hand the other pod records over."""
        if self._urgent:
            await self._publisher.send(self._pods)
            self._urgent, self._pods = False, {}
        if self._segments:
            await self._output.send_blocks(self._segments, self._newest_ns)
            self._segments = []
        if self._dead:
            await self._output.send_dead(self._dead)
            self._dead = []
        self._publisher.offer(self._pods)
        metrics.visible("resolve", self._newest_ns)
