"""Stripped events, whose token ids never left the bridge, as the events that they were made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from kvatlas.bridge.errors import LimitError, WireError
from kvatlas.bridge.model import records
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.events import Kind, Limits, Removed, Stored, Tier
from kvatlas.bridge.model.sessions import is_hash

KeyedEvent = records.KeyedStored | records.KeyedRemoved | records.KeyedCleared


def removed_of(event: records.KeyedRemoved) -> Removed:
    """Return a stripped removal as an event."""
    return Removed(
        keys=event.engine_keys,
        tier=Tier(event.tier),
        group=event.group,
        ownership=event.ownership,
        remaining=event.remaining if len(event.remaining) == len(event.engine_keys) else [],
    )


def stored_of(event: records.KeyedStored) -> tuple[Stored, list[bytes], list[bytes]]:
    """Return a stripped store as an event without tokens, its blocks' packed keys and, where they differ, their names.

    Raises:
        WireError: its parts do not fit each other.
    """
    if event.window_tokens < 0 or event.block_size_tokens < 0:
        raise WireError(f"window or block size is negative: {event.window_tokens}, {event.block_size_tokens}")
    width = event.keys_per_block * KEY_BYTES
    size = width * len(event.engine_keys)
    if width < 0 or len(event.block_keys) != size or len(event.names) not in (0, size):
        raise WireError(
            f"block_keys has {len(event.block_keys)} bytes, names {len(event.names)} for {len(event.engine_keys)} "
            f"engine keys of {event.keys_per_block} block keys each"
        )
    stored = Stored(
        keys=event.engine_keys,
        parent=event.parent,
        block_size_tokens=event.block_size_tokens,
        tier=Tier(event.tier),
        group=event.group,
        kind=None if event.kind < 0 else Kind(event.kind),
        window_tokens=event.window_tokens,
        lookahead=event.lookahead,
        ownership=event.ownership,
        unnamed=event.unnamed,
        bare=event.bare,
        session=event.session if is_hash(event.session) else "",
    )
    return stored, _cut(event.block_keys, width), _cut(event.names, width)


def _cut(packed: bytes, width: int) -> list[bytes]:
    return [packed[at : at + width] for at in range(0, len(packed), width)] if width else []


def check_stripped(events: Sequence[KeyedEvent], limits: Limits) -> None:
    """Check what a message may cost.

    Raises:
        LimitError: too many events, or too many engine keys.
    """
    keys = sum(0 if isinstance(event, records.KeyedCleared) else len(event.engine_keys) for event in events)
    if keys > limits.keys_per_batch or len(events) > limits.events_per_batch:
        raise LimitError(
            f"batch of {len(events)} events with {keys} engine keys is over the limits of "
            f"{limits.events_per_batch} and {limits.keys_per_batch}"
        )


def stripped_parts(event: KeyedEvent, most: int) -> Iterator[KeyedEvent]:
    """Yield stripped events of at most ``most`` blocks which together say what one says; malformed ones stay whole."""
    if isinstance(event, records.KeyedCleared) or len(event.engine_keys) <= most:
        yield event
        return
    if isinstance(event, records.KeyedRemoved):
        counted = len(event.remaining) == len(event.engine_keys)
        for at in range(0, len(event.engine_keys), most):
            some, left = event.engine_keys[at : at + most], event.remaining[at : at + most] if counted else []
            yield msgspec.structs.replace(event, engine_keys=some, remaining=left)
        return
    width = event.keys_per_block * KEY_BYTES
    size = width * len(event.engine_keys)
    if width < 0 or len(event.block_keys) != size or len(event.names) not in (0, size):
        yield event
        return
    for at in range(0, len(event.engine_keys), most):
        end = at + most
        yield msgspec.structs.replace(
            event,
            engine_keys=event.engine_keys[at:end],
            parent=event.engine_keys[at - 1] if at else event.parent,
            block_keys=event.block_keys[at * width : end * width],
            names=event.names[at * width : end * width],
        )
