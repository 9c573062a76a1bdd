"""Record sink: where engine streams send what they put on the log, whether that is Kafka or an index in this process.

A stream needs order per partition, a word when a record is safe, and whether there is room; nothing else of Kafka.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvatlas.bridge.model.topics import Headers


class QueuedRecord(NamedTuple):
    """One record on its way.

    Attributes:
        key, value, headers: the record.
        acknowledged: called with the record and its offset.
        refused: called when the sink never takes it; see :data:`Refused`.
        origin: the message or control it was encoded from, for re-encoding under another incarnation.
    """

    key: bytes
    value: bytes
    headers: Headers
    acknowledged: Acknowledge | None = None
    refused: Refused | None = None
    origin: object = None


Acknowledge = Callable[[QueuedRecord, int], None]
#: Gets the record, the reason, and the records of its key that waited behind it and were taken back: those with an
#: origin, in order; None when there is one without, or when the record itself has none.
Refused = Callable[[QueuedRecord, str, list[QueuedRecord] | None], None]


class RecordSink(Protocol):
    """Takes records: in order per partition, at least once, within bounded memory."""

    def room(self, key: bytes) -> bool:
        """Whether more may be sent of a key; without room, live messages are left to replay."""

    def send(self, topic: str, partition: int, item: QueuedRecord) -> None:
        """Accept a record for a topic (its name without a deployment's prefix), behind those of the same partition."""
