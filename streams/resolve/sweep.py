"""The sweep of the ``engine_blocks`` table: what is dead in it, slice by slice.

The resolve agent never trusts an entry of an ended epoch, swept or not; the sweep only gives the space back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from kvatlas.bridge.errors import WireError
from kvatlas.bridge.model.epochs import epoch_of
from kvatlas.bridge.model.events import Tier
from kvatlas.bridge.model.records import GONE
from kvatlas.bridge.model.validity import Validity
from kvatlas.streams.index.apply import Swept, Validities
from kvatlas.streams.resolve import engine_blocks as eb

_KIND_AT = eb.POD_BYTES


def sweep_engine_blocks(
    items: Iterable[tuple[bytes, bytes]],
    valid: Validities,
    *,
    forget: Mapping[int, int] = MappingProxyType({}),
) -> Swept:
    """Find dead entries in a slice of the ``engine_blocks`` table.

    Args:
        items: (key, value) pairs as they are in the table now.
        valid: pod ref -> which of its entries count; those of a pod that is not in it stay. States stay in any
            case, so that what is late of a pod is still known to be late.
        forget: pod ref -> incarnation in which it was last seen, long ago: its state and what it knew of shared tiers
            go too, unless it came back.
    """
    puts: dict[bytes, bytes] = {}
    deletes: list[bytes] = []
    seen = dropped = 0
    for key, value in items:
        kind = key[_KIND_AT : _KIND_AT + 1]
        if kind == eb.KIND_STATE:
            last = forget.get(int.from_bytes(key[:_KIND_AT], "big"))
            if last is not None and _over(value, last):
                deletes.append(key)
                dropped += 1
            continue
        seen += 1
        ref = int.from_bytes(key[:_KIND_AT], "big")
        last = forget.get(ref)
        bounds = valid.get(ref) if last is None else Validity(epoch_of(last + 1))
        if bounds is None:
            continue
        if last is not None and kind == eb.KIND_BLOCK and _only_shared(value):
            deletes.append(key)
            dropped += 1
            continue
        alive = _alive(kind, value, bounds)
        if alive == value:
            continue
        dropped += 1
        if alive is None:
            deletes.append(key)
        else:
            puts[key] = alive
    return Swept(puts, deletes, seen, dropped)


def _over(value: bytes, incarnation: int) -> bool:
    """Tell whether a pod's state says that it is gone and has not been back since an incarnation."""
    try:
        state = eb.decode_state(value)
    except WireError:
        return False
    return state.state == GONE and state.incarnation <= incarnation


def _only_shared(value: bytes) -> bool:
    try:
        return set(eb.decode_block(value).levels()) == {int(Tier.SHARED)}
    except WireError:
        return False


def _alive(kind: bytes, value: bytes, bounds: Validity) -> bytes | None:
    """Return what is left of an entry, None for nothing. What cannot be read is left for resolve to report."""
    try:
        if kind == eb.KIND_BLOCK:
            return _live_block(value, bounds)
        if kind == eb.KIND_OWNERS:
            owners = eb.decode_owners(value)
            left = [owner for owner in owners if bounds.counts(owner.tier, owner.epoch)]
            return value if len(left) == len(owners) else (eb.encode_record(left) if left else None)
        if kind == eb.KIND_WAITING:
            return value if eb.decode_waiting(value).epoch >= bounds.valid_from else None
        if kind == eb.KIND_TICKET:
            return value if eb.decode_ticket(value).epoch >= bounds.valid_from else None
    except WireError:
        pass
    return value


def _live_block(value: bytes, bounds: Validity) -> bytes | None:
    block = eb.decode_block(value)
    tiers = {tier: held for tier, held in block.tiers.items() if bounds.counts(eb.tier_at(tier), held[1])}
    if len(tiers) == len(block.tiers) and tiers:
        return value
    if not tiers and (not block.link.finals or block.link.epoch < max(bounds.valid_from, bounds.gpu_valid_from)):
        return None
    if len(tiers) == len(block.tiers):
        return value
    block.tiers = tiers
    return eb.encode_block(block)
