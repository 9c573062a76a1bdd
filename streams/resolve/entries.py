"""What may stand in the ``engine_blocks`` table: the check of entries that come back from its changelog."""

from __future__ import annotations

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.streams.resolve import engine_blocks as eb


def is_entry(key: bytes, value: bytes) -> bool:
    """Tell whether a key and its value may stand in the table: both are what the module's text draws."""
    kind = key[eb.POD_BYTES : eb.POD_BYTES + 1]
    try:
        if kind == eb.KIND_BLOCK:
            return len(key) >= eb.PREFIX_BYTES and _is_block(value)
        if kind == eb.KIND_STATE:
            return len(key) == eb.POD_BYTES + 1 and bool(eb.decode_state(value))
        if kind == eb.KIND_OWNERS:
            return len(key) == eb.PREFIX_BYTES + KEY_BYTES and eb.decode_owners(value) is not None
        if kind == eb.KIND_TICKET:
            return len(key) == eb.POD_BYTES + 9 and bool(eb.decode_ticket(value))
        return kind == eb.KIND_WAITING and len(key) >= eb.PREFIX_BYTES and bool(eb.decode_waiting(value))
    except WireError:
        return False


def _is_block(value: bytes) -> bool:
    """Tell whether bytes are an engine block; of a plain one only the lengths can be wrong."""
    if len(value) < 2 or (body := len(value) - 2 - value[1] * eb.TIER.size) < 0:
        return False
    if value[0] == eb.PLAIN:
        return body > 0 and body % KEY_BYTES == 0
    link = eb.decode_block(value).link
    return len(link.keys) % KEY_BYTES == 0
