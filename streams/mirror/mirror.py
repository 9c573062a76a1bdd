"""The index mirrored into Redis or Valkey, for programs that read an index there.

The mirror follows the table at a distance: a commit only notes which keys it changed, in memory and without waiting. A
task of its own sends the values that those keys have by then, so a slow server costs coalesced writes and never holds
the pipeline up. Life of a partition:

1. claim it (see :mod:`kvatlas.streams.mirror.layout`): writers are ordered by the generation of their assignment;
2. where the server's position is behind the table's, ask the changelog what changed since; where it cannot tell, copy
   the partition: remove the position, send every entry, remove what the table has not;
3. send changes, the position with the last of them; every write names claim and position and is refused when either
   is another's, so nothing goes back when a partition has moved, or when the server has lost writes.

What does not fit (``mirror_pending_keys``) is made good by a new copy.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from redis.exceptions import RedisError

from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.block_key import KEY_BYTES, partition_of
from kvatlas.streams import metrics
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition, token
from kvatlas.streams.mirror.part import MirrorSource, Part
from kvatlas.streams.mirror.server import LostError, MirrorServer
from kvatlas.streams.state.partition import PartitionState, Role

logger = logging.getLogger(__name__)

_CHUNK: Final = 1_000
_PIPELINE_KEYS: Final = 8 * _CHUNK
_TICK_SECONDS: Final = 2.0
_GATHER_SECONDS: Final = 0.005
_BACKOFF_MOST_SECONDS: Final = 5.0
_REMOVE: Final = b"-"
_COPYING: Final = b""
_REFUSED: Final = -1.0


class Mirror:
    """Keeps the worker's partitions of the index in a server.

    Args:
        server: closed by :meth:`run`.
        worker: the worker's id.
        layout: what is mirrored.
        source: the worker.
        address: of the server, for the log.
        pending_keys: changed keys that may wait, all partitions together.
    """

    def __init__(
        self,
        server: MirrorServer,
        *,
        worker: str,
        layout: MirrorLayout,
        source: MirrorSource,
        address: str = "",
        pending_keys: int = 1_000_000,
    ) -> None:
        self._server = server
        self._worker = worker
        self._layout = layout
        self._source = source
        self._address = address
        self._most = pending_keys
        self._pending = 0
        self._parts: dict[int, Part] = {}
        self._wake = asyncio.Event()
        self._laid_out = False
        self._others = ""

    # --- told by the worker, never waiting ------------------------------------------------------------------------

    def note(self, partition: int, keys: Iterable[bytes], before: int | None, after: int) -> None:
        """Note what a commit changed.

        Args:
            partition: the table's partition.
            keys: table keys written or removed.
            before: changelog offset that the table reflected before it, None for none.
            after: changelog offset that it reflects now.
        """
        part = self._parts.setdefault(partition, Part())
        start = -1 if before is None else before
        if part.through is None:
            part.base = start
        elif part.through != start:
            part.copy = True
        part.through = after
        if not part.dirty:
            part.since = time.monotonic()
        self._put(part, (key for key in keys if len(key) == KEY_BYTES))
        if self._pending > self._most:
            largest = max(self._parts.values(), key=lambda part: len(part.dirty))
            self._take(largest)
            largest.copy = True
            metrics.MIRROR_OVERFLOWS.inc()
        self._wake.set()

    def note_pod(self, pod: str) -> None:
        """Note that what is known of a pod changed."""
        part = self._parts.get(self._partition(pod))
        if part is not None:
            part.pods.add(pod)
            self._wake.set()

    def _put(self, part: Part, keys: Iterable[bytes]) -> None:
        held = len(part.dirty)
        part.dirty.update(dict.fromkeys(keys))
        self._pending += len(part.dirty) - held

    def _take(self, part: Part) -> list[bytes]:
        keys, part.dirty = list(part.dirty), {}
        self._pending -= len(keys)
        return keys

    def _partition(self, pod: str) -> int:
        return pod_ids.pod_partition(pod, self._layout.partitions)

    # --- the task -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Mirror until cancelled; errors of the server are counted, logged at first, and tried again."""
        failures = 0
        try:
            while True:
                try:
                    await self.turn()
                except (RedisError, OSError, TimeoutError) as error:
                    pause = min(0.1 * 2**failures, _BACKOFF_MOST_SECONDS)
                    text = f"mirror at {self._address}: {type(error).__name__}: {error}"
                    (logger.warning if failures in (0, 10) else logger.debug)("%s; tried again in %.1f s", text, pause)
                    failures += 1
                    metrics.MIRROR_ERRORS.inc()
                    self._laid_out = False
                    for part in self._parts.values():
                        part.position = None  # it has to be read again
                    self._gauges()
                    await asyncio.sleep(pause)
                    continue
                failures = 0
                self._gauges()
                await self._pause()
        finally:
            await self._server.close()

    async def _pause(self) -> None:
        """Wait for something to do, then a little for what comes with it."""
        if not any(part.position is not None and (part.dirty or part.pods) for part in self._parts.values()):
            self._wake.clear()
            try:
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                return
        await asyncio.sleep(_GATHER_SECONDS)

    async def turn(self) -> None:
        """Bring every partition of this worker up to what the table has now.

        Raises:
            RedisError: the server does not answer as it should; what was to be sent is kept.
            OSError: it cannot be reached.
        """
        mine = self._mine()
        if not mine or not self._source.pods_known() or not await self._agree():
            return
        copies = []
        for number, state in mine.items():
            part = self._parts.setdefault(number, Part())
            try:
                if not await self._hold(number, part, state):
                    continue
                await self._send_pods(number, part)
                await self._catch_up(number, part)
                if part.copy:
                    copies.append(number)
                else:
                    await self._drain(number, part, state)
            except LostError:
                part.position = None
        if copies:
            await self._copy(copies)

    def _mine(self) -> dict[int, PartitionState]:
        """Return the partitions to be mirrored from here, and forget what is known of others."""
        states = self._source.states()
        for number in self._parts.keys() - states.keys():
            self._take(self._parts.pop(number))
        mine = {number: state for number, state in states.items() if state.role is Role.ACTIVE}
        for number in self._parts.keys() - mine.keys():
            self._parts[number].position = None
        return mine

    async def _agree(self) -> bool:
        if not self._laid_out:
            others = await self._server.agree(self._layout)
            if others and others != self._others:
                text = "workers of another layout write there (%s): choose another prefix, or end them"
                logger.error("mirror at %s: " + text, self._address, others)
            self._laid_out, self._others = not others, others
            if others:
                metrics.MIRROR_REFUSED.inc()
        return self._laid_out

    async def _hold(self, number: int, part: Part, state: PartitionState) -> bool:
        """Claim a partition and find out where the server stands; False while it is another's."""
        now = time.monotonic()
        mine = token(self._source.generation(), self._worker)
        if part.position is None or part.token != mine or now - part.claimed_at >= _TICK_SECONDS:
            ours, found = await self._server.claim(number, mine)
            if not ours:
                if part.claimed_at != _REFUSED:
                    logger.info("mirror: partition %d is claimed by %s", number, found[8:].decode("utf-8", "replace"))
                self._take(part)
                part.claimed_at, part.position, part.copy = _REFUSED, None, True
                metrics.MIRROR_REFUSED.inc()
                return False
            part.token, part.claimed_at = mine, now
        else:
            found = part.position
        at = -1 if state.changelog_offset is None else state.changelog_offset
        if part.through is None:
            part.base = part.through = at
        elif part.through != at:  # the table moved on by another way than a commit here
            part.copy = True
        if part.position != found:
            part.stand(found)
        return True

    async def _catch_up(self, number: int, part: Part) -> None:
        """Where the server is behind, take what changed from the changelog."""
        behind, part.behind = part.behind, None
        if behind is None or part.copy:
            return
        assert part.base is not None
        keys = await self._source.changed(number, behind, part.base)
        if keys is None or len(keys) + self._pending > self._most:
            part.copy = True
        else:
            self._put(part, keys)
            part.base = behind.changelog_offset

    # --- changes --------------------------------------------------------------------------------------------------

    async def _drain(self, number: int, part: Part, state: PartitionState) -> None:
        """Send what changed, the position with the last of it.

        Raises:
            LostError: refused; what changed is kept.
        """
        if part.copy or (part.through == part.base and not part.dirty):
            return
        through, began = part.through, time.monotonic()
        assert through is not None
        after = MirrorPosition(through, state.meta.source_offset, state.meta.receive_ns, state.meta.written_ns).pack()
        keys = self._take(part)
        part.tried = through
        try:
            await self._send(number, part, state, keys, after)
        except BaseException:
            self._put(part, keys)
            raise
        part.base, part.position, part.tried, part.since = through, after, None, began

    async def _send(
        self, number: int, part: Part, state: PartitionState, keys: Sequence[bytes], after: bytes = b""
    ) -> None:
        """Send the values that keys have now; with ``after``, the new position with the last of them."""
        for start in range(0, max(len(keys), 1), _PIPELINE_KEYS):
            if self._source.states().get(number) is not state:  # closed while we waited
                raise LostError
            end = min(start + _PIPELINE_KEYS, len(keys))
            parts = [keys[at : min(at + _CHUNK, end)] for at in range(start, max(end, 1), _CHUNK)]
            chunks = [(part_keys, state.get_many(part_keys)) for part_keys in parts]
            await self._server.write(part.held(number), chunks, after if end == len(keys) else b"")

    async def _send_pods(self, number: int, part: Part) -> None:
        """Send what changed of the partition's pods; before its blocks, so that risen epochs are seen first."""
        fields: dict[bytes, bytes] = {}
        if part.all_pods:
            for pod in self._source.pods():
                if self._partition(pod.pod) == number:
                    fields[pod.pod.encode()] = records.encode(pod)
            for field in await self._server.pod_names(number):
                fields.setdefault(field, b"")
        taken, part.pods = part.pods, set()
        for name in taken:
            record = self._source.pod(name)
            fields[name.encode()] = b"" if record is None else records.encode(record)
        try:
            if fields:
                await self._server.write_pods(part.held(number), fields)
        except BaseException:
            part.pods |= taken
            raise
        part.all_pods = False

    # --- copies ---------------------------------------------------------------------------------------------------

    async def _copy(self, numbers: Sequence[int]) -> None:
        """Copy whole partitions, and remove what the tables have not in one pass over the server's keys."""
        begun: dict[int, tuple[Part, PartitionState]] = {}
        for number in numbers:
            state, part = self._source.states().get(number), self._parts.get(number)
            if state is None or part is None or part.position is None:
                continue
            try:
                await self._copy_entries(number, part, state)
            except LostError:
                part.position = None
            else:
                begun[number] = (part, state)
        await self._remove_strangers(begun)
        for number, (part, state) in begun.items():
            if part.position == _COPYING and not part.copy:
                part.base = None  # the position has to be written, whether anything changed meanwhile or not
                try:
                    await self._drain(number, part, state)
                except LostError:
                    part.position = None

    async def _copy_entries(self, number: int, part: Part, state: PartitionState) -> None:
        metrics.MIRROR_COPIES.inc()
        await self._server.write(part.held(number), [((), ())], _REMOVE)
        part.position, part.since = _COPYING, time.monotonic()
        self._take(part)
        part.copy, part.through = False, -1 if state.changelog_offset is None else state.changelog_offset
        start = b""
        while self._source.states().get(number) is state and state.role is Role.ACTIVE:
            found = list(itertools.islice(state.items(start), _CHUNK))
            entries = [pair for pair in found if len(pair[0]) == KEY_BYTES]
            chunk = ([key for key, _ in entries], [value for _, value in entries])
            await self._server.write(part.held(number), [chunk])
            if len(part.dirty) > _CHUNK:  # sent as it comes, so that what waits does not grow with the copy
                await self._send(number, part, state, self._take(part))
            if len(found) < _CHUNK:
                return
            start = found[-1][0] + b"\x00"
            await self._keep(number, part)
        raise LostError

    async def _keep(self, number: int, part: Part) -> None:
        """Renew a claim in the course of a long copy."""
        if time.monotonic() - part.claimed_at >= _TICK_SECONDS:
            ours, _ = await self._server.claim(number, part.token)
            if not ours:
                raise LostError
            part.claimed_at = time.monotonic()

    async def _remove_strangers(self, begun: Mapping[int, tuple[Part, PartitionState]]) -> None:
        """Remove the server's entries of copied partitions that the tables have not."""
        cursor = 0
        while begun:
            cursor, found = await self._server.scan(cursor)
            by_partition: dict[int, list[bytes]] = {}
            for key in found:
                number = partition_of(key, self._layout.partitions)
                if number in begun:
                    by_partition.setdefault(number, []).append(key)
            for number, keys in by_partition.items():
                part, state = begun[number]
                if part.position != _COPYING or self._source.states().get(number) is not state:
                    continue
                absent = [key for key, value in zip(keys, state.fetch(keys), strict=True) if value is None]
                try:
                    await self._server.write(part.held(number), [(absent, [None] * len(absent))])
                    await self._keep(number, part)
                except LostError:
                    part.position = None
            if not cursor:
                return

    # --- metrics --------------------------------------------------------------------------------------------------

    def _gauges(self) -> None:
        behind = [part.since for part in self._parts.values() if part.claimed_at >= 0 and (part.dirty or part.copy)]
        metrics.MIRROR_LAG_SECONDS.set(time.monotonic() - min(behind) if behind else 0.0)
        metrics.MIRROR_PENDING.set(self._pending)
