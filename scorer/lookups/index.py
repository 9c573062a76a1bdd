"""Index of a version: its pods and where its keys are looked up, as the service holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvatlas.scorer.lookups.pods import PodTable
from kvatlas.scorer.scoring.lookup import IndexView, Lookups


class ServiceLookups(Lookups, Protocol):
    """Lookups that workers answer: with a state, and connections that end."""

    def unready(self) -> str | None:
        """Return why no lookup can be answered now, None when it can."""

    async def forget_gone(self) -> None:
        """Close connections to endpoints that nobody announces any more."""

    async def close(self) -> None:
        """Let connections go."""


class Index(NamedTuple):
    """One index version; a request stays with the one that it began its lookups with.

    Attributes:
        pods: table that a follower feeds.
        lookups: where block keys are looked up.
        block_size: canonical block size in tokens, None while unknown.
        partition_count: partitions of ``kv-blocks``, 0 while unknown.
    """

    pods: PodTable
    lookups: ServiceLookups
    block_size: Callable[[], int | None]
    partition_count: Callable[[], int] = lambda: 0

    def unready(self) -> str | None:
        """Return why no score can be given from it now, None when it can."""
        if self.block_size() is None:
            return "the canonical block size is not known yet: no worker has announced itself"
        return self.lookups.unready()

    def view(self) -> IndexView:
        """Return it as one request sees it; of an index that is not unready."""
        size = self.block_size()
        if size is not None:
            self.pods.set_block_size(size)
        return IndexView(self.pods.fleet, self.pods.merged, self.lookups, self.partition_count())
