"""What a tracker takes and gives: messages of an engine, what goes on the log, where a stream stands. Pure."""

from __future__ import annotations

from typing import NamedTuple

from kvatlas.bridge.model.records import Control
from kvatlas.bridge.model.topics import SOURCE_LIVE


class EngineMessage(NamedTuple):
    """One message of an engine as received.

    Attributes:
        sequence: the publisher's counter.
        topic: first frame.
        payload: last frame; None for one that is too large to forward (its sequence counts all the same).
        receive_ns: the bridge's wall clock, ns.
        source: ``live`` or ``replay``.
    """

    sequence: int
    topic: bytes
    payload: bytes | None
    receive_ns: int
    source: str = SOURCE_LIVE


class Forward(NamedTuple):
    """Put this message on the log under this incarnation."""

    message: EngineMessage
    incarnation: int


#: Goes on the log in order: a message, or a turn of the stream (start, gap, restart) before what follows it.
Output = Forward | Control


class StreamPosition(NamedTuple):
    """Where a stream stands on the log.

    Attributes:
        incarnation: highest one used; 0 for a pod that is not known.
        sequence: last sequence on the log under it, -1 for none.
        ts: the engine's clock in that message, seconds, 0.0 when not known.
        digests: (sequence, digest) of messages on the log, in order.
    """

    incarnation: int = 0
    sequence: int = -1
    ts: float = 0.0
    digests: tuple[tuple[int, int], ...] = ()


class Request(NamedTuple):
    """What to ask the replay socket for.

    Attributes:
        start: first sequence to ask for.
        until: first sequence that is already here (stop reading there), None to read to the end.
    """

    start: int
    until: int | None


class Counts:
    """Plain counters that metrics read."""

    __slots__ = ("duplicates", "gaps", "implausible", "lost", "repaired", "restarts", "shed")

    def __init__(self) -> None:
        self.duplicates = self.gaps = self.implausible = self.lost = self.repaired = self.restarts = self.shed = 0
