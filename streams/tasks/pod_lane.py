"""Lane: the messages of one pod that are so much work that other pods' messages overtake them.

A partition's messages are applied in order, so that one message of millions of blocks would keep every other pod of the
partition waiting. What one pod may cost in one go is bounded; what is more waits in a lane of its own, of which a part
is applied at every turn. The order of one pod's messages stays, that between pods does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.message import Message
from kvatlas.streams.resolve.resolver import Resolver
from kvatlas.streams.resolve.slice import PART_BLOCKS, Slice
from kvatlas.streams.state.overlay import Draft, Overlay

#: A message above this may be much work: 15,000 removals, or 2,000 blocks with their tokens.
LARGE_BYTES: Final = 128 * 1024
#: Blocks that one pod may have applied before its further messages wait.
POD_BLOCKS: Final = 4 * PART_BLOCKS
#: Lanes of a partition at once; messages of further pods are applied in their turn.
MOST_LANES: Final = 8
#: Large messages of a partition under way at once, each of which holds its writes in memory.
MOST_LARGE: Final = 2
#: Bytes of messages in all lanes of a partition; beyond, nothing more is taken from the queue.
MOST_BYTES: Final = 64 * 1024 * 1024


class LargeMessage:
    """A message that is applied in parts; what it changes is seen when all of it is applied.

    Args:
        message: the message.
        resolver: applies it.
        overlay: where its writes go in the end, all at once.
        effects: empty, of its own.

    Attributes:
        part: its slice, over a draft of its own.
        steps: what is left to do.
    """

    def __init__(self, message: Message, resolver: Resolver, overlay: Overlay, effects: Effects) -> None:
        self.message = message
        self._draft = Draft(overlay)
        self.part: Slice = resolver.slice(self._draft, effects)
        self.steps: Iterator[int] = resolver.steps(self.part, message)

    def finish(self) -> None:
        """Show what was applied."""
        self.part.finish()
        self._draft.apply()


class PodLane:
    """Messages of one pod that wait, in order.

    Attributes:
        pod: pod id.
        waiting: messages that were not begun.
        current: the one that is under way.
    """

    def __init__(self, pod: str) -> None:
        self.pod = pod
        self.waiting: deque[Message] = deque()
        self.current: LargeMessage | None = None

    @property
    def offset(self) -> int:
        """Return the source offset of the first message that is not applied."""
        return self.current.message.offset if self.current is not None else self.waiting[0].offset
