"""What an indexer has learnt of its engines, kept in a folder, so that a lasting index scores again after a restart.

Beside the index itself that is: which engine key stands for which block (``engine_blocks`` of each pod), the pods'
records, and where each stream stands. One RocksDB write a commit holds all of it::

    v | pod 8 | table key     a value of the pod's engine_blocks
    p | pod 8                 Kept: the pod's records and the last messages' digests
    m                         mark that the index carries too: the two belong together

It is written after the index and before messages are acknowledged. A crash between the two leaves messages to be
replayed, which the index drops as late.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from kvatlas.bridge.ingest.recovered import Recovered
from kvatlas.bridge.model import pod_ids, records
from kvatlas.bridge.model.directory import merge_pod
from kvatlas.bridge.model.records import PodRecord
from kvatlas.scorer.library.backends.errors import BackendError
from kvatlas.streams.errors import StoreError
from kvatlas.streams.index.view import DictView
from kvatlas.streams.state.database import RocksBudget, open_database, write_batch

_CACHE_BYTES: Final = 32 * 1024 * 1024
_MARK: Final = b"m"
_MARK_BYTES: Final = 16


@runtime_checkable
class Lasting(Protocol):
    """A backend that has its entries again when it is opened again."""

    async def read_mark(self) -> bytes | None:
        """Return the mark that was written into it, None without one."""

    async def write_mark(self, mark: bytes) -> None:
        """Write a mark into it."""


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a pod.

    Attributes:
        pod: pod id.
        bridge, streams: both writers' records, encoded, empty for none.
        digests: of its last messages.
        position: what a server that may lose it has acknowledged, empty for none.
    """

    pod: str
    bridge: bytes
    streams: bytes
    digests: list[tuple[int, int]] = []
    position: bytes = b""


class KeptView(DictView):
    """A pod's ``engine_blocks`` in memory that knows what changed since it was written."""

    def __init__(self, pod: str, values: dict[bytes, bytes] | None = None) -> None:
        super().__init__(values)
        self.pod = pod
        self.changed: set[bytes] = set()

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        self.values[key] = value
        self.changed.add(key)

    def delete(self, key: bytes) -> None:
        """Remove a key; no effect when it is not there."""
        if self.values.pop(key, None) is not None:
            self.changed.add(key)


class FeedState:
    """The folder.

    Args:
        folder: where; made when it is not there. One process at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database: Any = None

    async def open(self, backend: Lasting) -> tuple[dict[str, KeptView], list[Kept]]:
        """Open the folder; returns what it has of each pod: nothing when the index is another one than it goes with.

        Raises:
            BackendError: another process has it, it is damaged, or the index does not answer.
        """
        budget = RocksBudget(_CACHE_BYTES // 2, _CACHE_BYTES // 2)
        try:
            database = self._database = await asyncio.to_thread(open_database, self._folder, budget)
        except StoreError as error:
            raise BackendError(f"indexer state: {error}") from error
        mark = database.get(_MARK)
        if mark is not None and mark == await backend.read_mark():
            return self._read()
        batch = write_batch()
        for key in database.keys():  # noqa: SIM118 # a database, not a dict
            batch.delete(key)
        mark = secrets.token_bytes(_MARK_BYTES)
        await backend.write_mark(mark)
        batch.put(_MARK, mark)
        database.write(batch)
        return {}, []

    def _read(self) -> tuple[dict[str, KeptView], list[Kept]]:
        kept: dict[bytes, Kept] = {}
        values: dict[bytes, dict[bytes, bytes]] = {}
        for key, value in self._database.items():
            ref = key[1:9]
            if key[:1] == b"p":
                kept[ref] = msgspec.msgpack.decode(value, type=Kept)
            elif key[:1] == b"v":
                values.setdefault(ref, {})[key[9:]] = value
        return {pod.pod: KeptView(pod.pod, values.get(ref)) for ref, pod in kept.items()}, list(kept.values())

    def write(self, views: Iterable[KeptView], pods: Iterable[Kept]) -> None:
        """Write what changed, all of it or nothing."""
        batch = write_batch()
        for view in views:
            prefix = b"v" + _ref(view.pod)
            for key in view.changed:
                value = view.values.get(key)
                if value is None:
                    batch.delete(prefix + key)
                else:
                    batch.put(prefix + key, value)
            view.changed.clear()
        for pod in pods:
            batch.put(b"p" + _ref(pod.pod), msgspec.msgpack.encode(pod))
        self._database.write(batch)

    def drop(self, pod: str, view: DictView | None) -> None:
        """Forget a pod that left."""
        batch = write_batch()
        for key in view.values if view is not None else ():
            batch.delete(b"v" + _ref(pod) + key)
        batch.delete(b"p" + _ref(pod))
        self._database.write(batch)

    def close(self) -> None:
        """Let go of the folder."""
        if self._database is not None:
            self._database.close()
            self._database = None


def recovered_of(kept: Kept) -> Recovered | None:
    """Return a pod as its stream goes on with it: at the last message that was applied."""
    streams = records.decode(PodRecord, kept.streams) if kept.streams else None
    bridge = records.decode(PodRecord, kept.bridge) if kept.bridge else None
    if bridge is None and streams is None:
        return None
    merged = merge_pod(bridge, streams)
    applied = streams.last_sequence if streams is not None else -1
    last = streams.last_event_ns if streams is not None else 0
    record = msgspec.structs.replace(
        merged, writer=pod_ids.WRITER_BRIDGE, last_sequence=applied, last_event_ns=last, state=records.STALE
    )
    return Recovered(record, list(kept.digests))


def _ref(pod: str) -> bytes:
    return pod_ids.pod_ref(pod).to_bytes(8, "big")
