"""A tier of blocks as an engine's adapter uses it: files and objects alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

from kvatlas.connector.files.blocks import BlockBuffers
from kvatlas.connector.metrics import Metrics
from kvatlas.connector.outcome import Results


class BlockTier(Protocol):
    """Stores and loads blocks, each with an outcome that can be relied on."""

    metrics: Metrics
    read_only: bool

    @property
    def kind(self) -> str:
        """``file`` or ``object``; the tier's word in metrics."""

    def store(self, blocks: Sequence[BlockBuffers]) -> Future[Results]:
        """Store blocks; their buffers stay unchanged until the future is done."""

    def load(self, blocks: Sequence[BlockBuffers], *, per_task: int = 0) -> Future[Results]:
        """Fill the blocks' buffers; a buffer is undefined unless its block was LOADED."""

    def lookup(self, keys: Iterable[bytes]) -> dict[bytes, bool]:
        """Return which blocks are there; blocks for as long as that takes."""

    def touch(self, keys: Iterable[bytes]) -> None:
        """Note a use without a transfer."""

    def drain(self, timeout_seconds: float | None = None) -> bool:
        """Wait until no transfer is queued or running."""

    def close(self, *, drain: bool = False) -> None:
        """End the threads; what has not begun becomes CANCELLED unless ``drain``."""
