"""The protocol of an index backend, and what all backends share.

A backend maps block keys (16 bytes) to packed holders (see :mod:`kvatlas.streams.index.holders`). Updates come as the
same records that travel on ``kv-blocks``. A backend may forget entries to stay within its bounds: a forgotten
block is a missed hit, never a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from kvatlas.streams.index.apply import Validities
from kvatlas.streams.index.blocks_record import BlocksRecord


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """What a backend says of itself.

    Attributes:
        backend: its name.
        entries: block keys held; -1 when counting them would be dear.
        bytes: memory or disk it takes, as far as it knows; -1 unknown.
        evicted: entries forgotten to stay within bounds, since the start.
        refused: entries never taken, because what they would have displaced is used more often.
        updates: updates applied since the start.
        late: updates dropped because they had been applied before.
    """

    backend: str
    entries: int = -1
    bytes: int = -1
    evicted: int = 0
    refused: int = 0
    updates: int = 0
    late: int = 0


class Backend(Protocol):
    """An index. One event loop uses it; :meth:`apply` calls are ordered per pod by the caller."""

    name: str

    async def start(self) -> None:
        """Open it.

        Raises:
            BackendError: it cannot be reached or opened.
        """

    async def lookup(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Return the packed holders of each key: empty bytes where nobody holds it, None where it cannot tell.

        Raises:
            BackendError: it does not answer (retriable).
        """

    async def apply(self, record: BlocksRecord) -> None:
        """Apply a record of updates; one that was applied before changes nothing.

        Raises:
            BackendError: it does not answer (retriable); apply the record again.
        """

    async def drop_epoch(self, pod_ref: int, valid_from: int, gpu_valid_from: int = 0) -> int:
        """Remove the entries of a pod's ended epochs; returns how many holders went.

        Readers ignore them in any case; this only gives their room back. 2**64 - 1 as ``valid_from`` drops the pod.
        """

    async def drop_epochs(self, valid: Validities) -> int:
        """The same for several pods in one pass: pod ref -> which of its entries count."""

    async def stats(self) -> Stats:
        """Return what it says of itself."""

    async def close(self) -> None:
        """Let go of what it holds open."""


@runtime_checkable
class Losable(Protocol):
    """A backend on a server that may be emptied, or come back with an older state, while it is used.

    Such a loss is seen by what was acknowledged: :meth:`Backend.apply` and :meth:`check` raise ``IndexLostError`` for
    it. Whoever fills the index then calls :meth:`begin_anew`, applies everything that it knows, and :meth:`whole`.

    Attributes:
        positions: pod ref -> position that was acknowledged.
        lost: whether something is; lookups then have no answer for what is absent.
    """

    positions: dict[int, bytes]
    lost: bool

    async def check(self) -> None:
        """Look whether what was acknowledged is still there."""

    async def begin_anew(self) -> None:
        """Remove everything."""

    def whole(self) -> None:
        """Mark the index complete: absent keys mean "not held" again."""


def slices(keys: Iterable[bytes], size: int) -> Iterable[list[bytes]]:
    """Cut keys into lists of at most ``size``."""
    part: list[bytes] = []
    for key in keys:
        part.append(key)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
