"""Lookups in a past state: the scoring engine over an index that was rebuilt from the log."""

from __future__ import annotations

from collections.abc import Sequence

from kvatlas.deploy.history.rebuild import PastIndex
from kvatlas.scorer.scoring.fleet import Fleet
from kvatlas.scorer.scoring.lookup import Answers, IndexView


class PastLookups:
    """Lookups in the rebuilt table: everything is answered."""

    first_blocks = 0
    stale = False

    def __init__(self, past: PastIndex) -> None:
        self._blocks = past.blocks

    async def lookup(self, keys: Sequence[bytes], deadline: float) -> Answers:  # noqa: ARG002 - part of the protocol
        """Look keys up at once."""
        return Answers([self._blocks.get(key) or b"" for key in keys], {})


def view_of(past: PastIndex) -> IndexView:
    """Return a past state as the scoring engine reads it."""
    pods = past.pods()
    return IndexView(Fleet(pods.values(), past.options.block_size_tokens), pods, PastLookups(past))
