"""Validity: whether an index entry still counts. The one rule for everything that reads, sweeps or explains entries.

An entry is a claim of one pod: "on this tier, as of this epoch". It ends when the pod's bounds pass its epoch:

===============  =======================================================================================
``shared``       always counts: a store outlives the pods that mount it, and its entries carry no epoch
any other tier   ``dead`` when the pod is gone, or ``epoch < valid_from``
``gpu``          also ``dead`` when ``epoch < gpu_valid_from`` (a clear narrowed to the GPU)
speculative      as ``gpu``, and ``dead`` when ``epoch < suspect_before``: a guess does not outlive a gap
===============  =======================================================================================

What is left is ``suspect`` when ``epoch < suspect_before``, ``speculative`` on that tier, and ``live`` otherwise.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from kvatlas.bridge.model.events import Tier

#: Tier of a holder that only a recent decision vouches for. Lives in memory, never on the wire.
SPECULATIVE: Final = 255

_SHARED: Final = int(Tier.SHARED)
_GPU_BOUND: Final = frozenset((int(Tier.GPU), SPECULATIVE))


class Bounds(Protocol):
    """What of a pod decides which of its entries count; see :class:`Validity` for the fields."""

    @property
    def valid_from(self) -> int:
        """See :class:`Validity`."""

    @property
    def gpu_valid_from(self) -> int:
        """See :class:`Validity`."""

    @property
    def suspect_before(self) -> int:
        """See :class:`Validity`."""


def exists(bounds: Bounds, tier: int, epoch: int) -> bool:
    """Tell whether an entry of a pod that is not gone still counts, certain or suspect."""
    if tier == _SHARED:
        return True
    if epoch < bounds.valid_from or (tier in _GPU_BOUND and epoch < bounds.gpu_valid_from):
        return False
    return tier != SPECULATIVE or epoch >= bounds.suspect_before


def is_suspect(bounds: Bounds, tier: int, epoch: int) -> bool:
    """Tell whether an entry that exists may be gone: a message was lost since."""
    return epoch < bounds.suspect_before and tier != _SHARED


class Validity(NamedTuple):
    """The bounds of one pod's entries.

    Attributes:
        valid_from: entries of older epochs do not exist.
        gpu_valid_from: the same for the GPU tier alone.
        suspect_before: entries of older epochs may be gone.
        gone: the pod was removed; nothing of it counts.
    """

    valid_from: int = 0
    gpu_valid_from: int = 0
    suspect_before: int = 0
    gone: bool = False

    def counts(self, tier: int, epoch: int) -> bool:
        """Tell whether an entry counts, certain or suspect."""
        return (not self.gone or tier == _SHARED) and exists(self, tier, epoch)

    def state(self, tier: int, epoch: int) -> str:
        """Return what an entry is, in the word that Explain uses."""
        if not self.counts(tier, epoch):
            return "dead"
        if tier == SPECULATIVE:
            return "speculative"
        return "suspect" if is_suspect(self, tier, epoch) else "live"
