"""Endpoints that can serve, and what is known of a prompt at each of them. Values only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal, NamedTuple, Protocol

Role = Literal["both", "prefill", "decode"]
BOTH: Final = "both"
PREFILL: Final = "prefill"
DECODE: Final = "decode"

#: llm-d's role labels in our three words; what also encodes serves like one that does not.
ROLES: Final[Mapping[str, Role]] = {
    "": "both",
    "both": "both",
    "prefill": "prefill",
    "decode": "decode",
    "prefill-decode": "both",
    "encode-prefill": "prefill",
    "encode-decode": "decode",
    "encode-prefill-decode": "both",
}


class Endpoint(NamedTuple):
    """One serving address: a pod, or one data-parallel rank of it.

    Attributes:
        address: ``ip:port``, IPv6 as ``[ip]:port``.
        pod: pod id, by which the index knows its blocks.
        model: model that it serves, empty for any.
        role: what it does.
        ready: whether it may be picked.
        engine: ``vllm`` or ``sglang``: whose metric names it has.
        metrics: address of its metrics, ``http://host:port/metrics``; empty: none are read.
    """

    address: str
    pod: str
    model: str = ""
    role: Role = "both"
    ready: bool = True
    engine: str = "vllm"
    metrics: str = ""


class Held(NamedTuple):
    """What one pod holds of a prompt.

    Attributes:
        tokens: leading tokens in blocks that it holds, on any tier.
        tiers: the same tokens by tier name.
        speculative: those of them that only a recent decision vouches for: they may still be in the pod's queue.
        suspect: those of them that may be gone.
    """

    tokens: int = 0
    tiers: Mapping[str, int] = {}
    speculative: int = 0
    suspect: int = 0


NOTHING: Final = Held()


class Matched(Protocol):
    """A pod's match of a prompt, as scores have it."""

    @property
    def matched_tokens(self) -> int:
        """Length of the match."""

    @property
    def tiers(self) -> Mapping[str, int]:
        """Matched blocks by tier."""

    @property
    def suspect_blocks(self) -> int:
        """Blocks that may be gone."""

    @property
    def speculative_blocks(self) -> int:
        """Blocks that only a recent decision vouches for."""


def held_of(found: Matched, block_size_tokens: int) -> Held:
    """Return what a pod holds, of its match."""
    return Held(
        found.matched_tokens,
        {name: blocks * block_size_tokens for name, blocks in found.tiers.items()},
        found.speculative_blocks * block_size_tokens,
        found.suspect_blocks * block_size_tokens,
    )


def in_subset(address: str, subset: Collection[str]) -> bool:
    """Whether the subset hint names an address: by ip and port, or by ip alone where it gives no port."""
    if address in subset:
        return True
    host = address.rpartition(":")[0]
    return host in subset or host.strip("[]") in subset
