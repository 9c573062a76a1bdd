"""What an indexer is built with, and what it needs of the parts that are passed in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from kvatlas.bridge.options import BridgeSettings
from kvatlas.scorer.scoring.walk import Weights
from kvatlas.streams.resolve.resolver import ResolveOptions

#: Token ids, or packed little-endian u32.
Tokens = Sequence[int] | bytes


class IndexerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an indexer is built with.

    Attributes:
        block_size_tokens: canonical block size; a replica takes the workers' when they announce one.
        weights: worth of a block by tier.
        strategy: how a match becomes a score, by name; see :mod:`kvatlas.scorer.scoring.strategies`.
        usable_only: leave out the block of the prompt's last token, which engines compute again.
        resolve: what events mean; its block size is set from here.
        bridge: subscription, replay and queue settings; ``buffer_bytes`` bounds the queue of each pod.
        state_dir: folder for what is learnt of engines, so that an index in RocksDB or Redis scores again after a
            restart; empty keeps it in memory, and engines are replayed.
        start_timeout_seconds: for a replica to read what is there.
    """

    block_size_tokens: int = 16
    weights: Weights = Weights()
    strategy: str = "longest-prefix"
    usable_only: bool = False
    resolve: ResolveOptions = ResolveOptions()
    bridge: BridgeSettings = BridgeSettings(buffer_bytes=32 * 1024 * 1024)
    state_dir: str = ""
    start_timeout_seconds: float = 30.0


class Source(Protocol):
    """Where an indexer's updates come from."""

    counts: Counter[str]

    @property
    def stale(self) -> bool:
        """Whether what the index has only ages: nobody keeps it up to date."""

    @property
    def rebuilding(self) -> bool:
        """Whether the index is being read anew, so that nothing it says can be believed."""

    @property
    def caught_up(self) -> bool:
        """Whether all that was there when it was asked has been applied."""

    def failed(self) -> BaseException | None:
        """Return what ended its work, None while it works."""

    async def stop(self) -> None:
        """Stop."""


class Tokenizers(Protocol):
    """What is used of a :class:`kvatlas.scorer.tokenization.pool.TokenizerPool`."""

    async def encode(self, model: str, prompt: str, add_special_tokens: bool = True) -> Any:
        """Return an ``Encoded``."""

    async def encode_chat(self, model: str, chat: Any) -> Any:
        """Return an ``Encoded``."""
