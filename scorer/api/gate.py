"""How much a scorer works on at once, whichever of its fronts was asked."""

from __future__ import annotations

from typing import Self

from kvatlas.scorer.errors import BusyError


class Gate:
    """Lets so many in at once and refuses the rest; a context manager, for one event loop."""

    def __init__(self, most: int, what: str) -> None:
        """Create with no call admitted.

        Args:
            most: how many may be inside.
            what: what they are and the setting that says how many, for the refusal.
        """
        self.inside = 0
        self._most = most
        self._what = what

    def __enter__(self) -> Self:
        if self.inside >= self._most:
            raise BusyError(f"{self.inside} {self._what}; try again")
        self.inside += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.inside -= 1
