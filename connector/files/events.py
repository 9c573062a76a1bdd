"""What the file tier holds, as engine events: vLLM's newest wire format, medium STORAGE."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

from kvatlas.connector.files.holdings import Change

MEDIUM: Final = "STORAGE"
_BATCH_EVENTS: Final = 1024
_RETRY_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


class EventPublisher(Protocol):
    """The part of :class:`kvatlas.bridge.engines.publisher.EnginePublisher` that is used."""

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
    """A listener for :class:`kvatlas.connector.files.tier.FileTier` that publishes each batch of changes.

    Changes are queued in the order the tier made them and sent by :meth:`flush` or the thread of :meth:`start`,
    so the tier never waits for a socket.

    Args:
        publisher: a started publisher.
        locality: LOCAL for a disk of this pod, REMOTE for a store that other pods mount.
        dp_rank: data-parallel rank in the batches.
        clock: seconds since the epoch.
        described: blocks whose description is kept; of more, the oldest are told by :func:`default_meta`.
    """

    def __init__(
        self,
        publisher: EventPublisher,
        *,
        locality: Literal["LOCAL", "REMOTE"] = "LOCAL",
        dp_rank: int = 0,
        clock: Callable[[], float] = time.time,
        described: int = 1_000_000,
    ) -> None:
        self._publisher = publisher
        self._locality = locality
        self._dp_rank = dp_rank
        self._clock = clock
        self._described = described
        self._meta: OrderedDict[bytes, BlockMeta] = OrderedDict()
        self._pending: list[Change] = []
        self._unsent: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def describe(self, metas: Mapping[bytes, BlockMeta]) -> None:
        """Tell what is known of blocks, before they are stored; kept until they are removed."""
        with self._lock:
            for key, meta in metas.items():
                self._meta[key] = meta
                self._meta.move_to_end(key)
            while len(self._meta) > self._described:
                self._meta.popitem(last=False)

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
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._try()

    def flush(self) -> int:
        """Send what is queued, in order; returns the number of events.

        What the publisher refuses is kept for the next time: a removal that is lost would leave the index with a block
        that is not there.
        """
        sent = 0
        with self._sending:
            with self._lock:
                changes, self._pending = self._pending, []
                self._unsent += [event for change in changes for event in self._events(change)]
            while self._unsent:
                batch = self._unsent[:_BATCH_EVENTS]
                self._publisher.publish(batch, timestamp=self._clock(), dp_rank=self._dp_rank)
                del self._unsent[: len(batch)]
                sent += len(batch)
        return sent

    def _work(self) -> None:
        while not self._closed.is_set():
            self._wake.wait()
            self._wake.clear()
            if not self._try() and not self._closed.wait(_RETRY_SECONDS):
                self._wake.set()

    def _try(self) -> bool:
        try:
            self.flush()
        except Exception as error:  # noqa: BLE001 - whatever the publisher raises, the thread goes on
            log.warning("storage events cannot be sent (%r); %d wait", error, len(self._unsent))
            return False
        return True

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
