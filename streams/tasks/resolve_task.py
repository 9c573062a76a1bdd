"""The resolve agent's task: engine messages into ``engine_blocks``, block updates and pod records."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Final

from kvatlas.bridge.model.records import PodRecord
from kvatlas.streams import metrics
from kvatlas.streams.resolve.effects import DeadLetter, Effects, PodUpdates
from kvatlas.streams.resolve.message import Message, parse_message
from kvatlas.streams.resolve.resolver import Resolver
from kvatlas.streams.resolve.slice import PART_BLOCKS, Slice
from kvatlas.streams.tasks.output import Output
from kvatlas.streams.tasks.pod_lane import (
    LARGE_BYTES,
    MOST_BYTES,
    MOST_LANES,
    MOST_LARGE,
    POD_BLOCKS,
    LargeMessage,
    PodLane,
)
from kvatlas.streams.tasks.pods import PodPublisher
from kvatlas.streams.tasks.sessions import SessionPublisher
from kvatlas.streams.tasks.task import PartitionTask, TaskParts

logger = logging.getLogger(__name__)


#: Blocks that are applied before what follows from them is sent, about 30 ms of work.
_TURN_BLOCKS: Final = 16_384


class _Turn:
    """What one call of :meth:`ResolveTask.apply` has done.

    Attributes:
        part: the messages that were applied whole.
        blocks: blocks looked at.
        of_pod: the same by pod.
        messages: messages applied.
    """

    def __init__(self, part: Slice) -> None:
        self.part = part
        self.blocks = self.messages = 0
        self.of_pod: dict[str, int] = {}

    def worked(self, pod: str, blocks: int) -> None:
        """Count work done for a pod."""
        self.blocks += blocks
        self.of_pod[pod] = self.of_pod.get(pod, 0) + blocks


class ResolveTask(PartitionTask):
    """One partition of ``kv-events``.

    Args:
        parts: what every task works with.
        resolver: applies messages; of this task alone.
        output: sends block updates and dead letters.
        pods: sends pod records.
        sessions: tells where sessions were seen.
    """

    agent: ClassVar[str] = "resolve"

    def __init__(
        self,
        parts: TaskParts,
        resolver: Resolver,
        *,
        output: Output,
        pods: PodPublisher,
        sessions: SessionPublisher,
    ) -> None:
        super().__init__(parts)
        self._resolver = resolver
        self._output = output
        self._publisher, self._sessions = pods, sessions
        self._lanes: dict[str, PodLane] = {}
        self._lane_bytes = 0
        self._newest = self.last_offset
        # What follows from the records applied last; what was sent before a failure is not sent again.
        self._pods: dict[str, PodRecord] = {}
        self._segments: list[PodUpdates] = []
        self._dead: list[DeadLetter] = []
        self._urgent = False
        self._newest_ns = 0

    @property
    def unfinished(self) -> bool:
        """Return whether messages wait in lanes."""
        return bool(self._lanes)

    async def apply(self, records: Iterator[Any]) -> bool:
        """Apply engine messages to ``engine_blocks``.

        What is too much work for one turn waits in a lane of its pod, while the messages of other pods go on.
        """
        effects = Effects(self._output.blocks_partitions)
        turn = _Turn(self._resolver.slice(self.overlay, effects))
        for lane in list(self._lanes.values()):
            await self._go_on(lane, turn)
        if self._lane_bytes < MOST_BYTES:
            for record in records:
                self._newest = record.offset
                await self._message(record, turn)
                if turn.blocks >= _TURN_BLOCKS or self._lane_bytes >= MOST_BYTES:
                    break
        if not turn.messages:
            return False
        turn.part.finish()
        for pod, text in effects.notices:
            logger.warning("%s: %s", pod, text)
        applied = min((lane.offset for lane in self._lanes.values()), default=self._newest + 1) - 1
        self.advance(applied, effects.receive_ns, updates=effects.updates, counts=effects.counts)
        self._pods, self._segments, self._dead = effects.pods, effects.segments, effects.dead
        self._urgent, self._newest_ns = effects.urgent, effects.receive_ns
        if effects.sessions:
            self._sessions.offer(effects.sessions)
        return True

    async def _message(self, record: Any, turn: _Turn) -> None:
        """Apply a message that has just come, or have it wait."""
        message = parse_message(record.key, record.value, record.headers, record.partition, record.offset)
        lane = self._lanes.get(message.pod)
        if lane is None and (len(message.value) > LARGE_BYTES or turn.of_pod.get(message.pod, 0) >= POD_BLOCKS):
            lane = self._new_lane(message.pod, turn)
        if lane is None:
            await self._whole(message, turn)
            return
        lane.waiting.append(message)
        self._lane_bytes += len(message.value)
        self.put_off()

    def _new_lane(self, pod: str, turn: _Turn) -> PodLane | None:
        """Return a new lane; None when there are too many, so that the message is applied in its turn."""
        if len(self._lanes) >= MOST_LANES:
            return None
        turn.part.release(pod)
        lane = self._lanes[pod] = PodLane(pod)
        return lane

    async def _go_on(self, lane: PodLane, turn: _Turn) -> None:
        """Apply what waits in a lane, as much as one turn allows."""
        until = turn.blocks + PART_BLOCKS
        while turn.blocks < until and (lane.current or lane.waiting):
            if lane.current is not None:
                await self._step(lane, lane.current, turn)
                continue
            message = lane.waiting[0]
            if len(message.value) > LARGE_BYTES and self._under_way() >= MOST_LARGE:
                return
            lane.waiting.popleft()
            if len(message.value) > LARGE_BYTES:
                turn.part.release(lane.pod)
                effects = Effects(self._output.blocks_partitions)
                lane.current = LargeMessage(message, self._resolver, self.overlay, effects)
            else:
                await self._whole(message, turn)
                self._arrived(message)
        if lane.current is None and not lane.waiting:
            del self._lanes[lane.pod]

    def _under_way(self) -> int:
        return sum(lane.current is not None for lane in self._lanes.values())

    async def _step(self, lane: PodLane, large: LargeMessage, turn: _Turn) -> None:
        """Apply one part of a large message, and show it when that was the last."""
        try:
            blocks = next(large.steps, None)
        except Exception as error:  # noqa: BLE001 # as in _whole
            _failed(large.message, large.part, error)
            blocks = None
        if blocks is not None:
            turn.worked(lane.pod, blocks)
            await self.give_way(blocks)
            return
        large.finish()
        turn.part.effects.absorb(large.part.effects)
        self.took(large.part.effects.updates)
        turn.messages += 1
        lane.current = None
        self._arrived(large.message)

    def _arrived(self, message: Message) -> None:
        self._lane_bytes -= len(message.value)
        self.caught_up()

    async def _whole(self, message: Message, turn: _Turn) -> None:
        """Apply a message in one turn."""
        before = turn.part.effects.updates
        try:
            for blocks in self._resolver.steps(turn.part, message):
                turn.worked(message.pod, blocks)
                await self.give_way(blocks)
        except Exception as error:  # noqa: BLE001 # a bug of ours must not stop every pod of the partition
            _failed(message, turn.part, error)
        turn.messages += 1
        self.took(turn.part.effects.updates - before)

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


def _failed(message: Message, part: Slice, error: Exception) -> None:
    """Dead-letter a message that met a bug of ours; the letter keeps it for a replay."""
    logger.error("kv-events/%d/%d: cannot be applied", message.partition, message.offset, exc_info=error)
    part.bury(message, message.value, f"internal error: {error!r}")
    part.end_message()
