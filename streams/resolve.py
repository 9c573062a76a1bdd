"""Resolve: one ``kv-events`` message into changes of ``engine_blocks`` and block updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from kvatlas.bridge.events import Limits


class ResolveOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment decides about the meaning of events.

    Attributes:
        block_size_tokens: canonical block size.
        announcements: ``copies``: an engine announces every copy of a block and every eviction of one; ``presence``:
            it announces a block once. A message's header wins.
        clears: what AllBlocksCleared ends: ``all`` tiers or the ``gpu`` alone.
        strict_gaps: an unrepaired gap ends the pod's epoch instead of making older entries suspect.
        orphan_blocks: blocks that wait for an unknown parent, per pod, at most.
        owners: when to keep which engine keys stand for one block key of a pod: ``auto``, once a pod's events may
            name one block twice, or ``always``.
        store: shared store of pods that do not say which they mount.
        limits: bounds of one message.
    """

    block_size_tokens: int = 16
    announcements: Literal["copies", "presence"] = "copies"
    clears: Literal["all", "gpu"] = "all"
    strict_gaps: bool = False
    orphan_blocks: int = 8192
    owners: Literal["auto", "always"] = "auto"
    store: str = "default"
    limits: Limits = Limits()


Clock = Callable[[], int]
