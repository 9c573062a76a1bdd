"""What the file tier holds, as engine events: vLLM's newest wire format, medium STORAGE."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

from kvatlas.connector.holdings import Change

MEDIUM: Final = "STORAGE"


class Publisher(Protocol):
    """The part of :class:`kvatlas.bridge.engine_publisher.EnginePublisher` that is used."""

    def publish(self, events: Sequence[Mapping[str, Any]], *, timestamp: float, dp_rank: int | None = 0) -> int:
        """Send one batch."""


class BlockMeta(NamedTuple):
    """What is known of a block besides its key; the index needs the tokens of a block once, from any tier.

    Attributes:
        block_hash: the engine's hash as its other events say it.
        parent_hash: the hash of the block before, None at the start of a prompt.
        token_ids: the block's tokens.
        group: KV-cache group.
        lora_name: adapter.
        extra_keys: the block's extra keys as the engine lists them.
    """

    block_hash: int | bytes
    parent_hash: int | bytes | None = None
    token_ids: tuple[int, ...] = ()
    group: int = 0
    lora_name: str | None = None
    extra_keys: tuple[Any, ...] | None = None


def default_meta(key: bytes) -> BlockMeta:
    """Return what a vLLM offload key alone says: hash (its last 8 bytes as an integer) and group."""
    return BlockMeta(int.from_bytes(key[:-4][-8:], "big"), group=int.from_bytes(key[-4:], "big"))


class StorageEvents:
    """A listener for :class:`kvatlas.connector.filetier.FileTier` that publishes each batch of changes.

    Changes are queued in the order the tier made them and sent by :meth:`flush` or the thread of :meth:`start`,
    so the tier never waits for a socket.

    Args:
        publisher: a started publisher.
        locality: LOCAL for a disk of this pod, REMOTE for a store that other pods mount.
        dp_rank: data-parallel rank in the batches.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        locality: Literal["LOCAL", "REMOTE"] = "LOCAL",
        dp_rank: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._publisher = publisher
        self._locality = locality
        self._dp_rank = dp_rank
        self._clock = clock
        self._meta: dict[bytes, BlockMeta] = {}
        self._pending: list[Change] = []
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def describe(self, metas: Mapping[bytes, BlockMeta]) -> None:
        """Tell what is known of blocks, before they are stored; kept until they are removed."""
        with self._lock:
            self._meta.update(metas)

    def __call__(self, change: Change) -> None:
        """Queue a change (the tier's listener)."""
        with self._lock:
            self._pending.append(change)
        self._wake.set()

    def start(self) -> None:
        """Send in the background from now on."""
        self._thread = threading.Thread(target=self._work, name="kvatlas-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is queued and end; the publisher stays open."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def flush(self) -> int:
        """Send what is queued as one batch; returns the number of events."""
        with self._sending:
            with self._lock:
                changes, self._pending = self._pending, []
                events = [event for change in changes for event in self._events(change)]
            if events:
                self._publisher.publish(events, timestamp=self._clock(), dp_rank=self._dp_rank)
            return len(events)

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            self.flush()

    def _events(self, change: Change) -> Iterable[dict[str, Any]]:
        for key in change.keys:
            if change.removed:
                yield self._removed(self._meta.pop(key) if key in self._meta else default_meta(key))
            else:
                yield self._stored(self._meta.get(key) or default_meta(key))

    def _stored(self, meta: BlockMeta) -> dict[str, Any]:
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": [meta.block_hash],
            "parent_block_hash": meta.parent_hash,
            "token_ids": list(meta.token_ids),
            "block_size": len(meta.token_ids),
            "lora_id": None,
            "medium": MEDIUM,
            "lora_name": meta.lora_name,
            "group_idx": meta.group,
            "locality": self._locality,
        }
        if meta.extra_keys:
            event["extra_keys"] = [list(meta.extra_keys)]
        return event

    def _removed(self, meta: BlockMeta) -> dict[str, Any]:
        return {
            "type": "BlockRemoved",
            "block_hashes": [meta.block_hash],
            "medium": MEDIUM,
            "group_idx": meta.group,
            "locality": self._locality,
        }
