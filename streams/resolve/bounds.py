"""Bounds of what is kept with one block, all of which is read and written whenever one part of it changes."""

from __future__ import annotations

from typing import Final

#: Engine keys that stand for one block.
MAX_OWNERS: Final = 256
#: Blocks that wait for one parent.
MAX_WAITING: Final = 1_024
#: Engine blocks that share a canonical block with one before them.
MAX_FINALS: Final = 4_096
