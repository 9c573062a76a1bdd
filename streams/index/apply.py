r"""The index: ``kv-blocks`` records into the ``block_index`` table, and the sweep of what is dead in it.

The table has a value of packed holders (see :mod:`kvatlas.streams.index.holders`) under every 16-byte block key, and
one position per pod under a meta key, which is shorter so that the two never meet::

    key    | "\x00pod" 4 | pod ref 8 |
    value  | incarnation 8 | last sequence 8 |

A run is applied when it goes past its pod's position, and dropped whole otherwise. Positions compare incarnations
first and sequences second; clears do not count, since sequences go on through them.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from kvatlas.bridge.model.block_key import KEY_BYTES
from kvatlas.bridge.model.chain import split_keys
from kvatlas.bridge.model.epochs import incarnation_of
from kvatlas.bridge.model.validity import Validity
from kvatlas.streams.index.blocks_record import OP_ADD, OP_REMOVE, BlocksRecord, Run
from kvatlas.streams.index.holders import HOLDER, HOLDER_BYTES, add_holder, are_holders, remove_holder
from kvatlas.streams.index.view import BulkView, View

META_PREFIX: Final = b"\x00pod"
_POSITION: Final = struct.Struct(">QQ")


def meta_key(pod_ref: int) -> bytes:
    """Return the key of a pod's position in one partition of the table."""
    return META_PREFIX + pod_ref.to_bytes(8, "big")


def is_meta(key: bytes) -> bool:
    """Tell whether a table key is a pod's position and not a block key."""
    return len(key) != KEY_BYTES


def is_entry(key: bytes, value: bytes) -> bool:
    """Tell whether a key and its value may stand in the table: holders of a block, or a pod's position."""
    if len(key) == KEY_BYTES:
        return bool(value) and are_holders(value)
    return len(key) == len(META_PREFIX) + 8 and key.startswith(META_PREFIX) and len(value) == _POSITION.size


def position(view: View, pod_ref: int) -> tuple[int, int]:
    """Return the (incarnation, last sequence) applied for a pod; ``(-1, -1)`` before the first."""
    value = view.get(meta_key(pod_ref))
    if value is None:
        return -1, -1
    incarnation, sequence = _POSITION.unpack(value)
    return incarnation, sequence


def block_keys_of(record: BlocksRecord) -> list[bytes]:
    """Return the block keys of a record in order, for a prefetch."""
    return split_keys(record.keys)


def table_keys_of(record: BlocksRecord) -> list[bytes]:
    """Return every table key that applying a record reads: its block keys in order, then its pods' positions."""
    return [*block_keys_of(record), *(meta_key(run.pod_ref) for run in record.runs)]


def apply_blocks(
    view: BulkView, record: BlocksRecord, counts: Counter[str], *, table_keys: list[bytes] | None = None
) -> None:
    """Apply one ``kv-blocks`` record.

    Args:
        view: the partition that the record belongs to.
        record: from :func:`kvatlas.streams.index.holders.decode_blocks`.
        table_keys: from :func:`table_keys_of`, when the view has fetched them already.
        counts: ``updates`` and ``runs`` applied, ``updates_late`` and ``runs_late`` dropped,
            ``unchanged`` updates that found the index as they would leave it.
    """
    keys = table_keys
    if keys is None:
        keys = table_keys_of(record)
        view.prefetch(keys)
    at = 0
    for run in record.runs:
        end = at + run.updates
        if _past(view, run):
            _apply_run(view, record, keys, range(at, end), counts)
            counts["runs"] += 1
            counts["updates"] += run.updates
        else:
            counts["runs_late"] += 1
            counts["updates_late"] += run.updates
        at = end


def _past(view: View, run: Run) -> bool:
    """Tell whether a run is new, and move its pod's position when it is."""
    incarnation = incarnation_of(run.epoch)
    seen, found = position(view, run.pod_ref), (incarnation, run.last_sequence)
    if run.first_sequence > run.last_sequence:  # goes on from the record before, which moved the position
        return found >= seen
    if found <= seen:
        return False
    view.put(meta_key(run.pod_ref), _POSITION.pack(*found))
    return True


def _apply_run(view: BulkView, record: BlocksRecord, keys: list[bytes], updates: range, counts: Counter[str]) -> None:
    unchanged = 0
    for start, end, holder in _stretches(record, updates):
        some = keys[start:end]
        olds = view.get_many(some)
        writes = _added(some, olds, holder) if record.ops[start] == OP_ADD else _removed(some, olds, holder)
        view.write_all(writes)
        unchanged += len(some) - len(writes)
    if unchanged:
        counts["unchanged"] += unchanged


def _stretches(record: BlocksRecord, updates: range) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first update, end, holder) of neighbours with one operation and one holder: mostly a whole run.

    In such a stretch neither order nor repetition of keys matters, so all of it is looked up at once; and its entries
    share one object of bytes as long as they are in memory.
    """
    ops, holders = record.ops, record.holders
    at, last = updates.start, updates.stop
    while at < last:
        holder = holders[at * HOLDER_BYTES : (at + 1) * HOLDER_BYTES]
        other = ops.find(OP_ADD + OP_REMOVE - ops[at], at, last)
        end = last if other < 0 else other
        if at > updates.start or holders[at * HOLDER_BYTES : end * HOLDER_BYTES] != holder * (end - at):
            stop = at + 1
            while stop < end and holders.startswith(holder, stop * HOLDER_BYTES):
                stop += 1
            end = stop
        yield at, end, holder
        at = end


def _added(keys: list[bytes], olds: list[bytes | None], holder: bytes) -> dict[bytes, bytes | None]:
    """Return what is to be written where keys get a holder."""
    if olds.count(None) == len(olds):
        return dict.fromkeys(keys, holder)
    writes: dict[bytes, bytes | None] = {}
    for key, old in zip(keys, olds, strict=True):
        new = holder if old is None else add_holder(old, holder)
        if new != old:
            writes[key] = new
    return writes


def _removed(keys: list[bytes], olds: list[bytes | None], holder: bytes) -> dict[bytes, bytes | None]:
    """Return what is to be written where keys lose a holder."""
    if olds.count(holder) == len(olds):
        return dict.fromkeys(keys)
    writes: dict[bytes, bytes | None] = {}
    for key, old in zip(keys, olds, strict=True):
        if old is not None:
            new = remove_holder(old, holder)
            if len(new) < len(old):
                writes[key] = new or None
    return writes


# --- sweep --------------------------------------------------------------------------------------------------------


class Swept(NamedTuple):
    """What a slice of a sweep asks to be written.

    Attributes:
        puts: key -> new value, for entries of which a part is dead.
        deletes: keys of entries that are dead as a whole.
        seen: entries looked at.
        dropped: dead holders (or tiers, parked events, pods to be forgotten) found in them.
    """

    puts: dict[bytes, bytes]
    deletes: list[bytes]
    seen: int
    dropped: int


#: pod ref -> which of its entries count.
Validities = Mapping[int, Validity]


def sweep_index(
    items: Iterable[tuple[bytes, bytes]],
    valid: Validities,
    *,
    forget: Mapping[int, int] = MappingProxyType({}),
) -> Swept:
    """Find dead holders in a slice of the ``block_index`` table.

    Args:
        items: (key, value) pairs as they are in the table now; meta entries are left alone.
        valid: pod ref -> which of its entries count. A reference that is not in it (a shared store, a pod that
            this worker has not heard of yet) keeps its holders.
        forget: pod ref -> incarnation in which it was last seen, long ago: its position up to that one goes.
    """
    puts: dict[bytes, bytes] = {}
    deletes: list[bytes] = []
    seen = dropped = 0
    for key, value in items:
        if is_meta(key):
            last = forget.get(int.from_bytes(key[len(META_PREFIX) :], "big"))
            if last is not None and _POSITION.unpack(value)[0] <= last:
                deletes.append(key)
                dropped += 1
            continue
        seen += 1
        alive = live_holders(value, valid)
        if len(alive) == len(value):
            continue
        dropped += (len(value) - len(alive)) // HOLDER_BYTES
        if alive:
            puts[key] = alive
        else:
            deletes.append(key)
    return Swept(puts, deletes, seen, dropped)


def live_holders(value: bytes, valid: Validities) -> bytes:
    """Return the holders of a table value that are not dead, in the same order."""
    dead: list[int] = []
    for number, (pod_ref, _, tier, _, _, epoch) in enumerate(HOLDER.iter_unpack(value)):
        validity = valid.get(pod_ref)
        if validity is not None and not validity.counts(tier, epoch):
            dead.append(number)
    if not dead:
        return value
    lost = set(dead)
    return b"".join(
        [
            value[number * HOLDER_BYTES : (number + 1) * HOLDER_BYTES]
            for number in range(len(value) // HOLDER_BYTES)
            if number not in lost
        ]
    )
