"""Fold of a log in one process: engine messages into both tables at once, with no record of ``kv-blocks`` between.

Whoever rebuilds a past state, audits a log or keeps an index of its own needs what the two agents do and none of the
wire between them. Messages are folded in slices, so that a pod's state is decoded and encoded once a slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from kvatlas.streams.index.apply import apply_blocks
from kvatlas.streams.index.view import BulkView, View
from kvatlas.streams.resolve.effects import Effects
from kvatlas.streams.resolve.message import Message
from kvatlas.streams.resolve.resolver import ResolveOptions, Resolver


class LogFold:
    """Both tables of a log, as far as it has been folded.

    Args:
        options: what the deployment decides about the meaning of events.
        engine_blocks: table of the pods and their engine blocks.
        index: table of the block index.
        clock: wall clock, ns since the epoch, for the pods' records.

    Attributes:
        counts: what happened, by name, in both tables.
    """

    def __init__(self, options: ResolveOptions, engine_blocks: View, index: BulkView, clock: Callable[[], int]) -> None:
        self.counts: Counter[str] = Counter()
        self._resolver = Resolver(options, 1, clock)
        self._engine_blocks, self._index = engine_blocks, index

    def apply(self, messages: Iterable[Message]) -> Effects:
        """Fold messages, those of one pod in the order of the log; both tables have them when it returns."""
        effects = self._resolver.effects()
        part = self._resolver.slice(self._engine_blocks, effects)
        try:
            for message in messages:
                for _ in self._resolver.steps(part, message):
                    pass
        finally:
            part.finish()
        for record in effects.records():
            apply_blocks(self._index, record, self.counts)
        self.counts.update(effects.counts)
        return effects
