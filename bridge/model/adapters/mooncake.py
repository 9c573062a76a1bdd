"""Events of Mooncake's master: which objects its pool holds. They have no tokens, no parent and no size.

The payload is an array ``[timestamp in milliseconds, events, 0]``, an event a map. Its ``seq_hashes`` holds a block's
hash where the object's key is a bare number; of the keys of connectors the text is all there is.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from kvatlas.bridge.errors import DECODE_ERRORS, WireError
from kvatlas.bridge.model.events import engine_key

_EVENTS_MAX: Final = 20_000
_MILLISECONDS: Final = 1000


class ObjectEvent(msgspec.Struct, frozen=True, gc=False):
    """An object was put into the pool, or is gone.

    Attributes:
        event_type: which of the two.
        object_key: the object's name.
        seq_hashes: the hash of its block, or nothing.
    """

    event_type: Literal["stored", "removed"]
    object_key: Annotated[str, Meta(min_length=1, max_length=1024)]
    seq_hashes: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=1)] = []

    @property
    def stored(self) -> bool:
        """Whether it was put."""
        return self.event_type == "stored"

    @property
    def engine_key(self) -> bytes | None:
        """The engine key of its block, where the master knows it."""
        return engine_key(self.seq_hashes[0]) if self.seq_hashes else None


class ObjectBatch(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One message; ``timestamp`` is the master's clock in ms."""

    timestamp: int
    events: Annotated[list[ObjectEvent], Meta(max_length=_EVENTS_MAX)]

    @property
    def seconds(self) -> float:
        """The master's clock, seconds since the epoch."""
        return self.timestamp / _MILLISECONDS


_decoder: Final = msgspec.msgpack.Decoder(ObjectBatch)


def decode_object_events(payload: bytes) -> ObjectBatch:
    """Decode one message of the master.

    Raises:
        WireError: it is none.
    """
    try:
        return _decoder.decode(payload)
    except DECODE_ERRORS as error:
        raise WireError(f"not a batch of Mooncake's master: {error}") from error
