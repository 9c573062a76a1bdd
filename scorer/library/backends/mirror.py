"""Reading the index that workers mirror into a Redis or Valkey server (``kvatlas worker --mirror``).

The mirror has everything that a score needs: the entries, the pods with their epochs, and for each partition how far it
is mirrored (see :mod:`kvatlas.streams.mirror.layout`). A reader writes nothing and needs the right to read only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from redis.exceptions import RedisError

from kvatlas.bridge.model.block_key import KEY_VERSION, partition_of
from kvatlas.bridge.model.pod_ids import WRITER_BRIDGE, pod_key
from kvatlas.bridge.runtime.tasks import end_tasks
from kvatlas.scorer.library.backends.base import Stats
from kvatlas.scorer.library.backends.errors import BackendError, ReadOnlyError, SchemaError
from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.streams.index.apply import Validities
from kvatlas.streams.index.blocks_record import BlocksRecord
from kvatlas.streams.index.holders import readable
from kvatlas.streams.mirror.layout import MirrorLayout, MirrorPosition, Names, position_of
from kvatlas.streams.mirror.redis_link import connect, where

log = logging.getLogger(__name__)

_MGET: Final = 1_024
_POLL_SECONDS: Final = 0.2
_T = TypeVar("_T")


class Snapshot(NamedTuple):
    """What a mirror says beside its entries.

    Attributes:
        pods: pod id -> its record, encoded.
        positions: partition -> how far it is mirrored, None while it is being copied.
        unkept: partitions that no worker keeps at present: what they have only ages.
    """

    pods: dict[bytes, bytes]
    positions: dict[int, MirrorPosition | None]
    unkept: frozenset[int]


class MirrorBackend:
    """The mirror as an index backend that can only be read.

    Args:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``, with the ACL user and password when there is one.
        prefix: the workers' ``mirror_prefix``.
        cafile: CA certificates for ``rediss://``; empty takes the system's.
        password_file: file that holds the password.
        timeout_seconds: for one exchange with the server.
        lookup_seconds: for one lookup with all its tries; a score must not wait for a server that hangs.

    Attributes:
        layout: partitions and block size, once started.
        seen: as last polled.
    """

    name = "mirror"

    def __init__(
        self,
        url: str = "redis://127.0.0.1:6379/0",
        prefix: str = "kvatlas",
        *,
        cafile: str = "",
        password_file: str = "",
        timeout_seconds: float = 2.0,
        lookup_seconds: float = 1.0,
    ) -> None:
        self.layout = MirrorLayout(partitions=0, block_size_tokens=0, index_version="")
        self.seen = Snapshot({}, {}, frozenset())
        self._where = where(url)
        self._prefix = prefix
        self._lookup_seconds = lookup_seconds
        self._names = Names(prefix)
        self._client: Any = connect(
            url, cafile=cafile, password_file=password_file, timeout_seconds=timeout_seconds, retries=2
        )
        self._uncopied: frozenset[int] = frozenset()

    async def start(self) -> None:
        """Read the layout.

        Raises:
            BackendError: no server answers there, it refuses the user, or it has no such mirror.
            SchemaError: the mirror is of another version.
        """
        found = await self._asked(self._client.get(self._names.layout))
        if found is None:
            raise BackendError(
                f"redis at {self._where} has no mirror under prefix {self._prefix!r}: check the prefix, and that a "
                "`kvatlas worker --mirror` runs"
            )
        try:
            self.layout = msgspec.msgpack.decode(found, type=MirrorLayout)
        except msgspec.MsgspecError as error:
            raise SchemaError(f"mirror at {self._where}: its layout cannot be read: {error}") from error
        if self.layout.key_version != KEY_VERSION:
            raise SchemaError(
                f"mirror at {self._where}: block keys of version {self.layout.key_version}, not {KEY_VERSION}"
            )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def lookup(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the packed holders of each key: empty where nobody holds it, None while its partition is copied.

        Raises:
            BackendError: the server does not answer in ``lookup_seconds``.
        """
        names = [self._names.blocks + key for key in keys]
        if not names:
            return []
        found = await self._asked(asyncio.wait_for(self._values(names), self._lookup_seconds))
        values = [readable(value) for value in found]
        if self._uncopied:
            for number, key in enumerate(keys):
                if partition_of(key, self.layout.partitions) in self._uncopied:
                    values[number] = None
        return values

    async def _values(self, names: list[bytes]) -> list[bytes | None]:
        if len(names) <= _MGET:
            return list(await self._client.mget(names))
        pipeline = self._client.pipeline(transaction=False)
        for start in range(0, len(names), _MGET):
            pipeline.mget(names[start : start + _MGET])
        return [value for part in await pipeline.execute() for value in part]

    async def poll(self) -> Snapshot:
        """Read pods and positions.

        Raises:
            BackendError: the server does not answer.
        """
        names, numbers = self._names, range(self.layout.partitions)
        pipeline = self._client.pipeline(transaction=False)
        pipeline.mget([names.position(number) for number in numbers])
        pipeline.mget([names.claim(number) for number in numbers])
        for number in numbers:
            pipeline.hgetall(names.pods(number))
        positions, claims, *pods = await self._asked(pipeline.execute())
        self.seen = Snapshot(
            {pod: record for part in pods for pod, record in part.items()},
            {number: position_of(value) for number, value in zip(numbers, positions, strict=True)},
            frozenset(number for number, value in zip(numbers, claims, strict=True) if value is None),
        )
        self._uncopied = frozenset(number for number, position in self.seen.positions.items() if position is None)
        return self.seen

    async def apply(self, record: BlocksRecord) -> None:  # noqa: ARG002 - part of the protocol
        """Refuse: the workers write a mirror.

        Raises:
            ReadOnlyError: always.
        """
        raise ReadOnlyError(
            f"mirror at {self._where}: written by workers alone; use RedisBackend for an index of yours"
        )

    async def drop_epoch(self, pod_ref: int, valid_from: int, gpu_valid_from: int = 0) -> int:  # noqa: ARG002
        """Do nothing: the workers sweep."""
        return 0

    async def drop_epochs(self, valid: Validities) -> int:  # noqa: ARG002
        """Do nothing: the workers sweep."""
        return 0

    async def stats(self) -> Stats:
        """Return what it says of itself; bytes are the whole server's."""
        memory = await self._asked(self._client.info("memory"))
        return Stats(backend=self.name, bytes=int(memory.get("used_memory", -1)))

    async def _asked(self, answer: Awaitable[_T]) -> _T:
        try:
            return await answer
        except (TimeoutError, RedisError, OSError) as error:
            raise BackendError(
                f"mirror at {self._where}: {type(error).__name__}: {error}; check the address, the user and whether "
                "the server is up"
            ) from error


class MirrorFollower:
    """Keeps an indexer's pods as the mirror has them.

    Attributes:
        counts: ``polls`` and ``polls_failed``.
    """

    def __init__(self, mirror: MirrorBackend, pods: PodTable, set_block_size: Callable[[int], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._stale = False
        self._mirror = mirror
        self._pods = pods
        self._set_block_size = set_block_size
        self._known: dict[bytes, bytes] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is there, and go on reading.

        Raises:
            BackendError: the server does not answer.
        """
        self._set_block_size(self._mirror.layout.block_size_tokens)
        await self._poll()
        self._task = asyncio.create_task(self._run(), name="follow mirror")

    async def stop(self) -> None:
        """Stop reading."""
        if self._task is not None:
            await end_tasks([self._task])

    @property
    def stale(self) -> bool:
        """Whether a partition is kept by no worker, or the server did not answer lately."""
        return self._stale

    @property
    def rebuilding(self) -> bool:
        """False: a partition that is being copied has no answers."""
        return False

    @property
    def caught_up(self) -> bool:
        """Whether every partition is in the mirror."""
        return bool(self._mirror.seen.positions) and None not in self._mirror.seen.positions.values()

    def failed(self) -> BaseException | None:
        """Return what ended the polling; the server's errors do not."""
        done = self._task is not None and self._task.done() and not self._task.cancelled()
        return self._task.exception() if done and self._task is not None else None

    async def _run(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await self._poll()
                failing = False
            except BackendError as error:
                (log.debug if failing else log.warning)("%s", error)
                failing = self._stale = True
                self.counts["polls_failed"] += 1

    async def _poll(self) -> None:
        seen = await self._mirror.poll()
        for pod in self._known.keys() - seen.pods.keys():
            self._pods.apply(pod_key(WRITER_BRIDGE, "") + pod, None)
        for pod, record in seen.pods.items():
            if self._known.get(pod) != record:
                self._pods.apply(pod_key(WRITER_BRIDGE, "") + pod, record)
        self._known = seen.pods
        self._stale = bool(seen.unkept)
        self.counts["polls"] += 1
