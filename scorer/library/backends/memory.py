"""The index in this process's memory, bounded by entries or by bytes."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kvatlas.bridge.model.validity import Validity
from kvatlas.scorer.errors import InputError
from kvatlas.scorer.library.backends.base import Stats, slices
from kvatlas.scorer.library.backends.sketch import FrequencySketch
from kvatlas.streams.index.apply import Validities, apply_blocks, is_meta, sweep_index
from kvatlas.streams.index.blocks_record import BlocksRecord
from kvatlas.streams.index.view import write_each

#: What one entry costs beside its bytes: key and value objects, and their places in the ordered dict (measured).
ENTRY_OVERHEAD_BYTES: Final = 220
_SWEEP_SLICE: Final = 5_000


class MemoryBackend:
    """Least recently used entries go first.

    Bounded by bytes, an entry must also earn its place: a new block is taken only when it has been asked for at least
    as often as the one it would displace, so that a scan of prompts seen once does not flush what everybody shares.

    Args:
        max_entries: block keys kept; None for no bound by entries.
        max_bytes: memory kept, with what Python adds; None for no bound by bytes.

    Raises:
        InputError: a bound below 1.
    """

    name = "memory"

    def __init__(self, max_entries: int | None = 4_000_000, max_bytes: int | None = None) -> None:
        for name, bound in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if bound is not None and bound < 1:
                raise InputError(f"{name}: {bound}; expected at least 1, or None for no such bound")
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._meta: dict[bytes, bytes] = {}
        self._bytes = 0
        self._sketch = FrequencySketch() if max_bytes is not None else None
        self._counts: Counter[str] = Counter()
        self._evicted = 0
        self._refused = 0

    async def start(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to let go of."""

    async def lookup(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the packed holders of each key, empty bytes where nobody holds it."""
        return self.lookup_now(keys)

    def lookup_now(self, keys: Sequence[bytes]) -> list[bytes]:
        """The same without a loop."""
        entries = self._entries
        get = entries.get
        found = [get(key, b"") for key in keys]
        move = entries.move_to_end
        if self._sketch is not None:
            self._sketch.add_all(keys)
        for key, value in zip(reversed(keys), reversed(found), strict=True):
            # From the last to the first, so that a prefix outlives what hangs on it.
            if value:
                move(key)
        return found

    async def apply(self, record: BlocksRecord) -> None:
        """Apply a record of updates; one that was applied before changes nothing."""
        self.apply_now(record)

    def apply_now(self, record: BlocksRecord) -> None:
        """The same without a loop."""
        apply_blocks(self, record, self._counts)
        self.shrink()

    # --- the view that the pure functions write through -----------------------------------------------------------

    def get(self, key: bytes) -> bytes | None:
        """Return a value as the index functions see it."""
        return (self._meta if is_meta(key) else self._entries).get(key)

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        if is_meta(key):
            self._meta[key] = value
            return
        if self._max_bytes is not None:
            old = self._entries.get(key)
            if old is None:
                if not self._admitted(key, len(value)):
                    self._refused += 1
                    return
                self._bytes += len(key) + ENTRY_OVERHEAD_BYTES
            self._bytes += len(value) - len(old or b"")
        self._entries[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""
        old = self._entries.pop(key, None)
        if old is not None and self._max_bytes is not None:
            self._bytes -= len(key) + len(old) + ENTRY_OVERHEAD_BYTES

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return values of blocks in order."""
        return list(map(self._entries.get, keys))

    def write_all(self, writes: Mapping[bytes, bytes | None]) -> None:
        """Write values, None removes."""
        write_each(self, writes)

    def clear(self) -> None:
        """Remove everything."""
        self._entries.clear()
        self._meta.clear()
        self._bytes = 0

    def prefetch(self, keys: Iterable[bytes]) -> None:
        """Do nothing: everything is here."""

    def _admitted(self, key: bytes, size: int) -> bool:
        assert self._sketch is not None
        assert self._max_bytes is not None
        entries = self._entries
        need = size + len(key) + ENTRY_OVERHEAD_BYTES
        while self._bytes + need > self._max_bytes and entries:
            victim = next(iter(entries))
            if self._sketch.estimate(key) < self._sketch.estimate(victim):
                # A second chance for the victim, so that the next newcomer is measured against the next in line.
                entries.move_to_end(victim)
                return False
            self.delete(victim)
            self._evicted += 1
        return True

    def shrink(self) -> None:
        """Forget what is beyond the bounds; for whoever writes through the view."""
        entries = self._entries
        if self._max_entries is not None:
            while len(entries) > self._max_entries:
                entries.popitem(last=False)
                self._evicted += 1
        if self._max_bytes is not None:
            while self._bytes > self._max_bytes and entries:
                key, value = entries.popitem(last=False)
                self._bytes -= len(key) + len(value) + ENTRY_OVERHEAD_BYTES
                self._evicted += 1

    async def drop_epoch(self, pod_ref: int, valid_from: int, gpu_valid_from: int = 0) -> int:
        """Remove the entries of a pod's ended epochs."""
        return await self.drop_epochs({pod_ref: Validity(valid_from, gpu_valid_from)})

    async def drop_epochs(self, valid: Validities) -> int:
        """The same for several pods in one pass; lets the loop go on between slices."""
        dropped = 0
        for part in slices(list(self._entries), _SWEEP_SLICE):
            found = sweep_index(((key, value) for key in part if (value := self._entries.get(key))), valid)
            for key, value in found.puts.items():
                self.put(key, value)
            for key in found.deletes:
                self.delete(key)
            dropped += found.dropped
            await asyncio.sleep(0)
        return dropped

    async def stats(self) -> Stats:
        """Return what it says of itself."""
        entries = len(self._entries)
        if self._max_bytes is None:
            sample = sum(len(value) for value in (self._entries[key] for key in list(self._entries)[:1000]))
            taken = entries * (16 + ENTRY_OVERHEAD_BYTES) + sample * entries // max(min(entries, 1000), 1)
        else:
            taken = self._bytes
        return Stats(
            backend=self.name,
            entries=entries,
            bytes=taken,
            evicted=self._evicted,
            refused=self._refused,
            updates=self._counts["updates"],
            late=self._counts["updates_late"],
        )
