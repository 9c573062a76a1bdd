"""Stripped events, whose token ids never left the bridge, as the events that they were made of."""

from __future__ import annotations

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model import records
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.events import Kind, Removed, Stored, Tier


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
    )
    return stored, _cut(event.block_keys, width), _cut(event.names, width)


def _cut(packed: bytes, width: int) -> list[bytes]:
    return [packed[at : at + width] for at in range(0, len(packed), width)] if width else []
