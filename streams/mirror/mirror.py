"""The index mirrored into Redis or Valkey, for programs that read an index there.

The mirror follows the compacted changelog of ``block_index`` as a standby does: values in the order in which they were
committed, those of replaced writers dropped. So a slow server only makes it read later, and it can run in a worker or
in a process of its own. Life of a partition, as a group of mirrors shares them out:

1. claim it (see :mod:`kvatlas.streams.mirror.layout`): writers are ordered by the generation of their assignment;
2. go on behind the position that the server has; where it has none, or the changelog cannot tell what was removed
   since, copy the partition: take position and entries away and read the changelog from its beginning;
3. send what comes, the position with the last of it; every write names claim and position and is refused when either
   is another's, so nothing goes back when a partition has moved, or when the server has lost writes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final

from redis.exceptions import RedisError

from kvatlas.bridge.errors import LogError
from kvatlas.bridge.kafka.member import Assignment, GroupMember
from kvatlas.bridge.kafka.ranges import Edges
from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.block_key import KEY_BYTES, partition_of
from kvatlas.bridge.model.directory import PodDirectory
from kvatlas.streams import metrics
from kvatlas.streams.index.holders import HOLDER_BYTES
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition, position_of, token
from kvatlas.streams.mirror.server import LostError, MirroredPartition, MirrorServer
from kvatlas.streams.state.changelog import META_KEY, Meta
from kvatlas.streams.state.claims import Filter

logger = logging.getLogger(__name__)

_CHUNK: Final = 1_000
_PIPELINE_KEYS: Final = 8 * _CHUNK
_FETCH_RECORDS: Final = 16_000
_POLL_MS: Final = 200
_TICK_SECONDS: Final = 2.0
_BACKOFF_MOST_SECONDS: Final = 5.0
_REMOVE: Final = b"-"
_NONE: Final = b""


class _Part:
    """One partition's way into the mirror.

    Attributes:
        held: claim and position that every write names; None until the server was asked.
        writers: drops what replaced writers wrote.
        sent: changelog offset up to which everything is in the server.
        next: offset that is read next.
        copy_to: offset up to which a copy has to come before the position is written; None when it is none.
        claimed_at: monotonic time of the last claim, seconds.
        at_end: monotonic time when nothing was left to be sent, seconds.
    """

    def __init__(self) -> None:
        self.held: MirroredPartition | None = None
        self.writers = Filter(Meta())
        self.sent = -1
        self.next = 0
        self.copy_to: int | None = None
        self.claimed_at = 0.0
        self.at_end = time.monotonic()
        self.refused = False
        self.pods: set[str] = set()
        self.all_pods = True


class Mirror:
    """Keeps the partitions of the index that its group gives it in a server.

    Args:
        server: closed by :meth:`run`.
        source: the changelog, as a member of the mirrors' group.
        pods: what ``kv-pods`` says; its ``on_changed`` is taken.
        pods_known: set once ``kv-pods`` has been read to what was its end.
        name: of this mirror among others.
        layout: what is mirrored.
        max_age_seconds: a compacted topic forgets what was removed before that.
        address: of the server, for the log.
    """

    def __init__(
        self,
        server: MirrorServer,
        source: GroupMember,
        *,
        pods: PodDirectory,
        pods_known: asyncio.Event,
        name: str,
        layout: MirrorLayout,
        max_age_seconds: float,
        address: str = "",
    ) -> None:
        self._server, self._source = server, source
        self._pods, self._pods_known = pods, pods_known
        self._name, self._layout, self._address = name, layout, address
        self._max_age_ns = max_age_seconds * 1e9
        self._parts: dict[int, _Part] = {}
        self._given = Assignment()
        self._laid_out = False
        self._others = ""
        pods.on_changed = lambda pod, _before, _after: self._note_pod(pod)

    def _note_pod(self, pod: str) -> None:
        part = self._parts.get(pod_ids.pod_partition(pod, self._layout.partitions))
        if part is not None:
            part.pods.add(pod)

    # --- the task -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Mirror until cancelled; errors of Kafka and of the server are counted, logged at first, and tried again."""
        failures = 0
        try:
            await self._pods_known.wait()
            while True:
                try:
                    await self.turn()
                    failures = 0
                except (RedisError, LogError, OSError, TimeoutError) as error:
                    pause = min(0.1 * 2**failures, _BACKOFF_MOST_SECONDS)
                    text = f"mirror at {self._address}: {type(error).__name__}: {error}"
                    (logger.warning if failures in (0, 10) else logger.debug)("%s; tried again in %.1f s", text, pause)
                    failures += 1
                    metrics.MIRROR_ERRORS.inc()
                    self._laid_out = False
                    self._forget()
                    if isinstance(error, LogError):
                        await self._source.leave()
                    await asyncio.sleep(pause)
                self._gauges()
        finally:
            await self._source.leave()
            await self._server.close()

    async def turn(self) -> None:
        """Send what the changelog has next of our partitions, and what changed of their pods.

        Raises:
            RedisError: the server does not answer as it should.
            OSError: it cannot be reached.
            LogError: Kafka does not answer.
        """
        mine = await self._mine()
        if not mine or not await self._agree():
            await asyncio.sleep(_POLL_MS / 1000)
            return
        await self._hold(mine)
        held = [number for number in mine if self._parts[number].held is not None]
        for number in held:
            await self._or_lost(number, self._send_pods)
        batches = await self._source.fetch(held, timeout_ms=_POLL_MS, max_records=_FETCH_RECORDS) if held else {}
        if not held:
            await asyncio.sleep(_POLL_MS / 1000)
        for number in held:
            if batch := batches.get(number):
                await self._or_lost(number, lambda at, part, batch=batch: self._take(at, part, batch))
            else:
                await self._or_lost(number, self._end_of_copy)

    async def _mine(self) -> list[int]:
        """Return our partitions, and forget what is known of others, and of all after a new assignment."""
        given = await self._source.assignment()
        if given.number != self._given.number:
            self._forget()
        self._given = given
        for number in self._parts.keys() - given.partitions:
            del self._parts[number]
        for number in given.partitions:
            self._parts.setdefault(number, _Part())
        return sorted(given.partitions)

    def _forget(self) -> None:
        for part in self._parts.values():
            part.held = None

    async def _or_lost(self, number: int, work: Any) -> None:
        """Do something that the server may refuse; then it is asked again where it stands."""
        part = self._parts[number]
        if part.held is not None:
            try:
                await work(number, part)
            except LostError:
                part.held = None

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

    # --- where to go on -------------------------------------------------------------------------------------------

    async def _hold(self, mine: Sequence[int]) -> None:
        """Claim our partitions, and find out where to go on with those of which we do not know."""
        copies: dict[int, Edges] = {}
        for number in mine:
            part = self._parts[number]
            if part.held is not None and time.monotonic() - part.claimed_at < _TICK_SECONDS:
                continue
            found = await self._claim(number, part)
            if found is None or (part.held is not None and part.held.position == found):
                continue
            edge = await self._source.edge(number)
            part.held = MirroredPartition(number, self._token, found)
            part.all_pods, part.copy_to = True, None
            known = position_of(found)
            if known is None or not self._tells(known, edge):
                copies[number] = edge
                continue
            # The record at the position tells who the writer is, where compaction has left it.
            part.writers, part.sent = Filter(Meta()), known.changelog_offset
            self._go_on(number, part, max(known.changelog_offset, edge.first))
        if copies:
            await self._begin_copies(copies)

    @property
    def _token(self) -> bytes:
        return token(self._given.generation, self._name)

    async def _claim(self, number: int, part: _Part) -> bytes | None:
        ours, found = await self._server.claim(number, self._token)
        if ours:
            part.claimed_at, part.refused = time.monotonic(), False
            return found
        if not part.refused:
            logger.info("mirror: partition %d is claimed by %s", number, found[8:].decode("utf-8", "replace"))
        part.held, part.refused = None, True
        metrics.MIRROR_REFUSED.inc()
        return None

    def _tells(self, known: MirrorPosition, edge: Edges) -> bool:
        """Return whether the changelog still has all that came behind a position, removals too."""
        if known.changelog_offset < 0:
            return edge.first == 0
        young = time.time_ns() - known.committed_ns < self._max_age_ns
        return young and edge.first - 1 <= known.changelog_offset < edge.end

    async def _begin_copies(self, copies: dict[int, Edges]) -> None:
        """Take positions and entries of partitions away, in one pass over the server's keys, and begin anew."""
        for number in copies:
            metrics.MIRROR_COPIES.inc()
            await self._or_lost(number, lambda _at, part: self._write(part, [], [], _REMOVE))
        cursor = 0
        while True:
            cursor, found = await self._server.scan(cursor)
            by_partition: dict[int, list[bytes]] = {}
            for key in found:
                by_partition.setdefault(partition_of(key, self._layout.partitions), []).append(key)
            for number in copies.keys() & by_partition.keys():
                gone = by_partition[number]
                await self._or_lost(number, lambda _at, part, gone=gone: self._write(part, gone, [None] * len(gone)))
            for number, part in self._parts.items():
                if part.held is not None and time.monotonic() - part.claimed_at >= _TICK_SECONDS:
                    await self._claim(number, part)
            if not cursor:
                break
        for number, edge in copies.items():
            part = self._parts[number]
            if part.held is not None:
                part.writers, part.sent, part.copy_to = Filter(Meta()), -1, edge.end
                self._go_on(number, part, edge.first)

    def _go_on(self, number: int, part: _Part, offset: int) -> None:
        part.next = offset
        self._source.go_on(number, offset)

    # --- changes --------------------------------------------------------------------------------------------------

    async def _take(self, number: int, part: _Part, batch: Sequence[Any]) -> None:
        """Send what a stretch of the changelog leaves of its keys.

        Raises:
            LostError: refused.
        """
        if await self._broken(number, part, batch[0].offset):
            logger.warning("mirror: the changelog of partition %d does not go on behind %d", number, part.next - 1)
            await self._write(part, [], [], _REMOVE)
            part.held = None
            return
        part.next = batch[-1].offset + 1
        latest: dict[bytes, bytes | None] = {}
        writers, unreadable = part.writers, 0
        for record in batch:
            key, value = record.key, record.value
            if key == META_KEY:
                writers.take(value)
            elif key is None or len(key) != KEY_BYTES or (value is not None and len(value) % HOLDER_BYTES):
                unreadable += 1
            elif record.offset > part.sent and not writers.dropping:
                latest[key] = value
        if unreadable:
            metrics.UNREADABLE.inc(unreadable)
        end = batch[-1].offset
        whole = not writers.dropping and end > part.sent and (part.copy_to is None or end + 1 >= part.copy_to)
        await self._write(part, list(latest), list(latest.values()), self._position(part, end) if whole else _NONE)
        if not writers.dropping:
            part.sent = max(part.sent, end)
        if whole:
            part.copy_to = None
        if end + 1 >= self._source.end(number):
            part.at_end = time.monotonic()

    async def _broken(self, number: int, part: _Part, offset: int) -> bool:
        """Return whether what was to come next is gone: the topic was made anew, or its beginning removed."""
        if offset < part.next:
            return True
        jumped = offset > part.next and part.copy_to is None  # compaction does that too
        return jumped and (await self._source.edge(number)).first > part.next

    async def _end_of_copy(self, number: int, part: _Part) -> None:
        """Write the position of a copy behind whose last record compaction left nothing, or that had none.

        Raises:
            LostError: refused.
        """
        if part.copy_to is not None and await self._source.position(number) >= part.copy_to:
            await self._write(part, [], [], self._position(part, part.copy_to - 1))
            part.sent, part.copy_to = part.copy_to - 1, None
        if part.copy_to is None:
            part.at_end = time.monotonic()

    @staticmethod
    def _position(part: _Part, offset: int) -> bytes:
        meta = part.writers.meta
        return MirrorPosition(offset, meta.source_offset, meta.receive_ns, meta.written_ns).pack()

    async def _write(
        self, part: _Part, keys: Sequence[bytes], values: Sequence[bytes | None], after: bytes = _NONE
    ) -> None:
        """Write entries, and with the last of them the position, a pipeline at a time.

        Raises:
            LostError: refused.
        """
        if not keys and not after:
            return
        for start in range(0, max(len(keys), 1), _PIPELINE_KEYS):
            assert part.held is not None
            end = min(start + _PIPELINE_KEYS, len(keys))
            chunks = [
                (keys[at : min(at + _CHUNK, end)], values[at : min(at + _CHUNK, end)])
                for at in range(start, max(end, 1), _CHUNK)
            ]
            await self._server.write(part.held, chunks, after if end == len(keys) else _NONE)
        if after and part.held is not None:
            part.held = part.held._replace(position=_NONE if after == _REMOVE else after)

    async def _send_pods(self, number: int, part: _Part) -> None:
        """Send what changed of the partition's pods; before its blocks, so that risen epochs are seen first.

        Raises:
            LostError: refused.
        """
        assert part.held is not None
        fields: dict[bytes, bytes] = {}
        if part.all_pods:
            for pod in self._pods.records():
                if pod_ids.pod_partition(pod.pod, self._layout.partitions) == number:
                    fields[pod.pod.encode()] = records.encode(pod)
            for field in await self._server.pod_names(number):
                fields.setdefault(field, b"")
        taken, part.pods = part.pods, set()
        for name in taken:
            record = self._pods.merged.get(name)
            fields[name.encode()] = b"" if record is None else records.encode(record)
        try:
            if fields:
                await self._server.write_pods(part.held, fields)
        except BaseException:
            part.pods |= taken
            raise
        part.all_pods = False

    # --- metrics --------------------------------------------------------------------------------------------------

    def _gauges(self) -> None:
        now = time.monotonic()
        kept = [part for part in self._parts.values() if not part.refused]
        metrics.MIRROR_LAG_SECONDS.set(max((now - part.at_end for part in kept), default=0.0))
        metrics.MIRROR_PENDING.set(
            sum(max(self._source.end(at) - part.sent - 1, 0) for at, part in self._parts.items() if not part.refused)
        )
